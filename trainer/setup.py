"""From a run's context to its TrainState: model, weights, cache, loaders, optimizer; restored on resume."""

import logging
from dataclasses import dataclass
from typing import Any

import torch

from loaders import Batch, Loader, make_loader
from models import Classifier, WeightsUnavailable, freeze, load_weights, parameter_counts, trainable_head
from shards.errors import BadData, ResourceMissing
from shards.manifest import SplitRecord
from trainer.distributed import ShardedLoader, should_sync_bn, sync_batch_norms
from trainer.feature_cache.features import DoesNotFit, FeatureCache, FeatureLoader, cache_features
from trainer.logging.checkpoints import CheckpointSaver, CheckpointTimer, load_newest, restoring
from trainer.logging.loggers import open_loggers
from trainer.optim.compilation import WORTHWHILE, CompiledModel
from trainer.optim.ema import EMA
from trainer.optim.losses import make_loss
from trainer.optim.optimizers import LearningRate, make_optimizer
from trainer.resolve import RunContext, build_model
from trainer.state import TrainState
from trainer.step import Step, StepStats
from trainer.validation import EarlyStopping

log = logging.getLogger("cxrapid.trainer")

# Images of a rank: below the first the exchange of gradients outweighs the step; the second fills a GPU.
_FEW_IMAGES, _FULL_BATCH = 32, 256


@dataclass(frozen=True)
class Start:
    """What a run starts with or resumes."""

    model: Classifier
    """With --freeze applied, on the device, holding the initial or restored weights."""
    cache: FeatureCache | None
    """With `--cache on`."""
    saved: dict[str, Any] | None
    """The state of the last intact checkpoint, if the run has one."""
    started_from: str
    """Where the weights are from, for the log."""


def start(context: RunContext, model: Classifier | None = None) -> Start:
    """Load the weights and, with `--cache on`, run the frozen part over everything.

    `model` is what `build_model` returned, if it was built already. Raises BadData for shards or weights that do not
    fit, ResourceMissing for weights, packages or memory that cannot be had, CannotResume if no checkpoint of the run
    is intact, Stopped on a signal.
    """
    config, run, shards = context.config, context.run, context.shards
    splits = shards.manifest.splits
    context.precision.allow_fast_math()
    for split in ("train", "val"):
        if not splits[split].images:
            raise BadData(f"the split {split} of {shards.path} has no image; training needs train and val")
    if config.monitor == "auroc" and (single := single_class_findings(splits["val"])):
        log.info(f"left out of the val AUROC, since val has one class only: {', '.join(single)}")
    saved = context.dist.on_rank_zero(lambda: load_newest([run.last, run.previous]) if run.has_checkpoint else None)
    model = model or build_model(config, shards)
    if saved is None:
        with context.dist.first_of_host():
            try:
                started_from = load_weights(model, config.start_weights)
            except WeightsUnavailable as error:
                raise ResourceMissing(str(error)) from error
            except (ValueError, OSError) as error:
                raise BadData(str(error)) from error
    else:
        with restoring(run.last.parent):
            model.load_state_dict(saved["model"])
        started_from = "its last checkpoint"
    synced = should_sync_bn(config.sync_bn, config.batch_size, context.device, context.dist)
    sync_batch_norms(model, context.dist, synced=synced)
    freeze(model, config.freeze)
    model = model.to(context.device)
    cache = None if config.cache == "off" else _cache_features(context, model)
    return Start(model, cache, saved, started_from)


def build(context: RunContext, start: Start) -> TrainState:
    """Return the state of the run: new, or restored if the run has a checkpoint."""
    config, run, dist = context.config, context.run, context.dist
    state = new_state(context, start.model, start.cache)
    if dist.rank:
        # The weights had to be equal; dropout must not be.
        torch.manual_seed(config.seed + (dist.rank << 32))
    if start.saved is not None:
        with restoring(run.last.parent):
            state.load_state_dict(start.saved)
    run.truncate_metrics(state.progress.epoch, state.progress.step)
    if dist.is_rank_zero:
        state.loggers = open_loggers(config.extra_loggers, run.path, config.to_json(), state.progress.step)
    _log_hints(context)
    trainable, total = parameter_counts(start.model)
    ranks = f" on each of {dist.size} ranks" if dist.size > 1 else ""
    log.info(
        f"{run.name}: {config.arch}, {trainable:,} of {total:,} parameters trainable, "
        f"{context.precision.name} on {context.device}{ranks}; {state.train.samples} images per epoch; from "
        f"{start.started_from}"
    )
    return state


def _log_hints(context: RunContext) -> None:
    """Log what another choice of batch size or of --compile would bring on this hardware."""
    config, dist, device = context.config, context.dist, context.device
    if device.type == "cuda" and config.compile == "auto" and not context.should_compile:
        log.info(
            f"--compile auto is off: a run of fewer than {WORTHWHILE:,} images takes longer to compile than it gains"
        )
    images = config.batch_size // dist.size
    if dist.size > 1 and images < _FEW_IMAGES:
        log.info(
            f"with {images} images a rank, exchanging gradients takes long beside the step; --batch-size "
            f"{_FEW_IMAGES * dist.size} or more uses {dist.size} ranks better"
        )
    elif device.type == "cuda" and config.cache == "off" and images < _FULL_BATCH:
        log.info(
            f"a larger batch is faster on a GPU: --config fast takes {_FULL_BATCH} images, with the learning rate that "
            "goes with them"
        )


def new_state(context: RunContext, model: Classifier, cache: FeatureCache | None) -> TrainState:
    """Return the state before the first step; with a cache its batches hold features, for the trainable head."""
    config, device, dist = context.config, context.device, context.dist
    labels, stats = context.shards.manifest.splits["train"], StepStats(device)
    ema = EMA(model, config.ema) if config.ema else None
    trained: torch.nn.Module = model if cache is None else cache.trainable
    evaluated = trained
    if ema is not None:
        evaluated = ema.model if cache is None else trainable_head(ema.model, config.freeze)
    train, val = (_sharded_loader(context, split, cache) for split in ("train", "val"))
    steps = -(-train.samples // (config.accumulate * config.batch_size))
    ddp = dist.wrap_ddp(trained, device)
    batch_size = config.batch_size // dist.size
    step = Step(
        CompiledModel(ddp, batch_size, compiled=context.should_compile),
        make_loss(config.loss, config.pos_weight, labels, device, config.label_smoothing),
        make_optimizer(config.optimizer, model.parameters(), config.lr, config.weight_decay),
        LearningRate(config.schedule, config.lr, config.epochs * steps, round(config.warmup * steps)),
        stats,
        context.precision.autocast,
        context.precision.make_scaler(),
        config.clip,
        ema,
        dist.no_sync(ddp),
    )
    return TrainState(
        context,
        model,
        step,
        # Uncompiled: another graph, for evaluation mode, takes longer to compile than it saves.
        val_forward=CompiledModel(evaluated, batch_size, compiled=False),
        val_loss=make_loss(config.loss, config.pos_weight, labels, device),
        stopping=EarlyStopping(config.patience, higher_is_better=config.monitor == "auroc"),
        train=train,
        val=val,
        timer=CheckpointTimer(config.checkpoint_every, config.checkpoint_steps),
        saver=CheckpointSaver(context.run, device),
    )


def single_class_findings(val: SplitRecord) -> list[str]:
    """Return the findings that all images of val have, or none; BadData where that is every one."""
    single = [finding for finding, count in val.positives.items() if count in (0, val.images)]
    if len(single) == len(val.positives):
        raise BadData("no finding has both classes in val, so there is no AUROC to monitor; use --monitor loss")
    return single


def _cache_features(context: RunContext, model: Classifier) -> FeatureCache:
    config, run = context.config, context.run
    try:
        return cache_features(
            model,
            config.freeze,
            context.loader_spec("train"),
            context.loader_spec("val"),
            context.precision,
            loader=config.loader,
            stop=context.stop_agreed,
            dist=context.dist,
            save_in=run.features,
        )
    except DoesNotFit as error:
        raise ResourceMissing(
            f"{run.name} trains on a cache, which does not fit: {error}. Free the memory, or give another "
            "--name with --cache off"
        ) from error


def _sharded_loader(context: RunContext, split: str, cache: FeatureCache | None) -> ShardedLoader:
    """Return this rank's batches of a split: of images, or of features from the cache."""
    manifest, spec = context.shards.manifest, context.loader_spec(split)
    loader: Loader
    if cache is None:
        loader, size, device = make_loader(context.config.loader, spec), manifest.size, context.device
        # Mid-gray, so that it hardly moves what batch norm measures.
        filler = Batch(
            torch.full((1, 1, size, size), 128, dtype=torch.uint8, device=device),
            torch.zeros(1, len(manifest.findings), dtype=torch.uint8, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
        )
    else:
        loader = FeatureLoader((cache.train if split == "train" else cache.val).features, spec)
        filler = loader.first_image()
    return ShardedLoader(loader, manifest.splits[split].images * spec.copies, context.config.batch_size, filler)
