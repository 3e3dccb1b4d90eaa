"""From options to a session: everything is built, loaded and, where a run goes on, restored."""

from collections.abc import Callable
from typing import Any

import torch

from loaders import Batch, Loader, make_loader
from models import Classifier, WeightsUnavailable, freeze, load_weights, parameter_counts, trainable_head
from shards.errors import BadData, ResourceMissing
from shards.findings import FINDINGS
from shards.folder import ShardFolder
from trainer.config import TrainConfig
from trainer.config.settling import build_frozen, loader_spec
from trainer.distributed import ALONE, Team, share_batch_norms
from trainer.frozen.features import Cached, cache_frozen
from trainer.frozen.sweeping import choose_by_sweep
from trainer.optimization.averaging import Average
from trainer.optimization.compilation import Forward, compiles
from trainer.optimization.losses import make_loss
from trainer.optimization.precision import Precision
from trainer.optimization.stepping import make_step
from trainer.portions import Portion
from trainer.records.checkpoints import SaveClock, load_newest
from trainer.records.loggers import open_mirrors
from trainer.run_directory import RunDirectory
from trainer.session import Progress, Session, restoring
from trainer.step import Counters
from trainer.stop_signal import Stopped, StopSignal
from trainer.stopping import MONITORS, EarlyStopping
from trainer.validation import single_class_findings


def prepare(
    config: TrainConfig,
    run: RunDirectory,
    shards: ShardFolder,
    precision: Precision,
    asked: StopSignal,
    team: Team = ALONE,
) -> Session:
    """Build a session, new or from the last whole checkpoint of the run.

    With `--cache on` the frozen part is run here, over everything; with `--sweep` a new run first trains
    all its heads, and goes on with the options of the best.

    Raises BadData for shards or weights that do not fit, ResourceMissing for weights, packages or memory
    that cannot be had, CannotResume where no checkpoint of the run is whole, Stopped if `asked` to.
    """
    device = precision.device
    precision.allow_fast_math()
    torch.manual_seed(config.seed)
    splits = shards.manifest.splits
    for split in ("train", "val"):
        if not splits[split].images:
            raise BadData(f"the split {split} of {shards.path} has no image; training needs train and val")
    if config.monitor == "auroc" and (single := single_class_findings(splits["val"])):
        run.say(f"left out of the val AUROC, since val has one class only: {', '.join(single)}")
    saved = team.from_writer(lambda: _newest(run))
    model, started_from = _start(config, run, shards, device, saved, team)
    cached = _cache(config, run, shards, precision, model, lambda: asked.agreed(team)[0], team)
    if saved is None and cached is not None and config.sweep:
        try:
            config = team.from_writer(
                lambda: choose_by_sweep(
                    config, run, shards, precision, model, cached, lambda: asked.signal is not None
                )
            )
        except Stopped:
            asked.agreed(team)  # on the signal, which the writer got
            raise
    part = model if cached is None else cached.trainable
    average = Average(model, config.ema) if config.ema else None
    kept = part
    if average is not None:
        kept = average.model if cached is None else trainable_head(average.model, config.freeze)
    counters = Counters(device)
    made = make_step(config, shards, precision, model, part, counters, average, team, run.say)
    train, val = _portions(config, shards, device, cached, team)
    session = Session(
        config=config, run=run, team=team, precision=precision, model=model, optimizer=made.optimizer,
        scaler=made.scaler, average=average, counters=counters, step=made.step,
        val_forward=Forward(
            kept, config.batch_size // team.size, compiled=compiles(config.compile, device), say=run.say
        ),
        val_loss=make_loss(config.loss, config.pos_weight, splits["train"], device),
        stopping=EarlyStopping(config.patience, higher_is_better=MONITORS[config.monitor]),
        train=train, val=val, rate_of=made.rate,
        clock=SaveClock(config.checkpoint_every, config.checkpoint_steps), progress=Progress(), mirrors=[],
    )  # fmt: skip
    if team.rank:
        # The weights had to be equal; dropout must not be.
        torch.manual_seed(config.seed + (team.rank << 32))
    if saved is not None:
        with restoring(run):
            session.load_state_dict(saved)
    run.forget_after(session.progress.epoch, session.progress.step)
    if team.writes:
        session.mirrors = open_mirrors(config.mirrors, run.path, config.to_json(), session.progress.step)
    trainable, total = parameter_counts(model)
    ranks = f" on each of {team.size} ranks" if team.size > 1 else ""
    run.say(
        f"{run.name}: {config.arch}, {trainable:,} of {total:,} parameters trainable, {precision.name} on "
        f"{device}{ranks}; {train.samples} images an epoch; from {started_from}"
    )
    return session


def _newest(run: RunDirectory) -> dict[str, Any] | None:
    return load_newest([run.last, run.previous], run.say) if run.has_checkpoint else None


def _start(
    config: TrainConfig,
    run: RunDirectory,
    shards: ShardFolder,
    device: torch.device,
    saved: dict[str, Any] | None,
    team: Team,
) -> tuple[Classifier, str]:
    """Return the model with the weights to go on from, frozen, and where they are from."""
    model = build_frozen(config, shards, torch.device("cpu"))
    if saved is None:
        with team.first_of_host():
            started_from = _start_weights(model, config)
    else:
        with restoring(run):
            model.load_state_dict(saved["model"])
        started_from = "its last checkpoint"
    share_batch_norms(model, team, device, run.say)
    freeze(model, config.freeze)
    return model.to(device), started_from


def _start_weights(model: Classifier, config: TrainConfig) -> str:
    try:
        return load_weights(model, config.start_weights)
    except WeightsUnavailable as error:
        raise ResourceMissing(str(error)) from error
    except (ValueError, OSError) as error:
        raise BadData(str(error)) from error


def _cache(
    config: TrainConfig,
    run: RunDirectory,
    shards: ShardFolder,
    precision: Precision,
    model: Classifier,
    stop: Callable[[], bool],
    team: Team,
) -> Cached | None:
    """Return the cache where the run has one; ResourceMissing where it does not fit any more."""
    if config.cache == "off":
        return None
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        run.say(line)

    train, val = (loader_spec(config, shards, precision.device, split, team) for split in ("train", "val"))
    cached = cache_frozen(
        model, config.freeze, train, val, precision, say,
        loader=config.loader, stop=stop, team=team, save_in=run.features,
    )  # fmt: skip
    if cached is None:
        raise ResourceMissing(
            f"{run.name} trains on a cache, which does not fit: {said[-1]}. Free the memory, or give another "
            "--name with --cache off"
        )
    return cached


def _portions(
    config: TrainConfig, shards: ShardFolder, device: torch.device, cached: Cached | None, team: Team
) -> tuple[Portion, Portion]:
    """Return this rank's batches of train and of val."""
    loaders: list[Loader]
    if cached is not None:
        loaders, nothing = [cached.train, cached.val], cached.nothing()
    else:
        specs = [loader_spec(config, shards, device, split, team) for split in ("train", "val")]
        loaders = [make_loader(config.loader, spec) for spec in specs]
        nothing = _no_images(shards, device)
    splits, mirrors = shards.manifest.splits, 2 if config.flip == "both" else 1
    samples = (splits["train"].images * mirrors, splits["val"].images)
    train, val = (
        Portion(loader, images, config.batch_size, nothing)
        for loader, images in zip(loaders, samples, strict=True)
    )
    return train, val


def _no_images(shards: ShardFolder, device: torch.device) -> Batch:
    size = shards.manifest.size
    return Batch(
        torch.empty(0, 1, size, size, dtype=torch.uint8, device=device),
        torch.empty(0, len(FINDINGS), dtype=torch.uint8, device=device),
        torch.empty(0, dtype=torch.int32, device=device),
    )
