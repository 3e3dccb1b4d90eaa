"""Which sample stands where: the order, the flips and the batches of every epoch.

All loaders take their order from here, so it is the same for all of them: a pure function
of (seed, epoch), never of threads or timing. That is also what makes a resume exact: the
state is two counters and the identity of the data.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from loaders.spec import LoaderSpec
from shards.errors import CannotResume

_ORDER, _FLIP = 0, 1


class Slot(NamedTuple):
    """One batch to be: which positions of the split, and which of them mirrored."""

    positions: npt.NDArray[np.int64]
    """[n], each decoded once. With flip both, the batch is these images followed by their mirrors."""
    mirrored: npt.NDArray[np.bool_]
    """[n], for flip random; all False otherwise."""


def epoch_order(samples: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return a permutation of 0..samples-1, uniform over all permutations, for this epoch."""
    return np.random.default_rng([seed, epoch, _ORDER]).permutation(samples)


def epoch_flips(samples: int, seed: int, epoch: int) -> npt.NDArray[np.bool_]:
    """Return for every place in the order whether it is mirrored, each with probability 1/2."""
    return np.random.default_rng([seed, epoch, _FLIP]).random(samples) < 0.5


class Schedule:
    """The batches of this rank, epoch after epoch, and how many of them have been handed out.

    With several ranks, rank r takes every world_size-th place of the common order: the union
    is the split, sizes differ by at most one, and ranks mix anew every epoch.
    """

    def __init__(self, spec: LoaderSpec, samples: int) -> None:
        self._spec = spec
        self._split_samples = samples
        self._places = len(range(spec.rank, samples, spec.world_size))
        self._per_batch = spec.batch_size // 2 if spec.flip == "both" else spec.batch_size
        self.samples = self._places * (2 if spec.flip == "both" else 1)
        """Images an epoch on this rank, mirrors counted."""
        self.batches = -(-self._places // self._per_batch)
        """Batches an epoch on this rank."""
        self.epoch = 0
        self.batch = 0

    def remaining(self) -> Iterator[Slot]:
        """Yield the batches of this epoch that have not been handed out; changes no state."""
        spec, total = self._spec, self._split_samples
        order = np.arange(total)
        mirrored = np.zeros(total, dtype=np.bool_)
        if spec.training:
            order = epoch_order(total, spec.seed, self.epoch)
        if spec.flip == "random":
            mirrored = epoch_flips(total, spec.seed, self.epoch)
        mine = slice(spec.rank, None, spec.world_size)
        order, mirrored = order[mine], mirrored[mine]
        for start in range(self.batch * self._per_batch, self._places, self._per_batch):
            part = slice(start, start + self._per_batch)
            yield Slot(order[part], mirrored[part])

    def start(self) -> None:
        """Begin an iteration: evaluation always from its first sample, training where it was left."""
        if not self._spec.training:
            self.batch = 0

    def hand_out(self) -> None:
        """Count one batch as handed out."""
        self.batch += 1

    def finish(self) -> None:
        """Go to the start of the next epoch."""
        self.epoch += 1
        self.batch = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the counters, and what they are bound to."""
        return {"epoch": self.epoch, "batch": self.batch, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place; raise CannotResume naming what differs from when it was saved."""
        differing = [
            f"{key} was {state.get(key)}, is now {value}"
            for key, value in self._identity().items()
            if state.get(key) != value
        ]
        if differing:
            raise CannotResume(f"the loader's state does not fit: {'; '.join(differing)}")
        self.epoch, self.batch = state["epoch"], state["batch"]

    def _identity(self) -> dict[str, Any]:
        spec = self._spec
        return {
            "manifest": spec.shards.digest,
            "split": spec.split,
            "training": spec.training,
            "batch_size": spec.batch_size,
            "flip": spec.flip,
            "seed": spec.seed,
            "world_size": spec.world_size,
        }
