"""`--sweep`: a head for each combination of options on one cache of features, and the best one's options."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from models import Classifier
from shards.console import progress_bar
from shards.files import atomic_write_text
from trainer.distributed import SINGLE_PROCESS
from trainer.feature_cache.features import FeatureCache
from trainer.loop import epochs
from trainer.options import TrainConfig
from trainer.resolve import RunContext
from trainer.run_directory import RunDirectory
from trainer.setup import new_state
from trainer.state import Diverged

log = logging.getLogger("cxrapid.trainer")

Options = Mapping[str, float]
"""One point of a sweep: values of options named as on the command line, without the dashes in front."""
_NEVER = 2**40  # steps


@dataclass(frozen=True)
class HeadResult:
    """One trained head."""

    options: Options
    epochs: int
    """That were trained."""
    best_epoch: int
    """From 1; 0 if none ended with finite losses."""
    train_loss: float
    """Mean of the best epoch; NaN if there is none."""
    val_loss: float
    """The lowest of all epochs; infinite if there is none."""


def choose_by_sweep(context: RunContext, model: Classifier, cache: FeatureCache) -> TrainConfig:
    """Train all heads of `--sweep` in this process and return the config with the best one's options.

    Each is trained as the run would train it with these options, on whole batches. The table is logged and written to
    sweep.csv and metrics.jsonl, the choice to config.json. A run on one rank then trains the very best head again.

    Raises Stopped on a signal, Diverged if all heads did.
    """
    config, run = context.config, context.run
    run.truncate_metrics(0, -1)  # of a killed sweep
    results = train_heads(context, model, cache, config.sweep_points)
    for line in sweep_table(results):
        log.info(line)
    _write_results(results, run)
    best = _fields(best_head(results).options)
    run.update_config(best, "sweep")
    return replace(config, **best)


def train_heads(
    context: RunContext, model: Classifier, cache: FeatureCache, sweep: Sequence[Options]
) -> list[HeadResult]:
    """Train one head for each point of a sweep, on val loss, and return their results in that order.

    Every head starts from the model's weights and torch's random state as they are now: it ends at the very
    bits that it would have if trained alone. Afterwards both are as they were. Raises Stopped on a signal.

    The heads are trained one after the other. Four linear ones stacked into one matrix took half the time
    (0.8 ms a step of 64 images against 1.8 ms, two cores), which is not worth an optimizer of its own.
    """
    start = {name: tensor.clone() for name, tensor in cache.trainable.state_dict().items()}
    devices, mode = [context.device] if context.device.type == "cuda" else [], model.training
    # Nothing of a head is logged or saved, and the loop does not wait for the device.
    quiet = replace(
        context,
        config=replace(context.config, monitor="loss", log_every=_NEVER, checkpoint_every=0, checkpoint_steps=0),
        run=RunDirectory(context.run.path, writes=False),
        dist=SINGLE_PROCESS,
    )
    results = []
    with progress_bar(len(sweep), "sweep", "head") as bar:
        for options in sweep:
            with torch.random.fork_rng(devices):
                results.append(_train_head(quiet, model, cache, options))
            cache.trainable.load_state_dict(start)
            bar.update()
    model.train(mode)
    return results


def _train_head(context: RunContext, model: Classifier, cache: FeatureCache, options: Options) -> HeadResult:
    state = new_state(replace(context, config=replace(context.config, **_fields(options))), model, cache)
    train_loss, stopping = math.nan, state.stopping
    try:
        for epoch in epochs(state):
            if epoch.best:
                train_loss = epoch.train_loss
            state.next_epoch()
        trained = state.progress.epoch - 1
    except Diverged:
        trained = state.progress.epoch
    return HeadResult(options, trained, stopping.best_epoch, train_loss, stopping.best)


def best_head(results: Sequence[HeadResult]) -> HeadResult:
    """Return the head of the lowest val loss, the first of equal ones; Diverged if all diverged."""
    best = min(results, key=lambda head: head.val_loss)
    if not best.best_epoch:
        raise Diverged("--sweep: every head of the sweep diverged; try lower learning rates")
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
        notes.append("diverged" if not head.best_epoch else "best" if head is best else "")
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line, note in zip(lines, notes, strict=True):
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        yield "  ".join([*cells, note]).rstrip()


def _fields(options: Options) -> dict[str, Any]:
    return {name.replace("-", "_"): value for name, value in options.items()}


def _write_results(results: list[HeadResult], run: RunDirectory) -> None:
    heading = [*_fields(results[0].options), "epochs", "best_epoch", "train_loss", "val_loss"]
    rows = [",".join(heading)]
    for head in results:
        values = [*head.options.values(), head.epochs, head.best_epoch, head.train_loss, head.val_loss]
        rows.append(",".join(map(repr, values)))
        finite = [value if math.isfinite(value) else None for value in values]
        run.log_metrics(kind="sweep", epoch=0, step=0, **dict(zip(heading, finite, strict=True)))
    atomic_write_text(run.sweep, "\n".join(rows) + "\n")
