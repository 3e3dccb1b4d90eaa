"""Copies of metrics.jsonl in TensorBoard, Weights & Biases and MLflow."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from shards.errors import ResourceMissing


class Logger(Protocol):
    """Plots numbers over steps."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log values by name, `step/lr` or `epoch/val_loss`."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


class _TensorBoard:
    """Writes runs/NAME/tensorboard; look at it with `tensorboard --logdir runs`."""

    def __init__(self, folder: Path, config: dict[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a killed process showed after this step is shown again, so the old is hidden.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """Goes to the project cxrapid of whoever is logged in, under the run's name; a resumed run goes on."""

    def __init__(self, folder: Path, config: dict[str, Any], step: int) -> None:
        import wandb

        self._run = wandb.init(project="cxrapid", id=folder.name, resume="allow", dir=str(folder), config=config)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """Goes to the experiment cxrapid at MLFLOW_TRACKING_URI; a resumed run goes on under its id."""

    def __init__(self, folder: Path, config: dict[str, Any], step: int) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment("cxrapid")
        note = folder / "mlflow_run_id"
        known = note.read_text(encoding="ascii") if note.is_file() else None
        run = mlflow.start_run(run_id=known, run_name=folder.name)
        note.write_text(run.info.run_id, encoding="ascii")
        mlflow.log_params(config)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


LOGGERS: dict[str, Callable[[Path, dict[str, Any], int], Logger]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
}
"""Name, which is also the package's and the extra's -> (run folder, config, step to go on from) -> logger."""


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
    left_out = {"kind", "epoch", "step"}
    values = {
        f"{line['kind']}/{name}": float(value)
        for name, value in line.items()
        if name not in left_out and value is not None
    }
    for logger in loggers:
        logger.log(values, line["step"])
