"""Which sample stands where: the order, the flips and the batches of every epoch.

All loaders take their order from here, so it is the same for all of them: a pure function
of (seed, epoch), never of threads or timing. That is also what makes a resume exact: the
state is two counters and the identity of the data.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from loaders.augment import PARAMETERS, draw
from loaders.spec import Augment, LoaderSpec
from shards.errors import CannotResume

_ORDER, _FLIP, _AUGMENT = 0, 1, 2


class Slot(NamedTuple):
    """One batch to be: which positions of the split, how many of them mirrored, and how distorted."""

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
    """Return for every place in the order whether it is mirrored, each with probability 1/2."""
    return np.random.default_rng([seed, epoch, _FLIP]).random(samples) < 0.5


def epoch_distortions(images: int, augment: Augment, seed: int, epoch: int) -> npt.NDArray[np.float32] | None:
    """Return float32 [images, PARAMETERS]: how every image of the epoch is distorted; None for none."""
    return (
        None if augment == "none" else draw(images, augment, np.random.default_rng([seed, epoch, _AUGMENT]))
    )


class Schedule:
    """The batches of this rank, epoch after epoch, and how many of them have been handed out.

    With several ranks, rank r takes every world_size-th place of the common order: the union
    is the split, sizes differ by at most one, and ranks mix anew every epoch.

    Within a batch the mirrored images come first, so that they are flipped as one piece of memory.
    Which places of an epoch are mirrored does not depend on what stands there, so the order is as
    uniform as before.
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
        return self._slots(self.epoch, self.batch)

    def upcoming(self) -> Iterator[tuple[int, int, Slot]]:
        """Yield epoch, batch and slot of every batch to come, epoch after epoch; changes no state."""
        epoch, first = self.epoch, self.batch
        while self.batches:
            for batch, slot in enumerate(self._slots(epoch, first), first):
                yield epoch, batch, slot
            epoch, first = epoch + 1, 0

    def _slots(self, epoch: int, first: int) -> Iterator[Slot]:
        spec, total = self._spec, self._split_samples
        order = epoch_order(total, spec.seed, epoch) if spec.training else np.arange(total)
        mirrored = np.zeros(total, dtype=np.bool_)
        if spec.flip == "random":
            mirrored = epoch_flips(total, spec.seed, epoch)
        copies = 2 if spec.flip == "both" else 1
        distortions = epoch_distortions(copies * total, spec.augment, spec.seed, epoch)
        mine = slice(spec.rank, None, spec.world_size)
        order, mirrored = order[mine], mirrored[mine]
        if distortions is not None:
            distortions = distortions.reshape(total, copies, PARAMETERS)[mine]
        for start in range(first * self._per_batch, self._places, self._per_batch):
            part = slice(start, start + self._per_batch)
            mirrored_first = np.argsort(~mirrored[part], kind="stable")
            distorted = None
            if distortions is not None:
                distorted = np.ascontiguousarray(distortions[part].swapaxes(0, 1)).reshape(-1, PARAMETERS)
            yield Slot(order[part][mirrored_first], int(mirrored[part].sum()), distorted)

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
            "augment": spec.augment,
            "seed": spec.seed,
            "world_size": spec.world_size,
        }
