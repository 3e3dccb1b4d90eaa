"""What the whole run shares: its options, folder, shards, precision, stop signal and ranks."""

from dataclasses import dataclass

import torch

from loaders import LoaderSpec
from models import Classifier, create_model, freeze
from shards.errors import BadData
from shards.folder import ShardFolder
from trainer.config import TrainConfig
from trainer.distributed import SINGLE_PROCESS, Distributed
from trainer.optim.precision import Precision
from trainer.run_directory import RunDirectory
from trainer.stop_signal import StopSignal


@dataclass(frozen=True)
class RunContext:
    """Fixed for the whole run, with every `auto` resolved."""

    config: TrainConfig
    run: RunDirectory
    shards: ShardFolder
    precision: Precision
    stop: StopSignal
    dist: Distributed = SINGLE_PROCESS

    @property
    def device(self) -> torch.device:
        """Of this rank."""
        return self.precision.device

    @property
    def alone(self) -> bool:
        """Whether this is the only process, which a signal may interrupt: no other rank waits for it."""
        return self.dist.size == 1

    def stop_agreed(self) -> bool:
        """Return whether any rank got a signal; all ranks must ask."""
        return self.stop.agreed(self.dist)[0]

    def loader_spec(self, split: str) -> LoaderSpec:
        """Return the spec of this rank's loader of a split."""
        return loader_spec(self.config, self.shards, self.device, split, self.dist)


def loader_spec(
    config: TrainConfig, shards: ShardFolder, device: torch.device, split: str, dist: Distributed = SINGLE_PROCESS
) -> LoaderSpec:
    """Return the spec of a rank's loader of a split."""
    training = split == "train"
    return LoaderSpec(
        shards,
        split,
        config.batch_size // dist.size,
        device,
        training=training,
        flip=config.flip if training else "none",
        augment=config.augment if training else "none",
        seed=config.seed,
        rank=dist.rank,
        world_size=dist.size,
        threads=config.threads,
    )


def build_model(config: TrainConfig, shards: ShardFolder) -> Classifier:
    """Seed torch and return the frozen arch for these shards, newly initialized; BadData if it cannot be."""
    torch.manual_seed(config.seed)
    try:
        model = create_model(config.arch, size=shards.manifest.size)
    except ValueError as error:
        raise BadData(f"{shards.path}: {error}") from error
    freeze(model, config.freeze)
    return model
