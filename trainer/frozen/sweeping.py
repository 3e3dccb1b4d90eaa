"""A sweep within a run: a head for every combination on the run's cache, and what the best was told."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from models import Classifier, trainable_head
from shards.files import atomic_write_text
from shards.folder import ShardFolder
from trainer.config import TrainConfig
from trainer.config.settling import loader_spec
from trainer.frozen.features import Cached, FeatureLoader
from trainer.frozen.heads import (
    Head,
    HeadResult,
    HeadTraining,
    Options,
    best_head,
    sweep_table,
    train_heads,
)
from trainer.optimization.averaging import Average
from trainer.optimization.losses import make_loss
from trainer.optimization.precision import Precision
from trainer.optimization.stepping import make_step
from trainer.run_directory import RunDirectory
from trainer.session import Diverged
from trainer.step import Counters


def choose_by_sweep(
    config: TrainConfig,
    run: RunDirectory,
    shards: ShardFolder,
    precision: Precision,
    model: Classifier,
    cached: Cached,
    stop: Callable[[], bool],
) -> TrainConfig:
    """Train all heads of `--sweep` in this process and return the config with the best's options.

    Each is trained as the run would train it with these options, on whole batches. The table is printed and
    kept as sweep.csv and in metrics.jsonl, and what was chosen in config.json. The model, the place in train
    and torch's random state are left as they were, so a run on one rank then trains the very best head again.

    Raises:
        Stopped: `stop` said so.
        Diverged: all heads did.
    """
    run.forget_after(0, -1)  # what a killed sweep left

    def make(options: Options, counters: Counters) -> Head:
        average = Average(model, config.ema) if config.ema else None
        one = _with(config, options)
        made = make_step(one, shards, precision, model, cached.trainable, counters, average)
        kept = cached.trainable if average is None else trainable_head(average.model, config.freeze)
        return Head(made.step, kept)

    train, val = (
        FeatureLoader(part.features, loader_spec(config, shards, precision.device, split))
        for part, split in ((cached.train, "train"), (cached.val, "val"))
    )
    training = HeadTraining(
        cached.trainable, make, train, val,
        make_loss(config.loss, config.pos_weight, shards.manifest.splits["train"], precision.device),
        precision, config.epochs, config.patience, config.accumulate, stop,
    )  # fmt: skip
    results = train_heads(training, config.sweep_points)
    for line in sweep_table(results):
        run.say(line)
    _put_on_record(results, run)
    try:
        best = best_head(results)
    except ValueError as error:
        raise Diverged(f"--sweep: {error}") from error
    run.choose({name.replace("-", "_"): value for name, value in best.options.items()}, "sweep")
    return _with(config, best.options)


def _with(config: TrainConfig, options: Options) -> TrainConfig:
    values: dict[str, Any] = {name.replace("-", "_"): value for name, value in options.items()}
    return replace(config, **values)


def _put_on_record(results: list[HeadResult], run: RunDirectory) -> None:
    names = [name.replace("-", "_") for name in results[0].options]
    heading = [*names, "epochs", "best_epoch", "train_loss", "val_loss"]
    rows = [",".join(heading)]
    for head in results:
        values = [*head.options.values(), head.epochs, head.best_epoch, head.train_loss, head.val_loss]
        rows.append(",".join(map(repr, values)))
        finite = [value if math.isfinite(value) else None for value in values]
        run.record(kind="sweep", epoch=0, step=0, **dict(zip(heading, finite, strict=True)))
    atomic_write_text(run.sweep, "\n".join(rows) + "\n")
