"""Everything that changes while a run trains, as one state to save and restore."""

import math
import time
from dataclasses import dataclass
from typing import Any

import click
import torch

from models import Classifier
from shards.errors import CannotResume
from trainer.context import RunContext
from trainer.logging.checkpoints import CheckpointTimer, save_checkpoint
from trainer.logging.loggers import Logger, log_to_all
from trainer.logging.states import all_finite, require_like, require_optimizer_state
from trainer.optim.compilation import CompiledModel
from trainer.optim.ema import EMA, trained_names
from trainer.optim.losses import FindingLoss
from trainer.optim.schedules import LearningRate
from trainer.sharded_loader import ShardedLoader
from trainer.step import Step, StepStats
from trainer.stopping import EarlyStopping

SMALLEST_SCALE = 2.0**-16
"""Of the fp16 scaler, which begins at 2^16: below it 32 steps or more have overflowed and none fits."""


class Diverged(click.ClickException):
    """A loss or a weight became NaN or infinite: exit code 1. Earlier checkpoints are kept."""

    exit_code = 1


@dataclass
class Progress:
    """How far training has come."""

    epoch: int = 1
    """The epoch in progress, from 1."""
    step: int = 0
    """Optimizer steps so far, over all epochs, those that fp16 skipped counted."""
    images: int = 0
    """Images of this epoch so far, on all ranks."""
    trained: bool = False
    """Whether this epoch has seen all of train, and only val is left."""


@dataclass
class TrainState:
    """All that an epoch needs; everything in it that changes is in `state_dict`."""

    context: RunContext
    model: Classifier
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: EMA | None
    stats: StepStats
    step: Step
    val_forward: CompiledModel
    val_loss: FindingLoss
    stopping: EarlyStopping
    train: ShardedLoader
    val: ShardedLoader
    rate_of: LearningRate
    timer: CheckpointTimer
    progress: Progress
    loggers: list[Logger]
    best: dict[str, Any] | None = None
    """The best weights so far and their metrics, until the next checkpoint writes them."""
    unsaved: bool = False
    """Whether an epoch has ended since the last checkpoint."""
    begun: bool = False
    """Whether this process has trained on a batch: until then nothing has changed."""
    _saved: dict[str, Any] | None = None
    """The progress in the last checkpoint."""

    @property
    def eval_model(self) -> Classifier:
        """The model that is validated and saved: the moving average if there is one."""
        return self.model if self.ema is None else self.ema.model

    @property
    def mean_loss(self) -> float:
        """Of this epoch so far, over the images of all ranks, which must all ask; waits for the device.

        Diverged if it is NaN or infinite.
        """
        total = self.require_good_steps()
        return self.require_finite(total / max(self.progress.images, 1), "train loss")

    def step_metrics(self) -> dict[str, float | None]:
        """Return what each line of metrics.jsonl has about the last step; waits for the device."""
        norm = float(self.stats.grad_norm)
        return {
            "lr": float(self.rate_of(self.stats.applied - 1)),
            "grad_norm": norm if norm < math.inf else None,  # an overflow in fp16; JSON has no infinity
            "grad_scale": self.scaler.get_scale(),
            "skipped_steps": int(self.stats.skipped),
        }

    def log_metrics(self, kind: str, **values: Any) -> None:
        """Append a line to metrics.jsonl, with epoch and step, and pass it to the loggers."""
        line = {"kind": kind, "epoch": self.progress.epoch, "step": self.progress.step, **values}
        self.context.run.log_metrics(**line)
        log_to_all(self.loggers, line)

    def next_epoch(self) -> None:
        """Go to the start of the next epoch."""
        self.progress.epoch, self.progress.images, self.progress.trained = self.progress.epoch + 1, 0, False
        self.stats.loss_sum.zero_()

    def save_changes(self) -> None:
        """Save a checkpoint, unless the state is the one that was saved or restored last."""
        if self.unsaved or vars(self.progress) != self._saved:
            self.save()

    def save(self) -> None:
        """Save a checkpoint and keep the one before; Diverged if a weight is NaN or infinite."""
        begun = time.monotonic()
        self.require_good_steps()
        state = self.state_dict()
        if not all_finite([state["model"], state["average"], *state["optimizer"]["state"].values()]):
            raise self._diverged("a weight is no finite number", self.progress.step)
        if self.context.dist.is_rank_zero:
            run = self.context.run
            if self.best is not None:
                # First, since the state refers to it. If a kill comes in between, this is of an epoch that
                # will be trained again, and comes out the same.
                save_checkpoint(run.best, self.best)
            save_checkpoint(run.last, state, keep_as=run.previous)
        self.best, self.unsaved = None, False
        self._saved = dict(vars(self.progress))
        self.timer.restart(time.monotonic() - begun)

    def keep_best(self, metrics: dict[str, float]) -> None:
        """Keep a copy of the weights as they are, and their metrics, for the next checkpoint."""
        trained = trained_names(self.model)
        weights = {
            name: value.clone() if name in trained else value for name, value in self.eval_model.state_dict().items()
        }
        self.best = {"model": weights, "epoch": self.progress.epoch, **metrics}

    def require_good_steps(self) -> float:
        """Return the sum of this epoch's losses over all ranks, which must all ask; waits for the device.

        Diverged names the first step whose loss or gradient was NaN or infinite.
        """
        own = (float(self.stats.loss_sum), int(self.stats.first_bad))
        sums, first_bad = zip(*self.context.dist.gather(own), strict=True)
        if bad := min(filter(None, first_bad), default=0):
            raise self._diverged("the train loss or its gradient is no finite number", bad)
        if self.scaler.is_enabled() and self.scaler.get_scale() < SMALLEST_SCALE:
            raise self._diverged("the gradient overflows fp16 at any scale", self.progress.step)
        return float(sum(sums))

    def require_finite(self, value: float, what: str) -> float:
        """Return the value; Diverged if it is NaN or infinite."""
        if not math.isfinite(value):
            raise self._diverged(f"the {what} is {value}", self.progress.step)
        return value

    def _diverged(self, what: str, step: int) -> Diverged:
        return Diverged(
            f"{what} at step {step} (epoch {self.progress.epoch}); the checkpoint before it stands. Try a "
            f"lower --lr than {self.context.config.lr}, --clip-grad 1, or --precision fp32"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on; all ranks must ask."""
        device = self.context.device
        own = {
            "counters": {name: value.cpu() for name, value in vars(self.stats).items()},
            "loader": self.train.loader.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }
        return {
            "model": self.model.state_dict(),
            "average": self.ema.state_dict() if self.ema is not None else {},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "stopping": self.stopping.state_dict(),
            "progress": dict(vars(self.progress)),
            "ranks": self.context.dist.gather(own),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what state_dict returned, after checking all of it; all ranks must ask.

        Raises CannotResume for another number of ranks, ValueError naming what is not as it must be.
        """
        ranks = state["ranks"]
        if len(ranks) != self.context.dist.size:
            raise CannotResume(f"world_size was {len(ranks)}, is now {self.context.dist.size}")
        # Hyperparameters come from the options, not from the file.
        saved = state["optimizer"]["state"]
        require_optimizer_state(saved, self.optimizer, "optimizer.state")
        mine = self.state_dict()
        require_like({**state, "optimizer": {}}, {**mine, "optimizer": {}}, "state")
        own, progress = ranks[self.context.dist.rank], Progress(**state["progress"])
        self._require_consistent(progress, own)
        device = self.context.device
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["average"])
        self.optimizer.load_state_dict({**mine["optimizer"], "state": saved})
        self.scaler.load_state_dict(state["scaler"])
        for name, value in vars(self.stats).items():
            value.copy_(own["counters"][name])
        self.stopping.load_state_dict(state["stopping"])
        self.train.loader.load_state_dict(own["loader"])
        self.progress = progress
        self._saved = dict(state["progress"])
        torch.set_rng_state(own["rng"])
        if own["cuda_rng"] is not None:
            torch.cuda.set_rng_state(own["cuda_rng"], device)

    def _require_consistent(self, progress: Progress, own: dict[str, Any]) -> None:
        """Raise ValueError if counters and loader do not agree with this progress."""
        counters, loader = own["counters"], own["loader"]
        applied, skipped = int(counters["applied"]), int(counters["skipped"])
        if min(applied, skipped) < 0 or applied + skipped != progress.step or int(counters["first_bad"]):
            raise ValueError(f"the counters are not those of {progress.step} good steps")
        done = min(-(-progress.images // self.train.batch_size), self.train.loader.batches)
        # After its last batch a loader is at the next epoch, which it counts from 0.
        position = (progress.epoch, 0) if progress.trained else (progress.epoch - 1, done)
        if progress.images > self.train.samples or (loader["epoch"], loader["batch"]) != position:
            raise ValueError(f"the loader is at another place than image {progress.images}")
