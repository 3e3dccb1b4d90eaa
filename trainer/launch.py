"""A run from its options to model.safetensors: join ranks, resolve `auto`, lock the folder, train."""

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Iterator

import torch

from models import Classifier
from shards.errors import ResourceMissing
from shards.folder import ShardFolder, open_shards
from trainer.distributed import join, noticing_lost_ranks
from trainer.logging.checkpoints import load_newest, require_like, restoring
from trainer.loop import train_epochs
from trainer.model_file import save_model
from trainer.optim.precision import Precision, choose_precision
from trainer.options import TrainConfig
from trainer.resolve import Resolved, RunContext, resolve_auto, restore_auto
from trainer.run_directory import RunDirectory
from trainer.setup import build, start
from trainer.state import Diverged, TrainState
from trainer.stop_signal import Stopped, handle_signals
from trainer.sweep import choose_by_sweep

log = logging.getLogger("cxrapid.trainer")


def launch(options: TrainConfig, sources: dict[str, str]) -> None:
    """Train the run of these options to its end, in all the processes that torchrun started.

    `sources` says where each option came from, for config.json. Exits with 130 or 143 where a signal
    stopped it, once the run is saved.
    """
    with (
        join(options.device) as (dist, device),
        handle_signals() as stop,
        noticing_lost_ranks(dist),
        contextlib.ExitStack() as held,
    ):
        run = RunDirectory(options.runs / options.run_name, writes=dist.is_rank_zero)
        model: Classifier | None = None  # on rank 0, if resolving built one

        def begin() -> tuple[TrainConfig, ShardFolder, str, bool]:
            nonlocal model
            shards = open_shards(options.shards)
            precision = choose_precision(options.precision, device)
            held.enter_context(run.at_work(keep_on=Diverged))
            if run.state != "nothing saved":
                resolved = Resolved(restore_auto(options, run))
            else:
                resolved = resolve_auto(options, shards, precision, dist)
            for option, why in resolved.reasons.items():
                log.info(f"--{option} auto is {getattr(resolved.config, option)}: {why}")
            reasons = {option: f"auto: {why}" for option, why in resolved.reasons.items()}
            run.begin(resolved.config, sources | reasons, shards, device, precision.name, dist.size)
            model = resolved.model
            return resolved.config, shards, precision.name, run.model.is_file()

        try:
            with stop.interruptible(dist):
                config, shards, precision, finished = dist.on_rank_zero(begin)
            if finished:
                run.keep_one_checkpoint()
                log.info(f"{run.name} has finished already; score it with: python -m eval {run.path}")
            else:
                with _advising(config):
                    context = RunContext(config, run, shards, Precision(precision, device), stop, dist)
                    finished = train(context, model)
        except Stopped:
            if run.features.is_dir():
                log.info("stopped before a step; the same command resumes with the saved features")
            elif run.has_checkpoint:
                log.info("stopped before a step; the same command resumes from the last checkpoint")
            elif run.config.is_file():
                log.info("stopped before a step, so there is nothing to save; the same command starts again")
            sys.exit(stop.exit_code)
        except Diverged as error:
            # All ranks raise it, and one prints it.
            if dist.is_rank_zero:
                raise
            sys.exit(error.exit_code)
    if not finished:
        sys.exit(stop.exit_code)


def train(context: RunContext, model: Classifier | None = None) -> bool:
    """Train a run to its end, or resume it; return False if a signal stopped it early.

    The run folder then holds the best weights as model.safetensors, one line per epoch in metrics.jsonl, and of its
    checkpoints the last. On a CPU the same config and shards give the same weights to the last bit, however often the
    run was killed on its way. A loss or a weight that is NaN or infinite ends it with Diverged, and is never saved.

    All ranks call this; rank 0 writes the folder. `model` is what `build_model` returned, if it was built. Raises
    Stopped before the first step of this process, when there is nothing to save.
    """
    # A single process stops anywhere in here; several ranks agree between batches.
    with context.stop.interruptible(context.dist):
        origin = start(context, model)
        cache = origin.cache
        if origin.saved is None and cache is not None and context.config.sweep:
            try:
                config = context.dist.on_rank_zero(lambda: choose_by_sweep(context, origin.model, cache))
            except Stopped:
                context.stop_agreed()  # on the signal, which rank 0 got
                raise
            context = dataclasses.replace(context, config=config)
        state = build(context, origin)
    try:
        with state.saver, state.train.loader, state.val.loader:
            finished = train_epochs(state)
    finally:
        for logger in state.loggers:
            logger.close()
    if finished and context.dist.is_rank_zero:
        _save_best(state)
    return finished


def _save_best(state: TrainState) -> None:
    """Write model.safetensors from the best checkpoint, and remove what only an unfinished run needs."""
    context, stopping = state.context, state.stopping
    config, run, monitor = context.config, context.run, context.config.monitor
    names = ("val_loss", "val_auroc") if monitor == "auroc" else ("val_loss",)
    with restoring(run.last.parent):
        best = load_newest([run.best])
        like = {"model": state.eval_model.state_dict(), "epoch": 1, **dict.fromkeys(names, 0.0)}
        require_like(best, like, run.best.name)
    metadata = {
        "arch": config.arch,
        "size": context.shards.manifest.size,
        "findings": list(context.shards.manifest.findings),
        "manifest_sha256": context.shards.digest,
        "epoch": best["epoch"],
        **{name: best[name] for name in names},
    }
    save_model(run.model, best["model"], metadata)
    run.keep_one_checkpoint()
    what = "val AUROC has not risen" if monitor == "auroc" else "val loss has not fallen"
    why = f"{what} for {stopping.epochs_since_best} epochs" if stopping.should_stop else "all epochs done"
    log.info(
        f"{run.name} finished: {why}; best val {monitor} {best[f'val_{monitor}']:.5f} in epoch "
        f"{best['epoch']}. Next: python -m eval {run.path}"
    )


@contextlib.contextmanager
def _advising(config: TrainConfig) -> Iterator[None]:
    """Turn running out of memory, of a GPU or of the host, into ResourceMissing with a way out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # Torch has a class of its own for a GPU's memory only.
        kinds = (MemoryError, torch.OutOfMemoryError)
        if not isinstance(error, kinds) and "DefaultCPUAllocator" not in str(error):
            raise
        half, twice = config.batch_size // 2, 2 * config.accumulate
        if half:
            what = f"; try --batch-size {half} --grad-accum-steps {twice}, which has as many images per step"
        else:
            what = " with one image per batch; try --precision fp16 (bf16 on a CPU) or a smaller --arch"
        raise ResourceMissing(f"the device is out of memory{what}") from error
