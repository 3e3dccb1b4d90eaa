"""Everything that changes while a run trains, as one state to save and restore."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import click
import torch

from models import Classifier
from shards.errors import CannotResume
from trainer.distributed import ShardedLoader
from trainer.logging import checkpoints
from trainer.logging.loggers import Logger, log_to_all
from trainer.optim.compilation import CompiledModel
from trainer.optim.ema import trained_names
from trainer.optim.losses import FindingLoss
from trainer.optim.precision import SMALLEST_SCALE
from trainer.resolve import RunContext
from trainer.step import Step
from trainer.validation import EarlyStopping


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
    step: Step
    val_forward: CompiledModel
    val_loss: FindingLoss
    stopping: EarlyStopping
    train: ShardedLoader
    val: ShardedLoader
    timer: checkpoints.CheckpointTimer
    saver: checkpoints.CheckpointSaver
    progress: Progress = field(default_factory=Progress)
    loggers: list[Logger] = field(default_factory=list)
    best: dict[str, Any] | None = None
    """The best weights so far and their metrics, until the next checkpoint writes them."""
    has_stepped: bool = False
    """Whether this process has trained on a batch: until then nothing has changed."""
    _saved: Progress | None = None
    """The progress in the last checkpoint."""

    @property
    def is_saved(self) -> bool:
        """Whether the state is the one that was saved or restored last."""
        return self.progress == self._saved

    @property
    def eval_model(self) -> Classifier:
        """The model that is validated and saved: the moving average if there is one."""
        return self.model if self.step.ema is None else self.step.ema.model

    @property
    def mean_loss(self) -> float:
        """Of this epoch so far, over the images of all ranks, which must all ask; waits for the device."""
        return self.require_finite(self.require_good_steps() / max(self.progress.images, 1), "train loss")

    def step_metrics(self) -> dict[str, float | None]:
        """Return what each line of metrics.jsonl has about the last step; waits for the device."""
        stats = self.step.stats
        norm = float(stats.grad_norm)
        return {
            "lr": float(self.step.rate(stats.applied - 1)),
            "grad_norm": norm if norm < math.inf else None,  # an overflow in fp16; JSON has no infinity
            "grad_scale": self.step.scaler.get_scale(),
            "skipped_steps": int(stats.skipped),
        }

    def log_metrics(self, kind: str, **values: Any) -> None:
        """Append a line to metrics.jsonl, with epoch and step, and pass it to the loggers."""
        line = {"kind": kind, "epoch": self.progress.epoch, "step": self.progress.step, **values}
        self.context.run.log_metrics(**line)
        log_to_all(self.loggers, line)

    def next_epoch(self) -> None:
        """Go to the start of the next epoch."""
        self.progress = Progress(self.progress.epoch + 1, self.progress.step)
        self.step.stats.loss_sum.zero_()

    def save(self) -> None:
        """Save a checkpoint behind training, and keep the one before; all ranks must call this.

        Raises Diverged if a weight is NaN or infinite, at the next save or at the end of the run.
        """
        self.require_good_steps()
        state, dist = self.state_dict(), self.context.dist
        failure = self._diverged("a weight is no finite number", self.progress.step)
        dist.on_rank_zero(lambda: self.saver.save(state, self.best, failure))
        self.best, self._saved = None, replace(self.progress)
        self.timer.restart()

    def keep_best(self, metrics: dict[str, float]) -> None:
        """Keep a copy of the weights as they are, and their metrics, for the next checkpoint."""
        trained = trained_names(self.model)
        state = self.eval_model.state_dict()
        weights = {name: checkpoints.copy_to_host(state[name]) if name in trained else state[name] for name in state}
        self.best = {"model": weights, "epoch": self.progress.epoch, **metrics}

    def require_good_steps(self) -> float:
        """Return the sum of this epoch's losses over all ranks, which must all ask; waits for the device.

        Raises Diverged naming the first step whose loss or gradient was NaN or infinite.
        """
        stats, scaler = self.step.stats, self.step.scaler
        sums, first_bad = zip(*self.context.dist.gather((float(stats.loss_sum), int(stats.first_bad))), strict=True)
        if bad := min(filter(None, first_bad), default=0):
            raise self._diverged("the train loss or its gradient is no finite number", bad)
        if scaler.is_enabled() and scaler.get_scale() < SMALLEST_SCALE:
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
        own = {
            "counters": {name: value.cpu() for name, value in vars(self.step.stats).items()},
            "loader": self.train.loader.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.context.device) if self.context.device.type == "cuda" else None,
        }
        return {
            "model": self.model.state_dict(),
            "average": self.step.ema.model.state_dict() if self.step.ema is not None else {},
            "optimizer": self.step.optimizer.state_dict(),
            "scaler": self.step.scaler.state_dict(),
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
        saved, step, device = state["optimizer"]["state"], self.step, self.context.device
        checkpoints.require_optimizer_state(saved, step.optimizer, "optimizer.state")
        mine = self.state_dict()
        checkpoints.require_like({**state, "optimizer": {}}, {**mine, "optimizer": {}}, "state")
        own, progress = ranks[self.context.dist.rank], Progress(**state["progress"])
        self._require_consistent(progress, own)
        self.model.load_state_dict(state["model"])
        if step.ema is not None:
            step.ema.model.load_state_dict(state["average"])
        # Hyperparameters come from the options, not from the file.
        step.optimizer.load_state_dict({**mine["optimizer"], "state": saved})
        step.scaler.load_state_dict(state["scaler"])
        for name, value in vars(step.stats).items():
            value.copy_(own["counters"][name])
        self.stopping.load_state_dict(state["stopping"])
        self.train.loader.load_state_dict(own["loader"])
        self.progress, self._saved = progress, replace(progress)
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
