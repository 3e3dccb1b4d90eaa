"""What a run's options make of a step: loss, optimizer, scaler and learning rates around a model."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from models import Classifier
from shards.console import echo
from shards.folder import ShardFolder
from trainer.config import TrainConfig
from trainer.distributed import ALONE, Team
from trainer.optimization.averaging import Average
from trainer.optimization.compilation import Forward, compiles
from trainer.optimization.losses import make_loss
from trainer.optimization.optimizers import make_optimizer
from trainer.optimization.precision import Precision
from trainer.optimization.schedules import LearningRate
from trainer.step import Counters, Step


@dataclass(frozen=True)
class Made:
    """A step, and the parts of it that have a state or are asked about."""

    step: Step
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    rate: LearningRate


def make_step(
    config: TrainConfig,
    shards: ShardFolder,
    precision: Precision,
    model: Classifier,
    part: nn.Module,
    counters: Counters,
    average: Average | None,
    team: Team = ALONE,
    say: Callable[[str], None] = echo,
) -> Made:
    """Return a step as the options have it, in which all ranks of the team take part.

    It trains what is not frozen of `model`. The batches are given to `part`: the model itself, or its
    trained part where they hold features.
    """
    train, device = shards.manifest.splits["train"], precision.device
    images = train.images * (2 if config.flip == "both" else 1)
    steps = -(-images // (config.accumulate * config.batch_size))
    rate = LearningRate(config.schedule, config.lr, config.epochs * steps, round(config.warmup * steps))
    together = team.train_together(part, device)
    optimizer = make_optimizer(config.optimizer, model.parameters(), config.lr, config.weight_decay)
    scaler = precision.make_scaler()
    step = Step(
        Forward(
            together, config.batch_size // team.size, compiled=compiles(config.compile, device), say=say
        ),
        make_loss(config.loss, config.pos_weight, train, device, config.label_smoothing),
        optimizer, rate, counters, precision.autocast, scaler, config.clip, average,
        team.hold_back(together),
    )  # fmt: skip
    return Made(step, optimizer, scaler, rate)
