"""Many trained parts on one cache of features: a sweep of options that costs seconds, and its table."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from loaders import Loader
from shards.progress import progress_bar
from trainer.optimization.precision import Precision
from trainer.step import Counters, Step
from trainer.stop_signal import Stopped
from trainer.stopping import EarlyStopping
from trainer.validation import validate

Options = Mapping[str, float]
"""One point of a sweep: values of options named as on the command line, without the dashes in front."""


@dataclass(frozen=True)
class HeadResult:
    """One trained head."""

    options: Options
    epochs: int
    """That were trained."""
    best_epoch: int
    """From 1; 0 where none ended with finite losses."""
    train_loss: float
    """Mean of the best epoch; NaN where there is none."""
    val_loss: float
    """The lowest of all epochs; infinite where there is none."""
    state: dict[str, Tensor] = field(repr=False, compare=False)
    """Of what was kept of the part in the best epoch, on its device; empty where there is none."""


class Head(NamedTuple):
    """One head at work."""

    step: Step
    """Changes the weights of the part."""
    kept: nn.Module
    """What is validated and kept: the part itself, or the same part of its moving average."""


@dataclass(frozen=True)
class HeadTraining:
    """What all heads of a sweep have in common."""

    part: nn.Module
    """Features to logits [N, 14], as `models.trainable_head` gives it."""
    make: Callable[[Options, Counters], Head]
    """A new head on the part as it is, as these options and the run's own have it."""
    train: Loader
    """Batches of features: a `trainer.frozen.features.FeatureLoader`."""
    val: Loader
    """The same, of the split that stopping and choice go by."""
    val_loss: nn.Module
    """float32 logits [N, 14] and float32 labels [N, 14] to their mean. One for all heads, since values of
    different functions cannot be compared."""
    precision: Precision
    epochs: int
    """At most so many for each head."""
    patience: int
    """Epochs in a row without a lower val loss that end a head's training; 0: never. A loss that is no
    finite number ends it at once."""
    accumulate: int = 1
    """Batches a step."""
    stop: Callable[[], bool] = lambda: False
    """Asked between batches."""

    def run(self, options: Options) -> HeadResult:
        """Train the part from the weights it has; it is left at those of the last epoch.

        Raises:
            Stopped: `stop` said so.
        """
        counters = Counters(self.precision.device)
        step, kept = self.make(options, counters)
        stopping = EarlyStopping(self.patience)
        epoch, steps, best_train_loss, state = 0, 0, math.nan, {}
        while epoch < self.epochs and not stopping.should_stop:
            epoch += 1
            self.part.train()
            images, steps = self._train_epoch(step, steps)
            train_loss = float(counters.loss_sum) / images
            counters.loss_sum.zero_()
            self.part.eval()
            score = validate(
                self.val, kept, self.val_loss, self.precision.autocast, auroc=False, stop=self.stop
            )
            if score is None:
                raise Stopped
            if counters.first_bad or not math.isfinite(score.loss):
                break
            if stopping.observe(epoch, score.loss):
                best_train_loss = train_loss
                state = {name: tensor.clone() for name, tensor in kept.state_dict().items()}
        return HeadResult(options, epoch, stopping.best_epoch, best_train_loss, stopping.best, state)

    def _train_epoch(self, step: Step, steps: int) -> tuple[int, int]:
        """Return the epoch's images, and the number of steps with those of this epoch."""
        images, batches = 0, iter(self.train)
        while group := list(itertools.islice(batches, self.accumulate)):
            size = sum(len(batch.rows) for batch in group)
            for batch in group:
                if self.stop():
                    raise Stopped
                step.add(batch.images, batch.labels, len(batch.rows) / size)
            steps += 1
            step.apply(steps)
            images += size
        return images, steps


def train_heads(training: HeadTraining, sweep: Sequence[Options]) -> list[HeadResult]:
    """Train one head for each point of a sweep and return them in that order.

    Every head starts from the weights that the part has now, from the place where the train loader
    stands and from torch's random state: it ends at the very bits that it would have if trained alone.
    Afterwards all three are as they were; `part.load_state_dict(best_head(results).state)` takes over
    the best.

    The heads are trained one after the other. Four linear ones stacked into one matrix took half the time
    (0.8 ms a step of 64 images against 1.8 ms, two cores), which is not worth an optimizer of its own.

    Raises:
        Stopped: the training's `stop` said so.
        ValueError: an empty sweep.
    """
    if not sweep:
        raise ValueError("a sweep needs at least one point")
    part, train = training.part, training.train
    start = {name: tensor.clone() for name, tensor in part.state_dict().items()}
    place, mode = train.state_dict(), part.training
    devices = [training.precision.device] if training.precision.device.type == "cuda" else []
    results = []
    with progress_bar(len(sweep), "sweep", "head") as bar:
        for options in sweep:
            with torch.random.fork_rng(devices):
                results.append(training.run(options))
            part.load_state_dict(start)
            train.load_state_dict(place)
            bar.update()
    part.train(mode)
    return results


def best_head(results: Sequence[HeadResult]) -> HeadResult:
    """Return the head of the lowest val loss, the first of equal ones.

    Raises:
        ValueError: all diverged.
    """
    best = min(results, key=lambda head: head.val_loss)
    if not best.state:
        raise ValueError("every head of the sweep diverged; try lower learning rates")
    return best


def sweep_table(results: Sequence[HeadResult]) -> Iterator[str]:
    """Yield a heading and a line a head in aligned columns; the best and the diverged ones are named."""
    names = list(results[0].options)
    best = min(results, key=lambda head: head.val_loss)
    lines = [[*names, "epochs", "best epoch", "train loss", "val loss"]]
    notes = [""]
    for head in results:
        figures = (str(head.epochs), str(head.best_epoch), f"{head.train_loss:.5f}", f"{head.val_loss:.5f}")
        lines.append([*(f"{head.options[name]:g}" for name in names), *figures])
        notes.append("diverged" if not head.state else "best" if head is best else "")
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line, note in zip(lines, notes, strict=True):
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        yield "  ".join([*cells, note]).rstrip()
