"""The order, flips and batches of every epoch: a pure function of (seed, epoch).

The seed is `--seed` (trainer.resolve.loader_spec passes it on). All loaders that read shards follow this order,
except webdataset, which shuffles chunks and a buffer (loaders.web). A resume is exact: the state is two counters and
the identity of the data.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from loaders.augment import PARAMETERS, draw
from loaders.spec import LoaderSpec
from shards.errors import CannotResume

_ORDER, _FLIP, _AUGMENT = 0, 1, 2  # random streams of an epoch
_BINDING = ("split", "training", "batch_size", "flip", "augment", "seed", "world_size")


class BatchIndices(NamedTuple):
    """One batch before it is read: which samples of the split, how many mirrored, and how distorted."""

    positions: npt.NDArray[np.int64]
    """[n], each decoded once. With flip both, the batch is these images followed by their mirrors."""
    mirrored: int
    """With flip random the first so many are mirrored; 0 otherwise."""
    distortions: npt.NDArray[np.float32] | None
    """[images of the batch, PARAMETERS] of loaders.augment; None for no augmentation."""


def epoch_order(samples: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return a permutation of 0..samples-1, uniform over all permutations, for this epoch."""
    return np.random.default_rng([seed, epoch, _ORDER]).permutation(samples)


def epoch_flips(samples: int, seed: int, epoch: int) -> npt.NDArray[np.bool_]:
    """Return bool [samples]: whether each index of the order is mirrored, with probability 1/2."""
    return np.random.default_rng([seed, epoch, _FLIP]).random(samples) < 0.5


class EpochSampler:
    """The batches of this rank, epoch after epoch, and how many of them have been yielded.

    Of n ranks, rank r takes the indices r, r + n, r + 2n .. of the common order: the union is the split, sizes
    differ by at most one, and ranks mix anew every epoch.

    Within a batch the mirrored images come first, so that they are flipped as one piece of memory. Which
    indices are mirrored does not depend on the samples there, so the order stays uniform.
    """

    def __init__(self, spec: LoaderSpec, samples: int) -> None:
        self._spec = spec
        self._split_samples = samples
        self._rank_samples = len(range(spec.rank, samples, spec.world_size))
        self._per_batch = spec.batch_size // spec.copies
        self.samples = self._rank_samples * spec.copies
        """Images per epoch on this rank, mirrors counted."""
        self.batches = -(-self._rank_samples // self._per_batch)
        """Batches per epoch on this rank."""
        self.epoch = 0
        self.batch = 0

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the positions alone of the remaining batches: a `batch_sampler` of torch's DataLoader."""
        return (indices.positions.tolist() for indices in self.remaining())

    def remaining(self) -> Iterator[BatchIndices]:
        """Yield the batches of this epoch after the last one yielded; changes no state."""
        return self._batches(self.epoch, self.batch)

    def iter_ahead(self) -> Iterator[tuple[int, int, BatchIndices]]:
        """Yield (epoch, batch, indices) of every batch to come, epoch after epoch; changes no state."""
        epoch, first = self.epoch, self.batch
        while self.batches:
            for batch, indices in enumerate(self._batches(epoch, first), first):
                yield epoch, batch, indices
            epoch, first = epoch + 1, 0

    def _batches(self, epoch: int, first: int) -> Iterator[BatchIndices]:
        spec, total = self._spec, self._split_samples
        order = epoch_order(total, spec.seed, epoch) if spec.training else np.arange(total)
        mirrored = np.zeros(total, dtype=np.bool_)
        if spec.flip == "random":
            mirrored = epoch_flips(total, spec.seed, epoch)
        mine = slice(spec.rank, None, spec.world_size)
        order, mirrored = order[mine], mirrored[mine]
        distortions = None
        if spec.augment != "none":
            drawn = draw(spec.copies * total, spec.augment, np.random.default_rng([spec.seed, epoch, _AUGMENT]))
            distortions = drawn.reshape(total, spec.copies, PARAMETERS)[mine]
        for start in range(first * self._per_batch, self._rank_samples, self._per_batch):
            chunk = slice(start, start + self._per_batch)
            mirrored_first = np.argsort(~mirrored[chunk], kind="stable")
            distorted = None
            if distortions is not None:
                distorted = np.ascontiguousarray(distortions[chunk].swapaxes(0, 1)).reshape(-1, PARAMETERS)
            yield BatchIndices(order[chunk][mirrored_first], int(mirrored[chunk].sum()), distorted)

    def start(self) -> None:
        """Begin an iteration: evaluation from its first sample, training where it was left."""
        if not self._spec.training:
            self.batch = 0

    def advance(self) -> None:
        """Count one batch as yielded."""
        self.batch += 1

    def next_epoch(self) -> None:
        """Go to the start of the next epoch."""
        self.epoch += 1
        self.batch = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the counters, and the identity of the data they belong to."""
        return {"epoch": self.epoch, "batch": self.batch, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; raise CannotResume naming what differs from when it was saved."""
        differing = [
            f"{key} was {state.get(key)}, is now {value}"
            for key, value in self._identity().items()
            if state.get(key) != value
        ]
        if differing:
            raise CannotResume(f"the loader's state does not fit: {'; '.join(differing)}")
        self.epoch, self.batch = state["epoch"], state["batch"]

    def _identity(self) -> dict[str, Any]:
        return {"manifest": self._spec.shards.digest, **{name: getattr(self._spec, name) for name in _BINDING}}
