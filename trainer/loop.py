"""The training loop: steps over train, val after each epoch, the best weights kept, checkpoints saved."""

import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

from shards.console import progress_bar
from trainer.logging.curves import draw_curves
from trainer.logging.timing import DataWait, StepTimes
from trainer.state import TrainState
from trainer.stop_signal import Stopped
from trainer.validation import ValMetrics, validate

log = logging.getLogger("cxrapid.trainer")

CURVES_EVERY = 30.0  # seconds; drawing curves.png takes 0.3 to 0.8 of them, and an epoch may be as short


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to."""

    train_loss: float
    metrics: dict[str, float]
    """val_loss, and val_auroc if it is monitored."""
    best: bool  # so far, on val
    rates: dict[str, float | None]
    """images_per_second, data_wait, seconds, step_ms_p50, step_ms_p99."""


def train_epochs(state: TrainState) -> bool:
    """Train to the last epoch; return False, with everything saved, if a signal stopped it.

    Raises Stopped before the first step of this process, when there is nothing to save.
    """
    stopped, drawn_at = False, time.monotonic()
    try:
        for epoch in epochs(state):
            log_and_save(state, epoch)
            if time.monotonic() - drawn_at >= CURVES_EVERY:
                _draw_curves(state)
                drawn_at = time.monotonic()
    except Stopped:
        if not (state.has_stepped or state.progress.trained):
            raise
        stopped = True
    if not state.is_saved:
        state.save()
    _draw_curves(state)
    state.context.dist.on_rank_zero(state.saver.join)
    if stopped:
        log.info(f"stopped in epoch {state.progress.epoch}, saved; the same command resumes here")
    return not stopped


def epochs(state: TrainState) -> Iterator[Epoch]:
    """Train and validate epoch after epoch; the caller must call `state.next_epoch()` before it asks for the next.

    Raises Stopped after the step in which a signal came, or while val is evaluated; Diverged if a loss is NaN
    or infinite.
    """
    config = state.context.config
    while not state.stopping.should_stop and state.progress.epoch <= config.epochs:
        rates = train_epoch(state)
        val = validate_epoch(state)
        train_loss = state.mean_loss
        metrics = {"val_loss": state.require_finite(val.loss, "val loss")}
        if val.auroc is not None:
            metrics["val_auroc"] = state.require_finite(val.auroc, "val AUROC")
        best = state.stopping.observe(state.progress.epoch, metrics[f"val_{config.monitor}"])
        yield Epoch(train_loss, metrics, best, rates)


def train_epoch(state: TrainState) -> dict[str, float | None]:
    """Train until the end of the epoch; return its rates."""
    progress, first_image = state.progress, state.progress.images
    wait, times = DataWait(state.context.device), StepTimes(state.context.device)
    state.model.train()
    # A run stopped in val has nothing of train left, and its loader is at the next epoch.
    if not progress.trained:
        _take_steps(state, wait, times)
        progress.trained = True
    median, slow = times.percentile(50, 99)
    return {
        "images_per_second": (progress.images - first_image) / wait.seconds,
        "data_wait": wait.share,
        "seconds": wait.seconds,
        "step_ms_p50": median,
        "step_ms_p99": slow,
    }


def _take_steps(state: TrainState, wait: DataWait, times: StepTimes) -> None:
    """Take the steps that are left of the epoch, each over a group of batches; Stopped as `epochs` has it."""
    context, progress, dist, run = state.context, state.progress, state.context.dist, state.context.run
    config, samples, first_image = context.config, state.train.samples, progress.images
    group_images, pending, shown_loss = 0, 0, ""
    batches = state.train.iter_from(first_image)
    if not state.has_stepped:
        batches = context.stop.interruptible_start(batches)
    with progress_bar(samples, f"epoch {progress.epoch}", "img", initial=first_image, disable=not run.writes) as bar:
        # `images` counts those of all ranks, `own` this rank's, which its batch holds.
        for images, own, batch in wait.over(batches):
            # Forward and backward: compiling takes minutes in the first, and a signal need not wait for it
            if not pending:
                group_images = min(config.accumulate * config.batch_size, samples - progress.images)
            progress.images += images
            pending += images
            share = dist.size * own / group_images
            compiles = context.should_compile and not state.has_stepped
            with context.stop.interruptible(dist) if compiles else nullcontext():
                state.step.backward(batch.images, batch.labels, share, more=pending < group_images)
            state.has_stepped = True
            bar.set_postfix_str(f"data wait {wait.share:.1%}{shown_loss}", refresh=False)
            bar.update(images)
            if pending < group_images:
                continue
            # Optimizer step
            pending = 0
            progress.step += 1
            state.step.optimizer_step(progress.step)
            times.mark()
            # Metrics: the one place in the loop that waits for the device
            if progress.step % config.log_every == 0:
                train_loss = state.mean_loss
                shown_loss = f", loss {train_loss:.4f}"
                state.log_metrics(
                    "step",
                    train_loss=train_loss,
                    data_wait=wait.share,
                    images_per_second=(progress.images - first_image) / wait.seconds,
                    **state.step_metrics(),
                )
            # Signals and checkpoints, on which all ranks agree
            stopped, save_due = context.stop.agreed(dist, save=state.timer.is_due(progress.step))
            if stopped:
                raise Stopped
            if save_due:
                state.save()


def validate_epoch(state: TrainState) -> ValMetrics:
    """Evaluate val; Stopped if a signal came."""
    context = state.context
    state.eval_model.eval()
    context.dist.broadcast_statistics(state.eval_model)
    with context.stop.interruptible(context.dist):
        metrics = validate(
            (batch if own else None for _, own, batch in state.val.iter_from(0)),
            state.val_forward,
            state.val_loss,
            context.precision.autocast,
            auroc=context.config.monitor == "auroc",
            stop=context.stop_agreed,
            dist=context.dist,
        )
    if metrics is None:
        raise Stopped
    return metrics


def log_and_save(state: TrainState, epoch: Epoch) -> None:
    """Log the epoch, keep its weights if it is the best, and save at the start of the next.

    Epochs on a cache can be shorter than saving: some of those go unsaved, and a killed run repeats them.
    """
    dist = state.context.dist
    if epoch.best:
        state.keep_best(epoch.metrics)
    state.log_metrics(
        "epoch", train_loss=epoch.train_loss, **epoch.metrics, best=epoch.best, **epoch.rates, **state.step_metrics()
    )
    auroc = f", val AUROC {epoch.metrics['val_auroc']:.4f}" if "val_auroc" in epoch.metrics else ""
    log.info(
        f"epoch {state.progress.epoch}: train loss {epoch.train_loss:.5f}, val loss "
        f"{epoch.metrics['val_loss']:.5f}{auroc}{' (best)' if epoch.best else ''}, "
        f"{epoch.rates['images_per_second']:.1f} images/s, data wait {epoch.rates['data_wait']:.1%}"
    )
    state.next_epoch()
    (worthwhile,) = dist.all_reduce_max(dist.is_rank_zero and state.timer.is_worthwhile(state.saver.took))
    if state.context.config.cache == "off" or worthwhile:
        state.save()


def _draw_curves(state: TrainState) -> None:
    run = state.context.run
    if run.writes:
        state.saver.submit(lambda: draw_curves(run.read_metrics(), run.name, run.curves))
