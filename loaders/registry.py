"""The loaders by name, and the contract they all keep."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from loaders.batch import Batch
from loaders.spec import LoaderSpec
from shards.errors import ResourceMissing


class Loader(Protocol):
    """An iterable of batches, one epoch at a time, for use in a `with`.

    Training: every sample of the split exactly once an epoch, in a uniform permutation of the
    whole split drawn from (seed, epoch). Evaluation: row order, every sample exactly once.
    The last batch is short where the numbers do not divide. Iterating again after leaving a
    training epoch early goes on where it was left; evaluation starts anew.

    `state_dict()` between two batches, loaded into a loader of the same spec, continues with
    the same bits. Loading it with another manifest, batch size, flip, seed or world size
    raises CannotResume. Iterating raises BadData naming a sample that does not decode.
    """

    samples: int
    """Images an epoch on this rank, mirrors counted."""
    batches: int
    """Batches an epoch on this rank."""

    def __iter__(self) -> Iterator[Batch]: ...
    def __enter__(self) -> "Loader": ...
    def __exit__(self, *exception: object) -> None: ...
    def state_dict(self) -> dict[str, Any]:
        """Return what load_state_dict needs to continue after the batch handed out last."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved place."""
        ...

    def close(self) -> None:
        """Free threads and memory."""
        ...


def _dali(spec: LoaderSpec) -> Loader:
    try:
        from loaders.dali import DaliLoader
    except ModuleNotFoundError as error:
        raise ResourceMissing(
            "the loader dali needs NVIDIA DALI, which is not installed (Linux on x86-64: "
            "pip install nvidia-dali-cuda130)"
        ) from error
    return DaliLoader(spec)


def _synthetic(spec: LoaderSpec) -> Loader:
    from loaders.synthetic import SyntheticLoader

    return SyntheticLoader(spec)


LOADERS: dict[str, Callable[[LoaderSpec], Loader]] = {"auto": _dali, "dali": _dali, "synthetic": _synthetic}


def make_loader(name: str, spec: LoaderSpec) -> Loader:
    """Return the loader of this name; ValueError lists the known ones."""
    if name not in LOADERS:
        raise ValueError(f"unknown loader {name!r}; known are {', '.join(LOADERS)}")
    return LOADERS[name](spec)
