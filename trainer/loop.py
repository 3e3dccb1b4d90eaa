"""The training loop: epochs over train, val after each, the best weights kept, every epoch saved."""

import math
from dataclasses import dataclass, field
from typing import Any

import click
import torch

from loaders import Flip, Loader, LoaderSpec, make_loader
from models import Classifier, WeightsUnavailable, build, freeze, load_weights, parameter_counts
from shards.errors import BadData, ResourceMissing
from shards.findings import FINDINGS
from shards.folder import ShardFolder
from shards.progress import progress_bar
from trainer.checkpoints import load_checkpoint, save_checkpoint
from trainer.config import TrainConfig
from trainer.interruption import Interruption
from trainer.losses import make_loss
from trainer.model_file import save_model
from trainer.optimizers import make_optimizer
from trainer.precision import Precision
from trainer.run_directory import RunDirectory
from trainer.stopping import EarlyStopping
from trainer.timing import DataWait


class Diverged(click.ClickException):
    """The loss is no longer a number: exit code 1. The checkpoints before it stand."""

    exit_code = 1


@dataclass
class Progress:
    """Where training stands."""

    epoch: int = 1
    """The epoch under way, from 1."""
    step: int = 0
    """Optimizer steps so far, over all epochs."""
    images: int = 0
    """Images of this epoch so far."""
    loss_sum: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    """Of this epoch, over images; on the device, so that adding to it does not wait for it."""

    def next_epoch(self) -> None:
        """Go to the start of the next epoch."""
        self.epoch, self.images = self.epoch + 1, 0
        self.loss_sum = torch.zeros_like(self.loss_sum)


@dataclass
class Session:
    """All that an epoch needs; everything in it that changes is in its state."""

    config: TrainConfig
    run: RunDirectory
    device: torch.device
    precision: Precision
    model: Classifier
    loss: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    stopping: EarlyStopping
    train_loader: Loader
    val_loader: Loader
    progress: Progress

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides what happens next."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "stopping": self.stopping.state_dict(),
            "loader": self.train_loader.state_dict(),
            "progress": dict(vars(self.progress)),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what state_dict returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.stopping.load_state_dict(state["stopping"])
        self.train_loader.load_state_dict(state["loader"])
        self.progress = Progress(**state["progress"])
        self.progress.loss_sum = self.progress.loss_sum.to(self.device)
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)


def train(
    config: TrainConfig,
    run: RunDirectory,
    shards: ShardFolder,
    precision: Precision,
    asked: Interruption,
) -> bool:
    """Train a run to its end, or go on with it; return False if `asked` stopped it early.

    The run folder then holds the best weights as model.safetensors and a line an epoch in
    metrics.jsonl. On a CPU the same config and shards give the same weights to the last bit,
    however often the run was killed on its way.
    """
    session = _prepare(config, run, shards, precision)
    with session.train_loader, session.val_loader:
        while not session.stopping.should_stop and session.progress.epoch <= config.epochs:
            epoch = session.progress.epoch
            timing = _train_epoch(session, asked)
            if asked.signal is not None:
                save_checkpoint(run.last, session.state_dict())
                run.say(f"stopped in epoch {epoch}, saved; the same command goes on from here")
                return False
            train_loss = _mean_loss(session)
            val_loss = evaluate_loss(session)
            best = session.stopping.observe(epoch, val_loss)
            if best:
                kept = {"model": session.model.state_dict(), "epoch": epoch, "val_loss": val_loss}
                save_checkpoint(run.best, kept)
            losses = {"train_loss": train_loss, "val_loss": val_loss, "best": best}
            run.record(kind="epoch", epoch=epoch, step=session.progress.step, **losses, **timing)
            run.say(
                f"epoch {epoch}: train loss {train_loss:.5f}, val loss {val_loss:.5f}"
                f"{' (best)' if best else ''}, {timing['images_per_second']:.1f} images/s, "
                f"data wait {timing['data_wait']:.1%}"
            )
            session.progress.next_epoch()
            save_checkpoint(run.last, session.state_dict())
    _keep_best(session, shards)
    return True


def _prepare(config: TrainConfig, run: RunDirectory, shards: ShardFolder, precision: Precision) -> Session:
    device = precision.device
    torch.manual_seed(config.seed)
    for split in ("train", "val"):
        if not shards.manifest.splits[split].images:
            raise BadData(f"the split {split} of {shards.path} has no image; training needs train and val")
    try:
        model = build(config.arch, size=shards.manifest.size)
    except ValueError as error:
        raise BadData(f"{shards.path}: {error}") from error
    fresh = not run.last.is_file()
    started_from = _start_weights(model, config) if fresh else "its last checkpoint"
    freeze(model, config.freeze)
    model.to(device)
    loader = {
        name: make_loader(config.loader, _spec(config, shards, device, name)) for name in ("train", "val")
    }
    session = Session(
        config, run, device, precision, model,
        loss=make_loss(config.pos_weight, shards.manifest.splits["train"], device),
        optimizer=make_optimizer(model, config),
        scaler=precision.make_scaler(),
        stopping=EarlyStopping(config.patience),
        train_loader=loader["train"],
        val_loader=loader["val"],
        progress=Progress(loss_sum=torch.zeros((), dtype=torch.float64, device=device)),
    )  # fmt: skip
    if not fresh:
        session.load_state_dict(load_checkpoint(run.last))
    run.forget_after(session.progress.epoch, session.progress.step)
    trainable, total = parameter_counts(model)
    run.say(
        f"{run.name}: {config.arch}, {trainable:,} of {total:,} parameters trainable, {precision.name} on "
        f"{device}; {loader['train'].samples} images an epoch; from {started_from}"
    )
    return session


def _start_weights(model: Classifier, config: TrainConfig) -> str:
    try:
        return load_weights(model, config.start_weights)
    except WeightsUnavailable as error:
        raise ResourceMissing(str(error)) from error
    except (ValueError, OSError) as error:
        raise BadData(str(error)) from error


def _spec(config: TrainConfig, shards: ShardFolder, device: torch.device, split: str) -> LoaderSpec:
    training = split == "train"
    flip: Flip = config.flip if training else "none"
    return LoaderSpec(
        shards,
        split,
        config.batch_size,
        device,
        training=training,
        flip=flip,
        seed=config.seed,
        threads=config.threads,
    )


def _train_epoch(session: Session, asked: Interruption) -> dict[str, float]:
    """Train until the end of the epoch or until asked to stop; return its rates."""
    config, progress, model = session.config, session.progress, session.model
    first_image = progress.images
    shown_loss = ""
    wait = DataWait()
    model.train()
    with progress_bar(
        session.train_loader.samples, f"epoch {progress.epoch}", "img", initial=first_image
    ) as bar:
        for batch in wait.over(session.train_loader):
            with session.precision.autocast():
                logits = model(batch.images)
            loss = session.loss(logits.float(), batch.labels.float())
            session.scaler.scale(loss).backward()
            session.scaler.step(session.optimizer)
            session.scaler.update()
            session.optimizer.zero_grad(set_to_none=True)
            images = len(batch.images)
            progress.loss_sum += loss.detach() * images
            progress.images += images
            progress.step += 1
            bar.set_postfix_str(f"data wait {wait.share:.1%}{shown_loss}", refresh=False)
            bar.update(images)
            if progress.step % config.log_every == 0:
                # The one place in the loop that waits for the device.
                mean = _mean_loss(session)
                shown_loss = f", loss {mean:.4f}"
                session.run.record(
                    kind="step", epoch=progress.epoch, step=progress.step, train_loss=mean,
                    images_per_second=(progress.images - first_image) / wait.seconds, data_wait=wait.share,
                    lr=session.optimizer.param_groups[0]["lr"], grad_scale=session.scaler.get_scale(),
                )  # fmt: skip
            if asked.signal is not None:
                break
    seconds = wait.seconds
    return {
        "images_per_second": (progress.images - first_image) / seconds,
        "data_wait": wait.share,
        "seconds": seconds,
    }


def _mean_loss(session: Session) -> float:
    return _finite(float(session.progress.loss_sum) / max(session.progress.images, 1), "train", session)


def _finite(loss: float, split: str, session: Session) -> float:
    if not math.isfinite(loss):
        raise Diverged(
            f"the {split} loss is {loss} at step {session.progress.step} (epoch {session.progress.epoch}); "
            f"the checkpoint before it stands. Try a lower --lr than {session.config.lr}, or --precision fp32"
        )
    return loss


@torch.inference_mode()
def evaluate_loss(session: Session) -> float:
    """Return the mean loss over val, in evaluation mode."""
    session.model.eval()
    total, images = torch.zeros((), dtype=torch.float64, device=session.device), 0
    for batch in session.val_loader:
        with session.precision.autocast():
            logits = session.model(batch.images)
        total += session.loss(logits.float(), batch.labels.float()) * len(batch.images)
        images += len(batch.images)
    return _finite(float(total) / images, "val", session)


def _keep_best(session: Session, shards: ShardFolder) -> None:
    stopping, run = session.stopping, session.run
    best = load_checkpoint(run.best)
    metadata = {
        "arch": session.config.arch,
        "size": shards.manifest.size,
        "findings": list(FINDINGS),
        "manifest_sha256": shards.digest,
        "epoch": best["epoch"],
        "val_loss": best["val_loss"],
    }
    save_model(run.model, best["model"], metadata)
    why = (
        f"val loss has not fallen for {stopping.epochs_since_best} epochs"
        if stopping.should_stop
        else "all epochs done"
    )
    run.say(
        f"{run.name} finished: {why}; best val loss {best['val_loss']:.5f} in epoch {best['epoch']}. "
        f"Next: python -m eval {run.path}"
    )
