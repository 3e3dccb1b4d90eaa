"""The training loop: epochs over train, val after each, the best weights kept, everything saved."""

import time
from typing import Any

from shards.findings import FINDINGS
from shards.folder import ShardFolder
from shards.progress import progress_bar
from trainer.config import TrainConfig
from trainer.distributed import ALONE, Team
from trainer.model_file import save_model
from trainer.optimization.precision import Precision
from trainer.preparation import prepare
from trainer.records.checkpoints import load_newest
from trainer.records.curves import draw_curves
from trainer.records.states import require_like
from trainer.records.timing import DataWait, StepTimes
from trainer.run_directory import RunDirectory
from trainer.session import Session, restoring
from trainer.stop_signal import Stopped, StopSignal
from trainer.validation import Score, validate


def train(
    config: TrainConfig,
    run: RunDirectory,
    shards: ShardFolder,
    precision: Precision,
    asked: StopSignal,
    team: Team = ALONE,
) -> bool:
    """Train a run to its end, or go on with it; return False if `asked` stopped it early.

    The run folder then holds the best weights as model.safetensors, a line an epoch in metrics.jsonl, and
    of its checkpoints the last. On a CPU the same config and shards give the same weights to the last bit,
    however often the run was killed on its way. A loss or a weight that is no number ends it with Diverged,
    and is never saved.

    With a team all its ranks call this; the run is theirs together, and only one writes it.

    Raises Stopped before the first step of this process, when there is nothing to save.
    """
    # A single process stops anywhere in here; several ranks agree between batches.
    with asked.interruptible(team.size == 1):
        session = prepare(config, run, shards, precision, asked, team)
    try:
        with session.train.loader, session.val.loader:
            finished = _train_epochs(session, asked)
    finally:
        for mirror in session.mirrors:
            mirror.close()
    if finished and team.writes:
        _keep_best(session, shards)
    return finished


def _train_epochs(session: Session, asked: StopSignal) -> bool:
    """Train to the last epoch; return False, with everything saved, if `asked` to stop before."""
    config, run, progress = session.config, session.run, session.progress
    while not session.stopping.should_stop and progress.epoch <= config.epochs:
        rates = _train_epoch(session, asked)
        # Val is looked at only once train is done; a run stopped in between goes on with val.
        score = _validate(session, asked) if progress.trained else None
        if score is None:
            session.save_changes()
            run.say(f"stopped in epoch {progress.epoch}, saved; the same command goes on from here")
            return False
        _finish_epoch(session, score, rates)
    if session.unsaved:
        _save_epoch(session)
    return True


def _train_epoch(session: Session, asked: StopSignal) -> dict[str, float | None]:
    """Train until the end of the epoch or until asked to stop; return its rates."""
    progress, first_image = session.progress, session.progress.images
    wait, times = DataWait(), StepTimes(session.precision.device)
    session.model.train()
    # A run stopped in val has nothing of train left, and its loader stands at the next epoch.
    if not progress.trained:
        progress.trained = _take_steps(session, asked, wait, times)
    typical, slow = times.percentile(50, 99)
    seconds = wait.seconds
    return {
        "images_per_second": (progress.images - first_image) / seconds,
        "data_wait": wait.share,
        "seconds": seconds,
        "step_ms_p50": typical,
        "step_ms_p99": slow,
    }


def _take_steps(session: Session, asked: StopSignal, wait: DataWait, times: StepTimes) -> bool:
    """Take the epoch's steps; return False where asked to stop, between two of them.

    Raises Stopped before the first batch that this process trains on: nothing has changed yet.
    """
    config, progress, team = session.config, session.progress, session.team
    samples, group = session.train.samples, config.accumulate * config.batch_size
    first_image, group_images, pending = progress.images, 0, 0
    shown_loss = ""
    batches = session.train.after(first_image)
    if not session.begun:
        batches = asked.interruptible_start(batches)
    with progress_bar(
        samples, f"epoch {progress.epoch}", "img", initial=first_image, disable=not team.writes
    ) as bar:
        # Images are those of all ranks; a batch holds this rank's.
        for images, batch in wait.over(batches):
            session.begun = True
            if not pending:
                group_images = min(group, samples - progress.images)
            progress.images += images
            pending += images
            share = team.size * len(batch.images) / group_images
            session.step.add(batch.images, batch.labels, share, more=pending < group_images)
            bar.set_postfix_str(f"data wait {wait.share:.1%}{shown_loss}", refresh=False)
            bar.update(images)
            if pending < group_images:
                continue
            pending = 0
            progress.step += 1
            session.step.apply(progress.step)
            times.mark()
            if progress.step % config.log_every == 0:
                # The one place in the loop that waits for the device.
                train_loss = session.mean_loss
                shown_loss = f", loss {train_loss:.4f}"
                session.record(
                    kind="step", train_loss=train_loss, data_wait=wait.share,
                    images_per_second=(progress.images - first_image) / wait.seconds, **_figures(session),
                )  # fmt: skip
            stopped, save_due = asked.agreed(team, save=session.clock.is_due(progress.step))
            if stopped:
                return False
            if save_due:
                session.save()
    return True


def _figures(session: Session) -> dict[str, float | None]:
    """Return what both kinds of line say about the last step; waits for the device."""
    norm = float(session.counters.grad_norm)
    return {
        "lr": session.rate,
        "grad_norm": norm if norm < float("inf") else None,  # an overflow in fp16, which JSON has no word for
        "grad_scale": session.scaler.get_scale(),
        "skipped_steps": int(session.counters.skipped),
    }


def _validate(session: Session, asked: StopSignal) -> Score | None:
    session.kept_model.eval()
    session.team.share_statistics(session.kept_model)
    try:
        with asked.interruptible(session.team.size == 1):
            return validate(
                (batch for _, batch in session.val.after(0)),
                session.val_forward,
                session.val_loss,
                session.precision.autocast,
                auroc=session.config.monitor == "auroc",
                stop=lambda: asked.agreed(session.team)[0],
                team=session.team,
            )
    except Stopped:
        return None


def _finish_epoch(session: Session, score: Score, rates: dict[str, float | None]) -> None:
    """Put the epoch on record, keep it if it is the best, and save at the start of the next.

    Epochs on a cache can be shorter than saving: there some go unsaved, and a killed run trains them again.
    """
    config, run, progress = session.config, session.run, session.progress
    train_loss = session.mean_loss
    session.require_finite(score.loss, "val loss")
    scores: dict[str, Any] = {"val_loss": score.loss}
    if score.auroc is not None:
        scores["val_auroc"] = session.require_finite(score.auroc, "val AUROC")
    best = session.stopping.observe(progress.epoch, scores[f"val_{config.monitor}"])
    if best:
        session.keep_best(scores)
    session.record(kind="epoch", train_loss=train_loss, **scores, best=best, **rates, **_figures(session))
    auroc = "" if score.auroc is None else f", val AUROC {score.auroc:.4f}"
    run.say(
        f"epoch {progress.epoch}: train loss {train_loss:.5f}, val loss {score.loss:.5f}{auroc}"
        f"{' (best)' if best else ''}, {rates['images_per_second']:.1f} images/s, "
        f"data wait {rates['data_wait']:.1%}"
    )
    progress.next_epoch()
    session.counters.loss_sum.zero_()
    session.unsaved = True
    (worth_it,) = session.team.agree(session.team.writes and session.clock.is_worth_it())
    if config.cache == "off" or worth_it:
        _save_epoch(session)


def _save_epoch(session: Session) -> None:
    begun = time.monotonic()
    session.save()
    if session.team.writes:
        draw_curves(session.run.read_metrics(), session.run.name, session.run.curves)
    session.clock.restart(time.monotonic() - begun)


def _keep_best(session: Session, shards: ShardFolder) -> None:
    stopping, run, monitor = session.stopping, session.run, session.config.monitor
    names = ("val_loss", "val_auroc") if monitor == "auroc" else ("val_loss",)
    with restoring(run):
        best = load_newest([run.best], run.say)
        like = {"model": session.kept_model.state_dict(), "epoch": 1, **dict.fromkeys(names, 0.0)}
        require_like(best, like, run.best.name)
    scores: dict[str, float] = {name: best[name] for name in names}
    metadata: dict[str, Any] = {
        "arch": session.config.arch,
        "size": shards.manifest.size,
        "findings": list(FINDINGS),
        "manifest_sha256": shards.digest,
        "epoch": best["epoch"],
        **scores,
    }
    save_model(run.model, best["model"], metadata)
    run.keep_one_checkpoint()
    what = "val AUROC has not risen" if monitor == "auroc" else "val loss has not fallen"
    why = f"{what} for {stopping.epochs_since_best} epochs" if stopping.should_stop else "all epochs done"
    run.say(
        f"{run.name} finished: {why}; best val {monitor} {scores[f'val_{monitor}']:.5f} in epoch "
        f"{best['epoch']}. Next: python -m eval {run.path}"
    )
