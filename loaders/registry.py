"""The loaders by name, and the contract they all keep."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from loaders.batch import Batch
from loaders.spec import LoaderSpec
from shards.errors import ResourceMissing


class Loader(Protocol):
    """An iterable of batches, one epoch at a time, for use in a `with`.

    Training: every sample of the split exactly once an epoch, in a uniform permutation of the
    whole split drawn from (seed, epoch); webdataset permutes less finely, see loaders.web, and
    synthetic repeats one batch. Evaluation: row order, every sample exactly once.
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
    except ImportError as error:
        raise ResourceMissing(
            f"the loader dali needs NVIDIA DALI, which cannot be imported ({error}); Linux on x86-64: "
            "pip install nvidia-dali-cuda130. --loader webdataset does without"
        ) from error
    return DaliLoader(spec)


def _resident(spec: LoaderSpec) -> Loader:
    from loaders.resident import ResidentLoader

    return ResidentLoader(spec, streaming_loader)


def _dataloader(spec: LoaderSpec) -> Loader:
    from loaders.dataloader import TunedDataLoader

    return TunedDataLoader(spec)


def _synthetic(spec: LoaderSpec) -> Loader:
    from loaders.synthetic import SyntheticLoader

    return SyntheticLoader(spec)


def _webdataset(spec: LoaderSpec) -> Loader:
    try:
        from loaders.web import WebLoader
    except ModuleNotFoundError as error:
        raise ResourceMissing(
            "the loader webdataset needs the package webdataset, which is not installed: "
            "pip install 'webdataset>=1.0,<2'"
        ) from error
    return WebLoader(spec)


LOADERS: dict[str, Callable[[LoaderSpec], Loader]] = {
    "dali": _dali,
    "resident": _resident,
    "webdataset": _webdataset,
    "dataloader": _dataloader,
    "synthetic": _synthetic,
}
LOADER_CHOICES = ("auto", *LOADERS)


def choose_loader(spec: LoaderSpec) -> tuple[str, str]:
    """Return what `auto` takes for many epochs of a split, and why, in words for the user.

    resident where the decoded split fits in its share of the free memory of the device or of the
    host, else dali, else webdataset where DALI is not installed.
    """
    from loaders.resident import pick_device

    place, figures = pick_device(spec)
    if place is not None:
        return "resident", f"kept in the memory of {place}: {figures}"
    if _has_dali():
        return "dali", f"decoded anew each epoch: {figures}"
    return "webdataset", f"decoded anew each epoch, without DALI, which cannot be imported: {figures}"


def streaming_loader(spec: LoaderSpec) -> Loader:
    """Return the loader for a single pass: dali, or webdataset where DALI is not installed."""
    return make_loader("dali" if _has_dali() else "webdataset", spec)


def make_loader(name: str, spec: LoaderSpec) -> Loader:
    """Return the loader of this name, for auto the one of choose_loader; ValueError lists the known ones."""
    if name not in LOADER_CHOICES:
        raise ValueError(f"unknown loader {name!r}; known are {', '.join(LOADER_CHOICES)}")
    return LOADERS[choose_loader(spec)[0] if name == "auto" else name](spec)


def _has_dali() -> bool:
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:  # not installed, or its libraries do not load
        return False
    return True
