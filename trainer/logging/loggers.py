"""Copies of metrics.jsonl in TensorBoard, Weights & Biases and MLflow."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import ResourceMissing


@dataclass(frozen=True)
class Logger:
    """Plots numbers over steps."""

    log: Callable[[dict[str, float], int], object]
    """Takes values by name, `step/lr` or `epoch/val_loss`, and the step."""
    close: Callable[[], object]
    """Flushes, too."""


def _tensorboard(folder: Path, config: dict[str, Any], step: int) -> Logger:
    """Write runs/NAME/tensorboard; look at it with `tensorboard --logdir runs`."""
    from torch.utils.tensorboard import SummaryWriter

    # What a killed process showed after this step is shown again, so the old is hidden.
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Logger(log, writer.close)


def _wandb(folder: Path, config: dict[str, Any], step: int) -> Logger:
    """Log to the project cxrapid of whoever is logged in, under the run's name; a resumed run continues it."""
    import wandb

    run = wandb.init(project="cxrapid", id=folder.name, resume="allow", dir=str(folder), config=config)
    return Logger(run.log, run.finish)


def _mlflow(folder: Path, config: dict[str, Any], step: int) -> Logger:
    """Log to the experiment cxrapid at MLFLOW_TRACKING_URI; a resumed run continues under its id."""
    import mlflow

    mlflow.set_experiment("cxrapid")
    note = folder / "mlflow_run_id"
    known = note.read_text(encoding="ascii") if note.is_file() else None
    run = mlflow.start_run(run_id=known, run_name=folder.name)
    if known is None:  # MLflow refuses another value, and a resumed run may have other --threads
        note.write_text(run.info.run_id, encoding="ascii")
        mlflow.log_params(config)
    return Logger(mlflow.log_metrics, mlflow.end_run)


LOGGERS: dict[str, Callable[[Path, dict[str, Any], int], Logger]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
"""Name, which is also the package's and the extra's -> (run folder, config, step to resume from) -> logger."""


def open_loggers(names: list[str], folder: Path, config: dict[str, Any], step: int) -> list[Logger]:
    """Return the loggers of these names; ResourceMissing says how to install a missing one."""
    loggers = []
    for name in names:
        try:
            loggers.append(LOGGERS[name](folder, config, step))
        except ImportError as error:
            raise ResourceMissing(
                f"--log-to {name} needs a package that is not installed: pip install -e '.[{name}]'"
            ) from error
    return loggers


def log_to_all(loggers: list[Logger], line: Mapping[str, Any]) -> None:
    """Log a line of metrics.jsonl, each name prefixed with its kind, to every logger."""
    values = {
        f"{line['kind']}/{name}": float(value)
        for name, value in line.items()
        if name not in ("kind", "epoch", "step") and value is not None
    }
    for logger in loggers:
        logger.log(values, line["step"])
