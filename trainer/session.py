"""A run at work: everything that training needs, and everything in it that changes as one state."""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import click
import torch

from models import Classifier
from shards.errors import CannotResume
from trainer.config import TrainConfig
from trainer.distributed import Team, host_copy
from trainer.optimization.averaging import Average, trained_names
from trainer.optimization.compilation import Forward
from trainer.optimization.losses import FindingLoss
from trainer.optimization.precision import Precision
from trainer.optimization.schedules import LearningRate
from trainer.portions import Portion
from trainer.records.checkpoints import SaveClock, save_checkpoint
from trainer.records.loggers import Mirror, show
from trainer.records.states import require_like, require_optimizer_state
from trainer.run_directory import RunDirectory
from trainer.step import Counters, Step
from trainer.stopping import EarlyStopping

SMALLEST_SCALE = 2.0**-16
"""Of the fp16 scaler, which begins at 2^16: below it 32 steps or more have overflowed and none fits."""


class Diverged(click.ClickException):
    """A loss or a weight is no longer a number: exit code 1. The checkpoints before it stand."""

    exit_code = 1


@dataclass
class Progress:
    """Where training stands."""

    epoch: int = 1
    """The epoch under way, from 1."""
    step: int = 0
    """Optimizer steps so far, over all epochs, those that fp16 skipped counted."""
    images: int = 0
    """Images of this epoch so far, on all ranks."""
    trained: bool = False
    """Whether all of train was seen in this epoch, and only val is left."""

    def next_epoch(self) -> None:
        """Go to the start of the next epoch."""
        self.epoch, self.images, self.trained = self.epoch + 1, 0, False


@dataclass
class Session:
    """All that an epoch needs; everything in it that changes is in its state."""

    config: TrainConfig
    run: RunDirectory
    team: Team
    precision: Precision
    model: Classifier
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: Average | None
    counters: Counters
    step: Step
    val_forward: Forward
    val_loss: FindingLoss
    stopping: EarlyStopping
    train: Portion
    val: Portion
    rate_of: LearningRate
    clock: SaveClock
    progress: Progress
    mirrors: list[Mirror]
    best: dict[str, Any] | None = None
    """The best weights so far and what they scored, until the next checkpoint writes them."""
    unsaved: bool = False
    """Whether an epoch has ended since the last checkpoint."""
    begun: bool = False
    """Whether this process has trained on a batch: until then nothing has changed."""
    _saved: dict[str, Any] | None = None
    """The progress that the last checkpoint has."""

    @property
    def kept_model(self) -> Classifier:
        """What is validated and kept: the average where there is one."""
        return self.model if self.average is None else self.average.model

    @property
    def rate(self) -> float:
        """The learning rate of the last step applied; waits for the device."""
        return float(self.rate_of(self.counters.applied - 1))

    @property
    def mean_loss(self) -> float:
        """Of this epoch so far, over the images of all ranks, which must all ask; waits for the device.

        Diverged where it is no number.
        """
        total = self.require_good_steps()
        return self.require_finite(total / max(self.progress.images, 1), "train loss")

    def record(self, **line: Any) -> None:
        """Append a line to metrics.jsonl, with epoch and step, and show it in the mirrors."""
        line = {
            "kind": line.pop("kind"), "epoch": self.progress.epoch, "step": self.progress.step, **line
        }  # fmt: skip
        self.run.record(**line)
        show(self.mirrors, line)

    def save_changes(self) -> None:
        """Write the state, unless it is the one that was saved or restored last."""
        if self.unsaved or vars(self.progress) != self._saved:
            self.save()

    def save(self) -> None:
        """Write the state as the last checkpoint and keep the one before; Diverged if it holds no number."""
        begun = time.monotonic()
        self.require_good_steps()
        state = self.state_dict()
        if not _all_finite([state["model"], state["average"], *state["optimizer"]["state"].values()]):
            raise self._diverged("a weight is no finite number", self.progress.step)
        if self.team.writes:
            if self.best is not None:
                # First, since the state refers to it. What a kill in between leaves here is of an epoch that
                # will be trained again, and comes out the same.
                save_checkpoint(self.run.best, self.best)
            save_checkpoint(self.run.last, state, keep_as=self.run.previous)
        self.best, self.unsaved = None, False
        self._saved = dict(vars(self.progress))
        self.clock.restart(time.monotonic() - begun)

    def keep_best(self, scores: dict[str, Any]) -> None:
        """Keep the weights as they are, and what they scored, for the next checkpoint."""
        trained = trained_names(self.model)
        weights = {
            name: value.clone() if name in trained else value
            for name, value in self.kept_model.state_dict().items()
        }
        self.best = {"model": weights, "epoch": self.progress.epoch, **scores}

    def require_good_steps(self) -> float:
        """Return the sum of this epoch's losses over the images of all ranks, which must all ask.

        Raises Diverged naming the first step whose loss or gradient was no number; waits for the device.
        """
        own = (float(self.counters.loss_sum), int(self.counters.first_bad))
        sums, first_bad = zip(*self.team.gather(own), strict=True)
        if bad := min(filter(None, first_bad), default=0):
            raise self._diverged("the train loss or its gradient is no finite number", bad)
        if self.scaler.is_enabled() and self.scaler.get_scale() < SMALLEST_SCALE:
            raise self._diverged("the gradient overflows fp16 at any scale", self.progress.step)
        return float(sum(sums))

    def require_finite(self, value: float, what: str) -> float:
        """Return the value; raise Diverged where it is no number."""
        if not math.isfinite(value):
            raise self._diverged(f"the {what} is {value}", self.progress.step)
        return value

    def _diverged(self, what: str, step: int) -> Diverged:
        return Diverged(
            f"{what} at step {step} (epoch {self.progress.epoch}); the checkpoint before it stands. Try a "
            f"lower --lr than {self.config.lr}, --clip 1, or --precision fp32"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides what happens next; all ranks must ask, for their own part."""
        device = self.precision.device
        own = {
            "counters": host_copy(self.counters.state_dict()),
            "loader": self.train.loader.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average is not None else {},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "stopping": self.stopping.state_dict(),
            "progress": dict(vars(self.progress)),
            "ranks": self.team.gather(own),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what state_dict returned, once all of it is known to fit; all ranks must ask.

        Raises CannotResume for another number of ranks, ValueError naming what is not as it must be.
        """
        ranks = state["ranks"]
        if len(ranks) != self.team.size:
            raise CannotResume(f"world_size was {len(ranks)}, is now {self.team.size}")
        # What the options decide of the optimizer is not taken from a file.
        kept = state["optimizer"]["state"]
        require_optimizer_state(kept, self.optimizer, "optimizer.state")
        mine = self.state_dict()
        require_like({**state, "optimizer": {}}, {**mine, "optimizer": {}}, "state")
        own, progress = ranks[self.team.rank], Progress(**state["progress"])
        self._require_consistent(progress, own)
        device = self.precision.device
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict({**mine["optimizer"], "state": kept})
        self.scaler.load_state_dict(state["scaler"])
        self.counters.load_state_dict(own["counters"])
        self.stopping.load_state_dict(state["stopping"])
        self.train.loader.load_state_dict(own["loader"])
        self.progress = progress
        self._saved = dict(state["progress"])
        torch.set_rng_state(own["rng"])
        if own["cuda_rng"] is not None:
            torch.cuda.set_rng_state(own["cuda_rng"], device)

    def _require_consistent(self, progress: Progress, own: dict[str, Any]) -> None:
        """Raise ValueError where counters and loader do not stand where this progress does."""
        counters, loader = own["counters"], own["loader"]
        applied, skipped = int(counters["applied"]), int(counters["skipped"])
        if min(applied, skipped) < 0 or applied + skipped != progress.step or int(counters["first_bad"]):
            raise ValueError(f"the counters are not those of {progress.step} good steps")
        done = min(-(-progress.images // self.train.batch_size), self.train.loader.batches)
        # A loader that has given its last batch stands at the next epoch, which it counts from 0.
        place = (progress.epoch, 0) if progress.trained else (progress.epoch - 1, done)
        if progress.images > self.train.samples or (loader["epoch"], loader["batch"]) != place:
            raise ValueError(f"the loader is at another place than image {progress.images}")


@contextmanager
def restoring(run: RunDirectory) -> Iterator[None]:
    """Turn what goes wrong in restoring a whole checkpoint of the run into CannotResume."""
    try:
        yield
    except (click.ClickException, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what is in a file may break anything that restoring relies on
        reason = (str(error).splitlines() or [""])[0][:300]
        raise CannotResume(
            f"the checkpoints in {run.last.parent} are damaged, or of another version of CXRapid "
            f"({type(error).__name__}: {reason}); give another --name"
        ) from error


def _all_finite(states: Iterable[dict[str, Any]]) -> bool:
    """Tell whether every number in the tensors of these is finite; waits for the device once."""
    # In float64 finite numbers of float32 have a finite sum, and it is one pass over each.
    sums = [
        value.sum(dtype=torch.float64)
        for state in states
        for value in state.values()
        if torch.is_tensor(value) and value.is_floating_point()
    ]
    # Adam keeps its step counters on the CPU in some versions of torch.
    return bool(torch.stack([total.to(sums[0].device) for total in sums]).isfinite().all())
