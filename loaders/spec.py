"""The specification of a loader: everything that decides its batches and where they go."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from shards.folder import ShardFolder
from shards.processes import available_cores
from shards.splits import SPLITS

Flip = Literal["none", "random", "both"]
Augment = Literal["none", "light", "strong"]


@dataclass(frozen=True)
class LoaderSpec:
    """The same spec yields the same batches.

    Raises ValueError for a value outside its range.
    """

    shards: ShardFolder
    split: str
    batch_size: int
    """Images a batch and rank, mirrors included; the last batch of an epoch may be shorter."""
    device: torch.device
    training: bool
    """True: a uniform permutation of the split, another one each epoch, with flips.
    False: row order, no flips."""
    flip: Flip = "none"
    """random: each image is mirrored with probability 1/2; both: each image and its mirror in every epoch,
    decoded once, in one batch. Only in training."""
    augment: Augment = "none"
    """Small random changes of place, size, brightness and contrast; see loaders.augment. Only in training."""
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    """Ranks on this machine, which share its cores."""
    threads: int = 0
    """Decoding threads or processes; 0: the loader chooses."""

    def __post_init__(self) -> None:
        choices = {"split": SPLITS, "flip": get_args(Flip), "augment": get_args(Augment)}
        for field, known in choices.items():
            if (value := getattr(self, field)) not in known:
                raise ValueError(f"{field} {value!r} is none of {', '.join(known)}")
        if self.batch_size < 1:
            raise ValueError(f"batch size {self.batch_size} is below 1")
        if self.flip == "both" and self.batch_size % 2:
            raise ValueError(f"flip both needs an even batch size, not {self.batch_size}: image and mirror go together")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is outside 0..{self.world_size - 1}")
        if self.local_world_size < 1:
            raise ValueError(f"local world size {self.local_world_size} is below 1")
        if not self.training and (self.flip, self.augment) != ("none", "none"):
            raise ValueError("flip and augment are for training; evaluation sees every image as it is")

    @property
    def copies(self) -> int:
        """Images of a batch from each that is decoded: with flip both, itself and its mirror."""
        return 2 if self.flip == "both" else 1

    @property
    def cores(self) -> int:
        """The rank's share of the cores that the process may use, at least 1."""
        return max(1, available_cores() // self.local_world_size)
