"""How a run was trained, read from its folder: epochs, throughput, data wait, command, environment."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.environment import Environment
from trainer.run_directory import RunDirectory


@dataclass(frozen=True)
class TrainingLog:
    """One run's training; a part whose file is not there is empty."""

    name: str
    epochs: tuple[Mapping[str, Any], ...]
    """The lines of metrics.jsonl of kind `epoch`, in order."""
    config: Mapping[str, Any]
    """Option -> value, from config.json."""
    environment: Environment
    """environment.json."""

    @property
    def seconds(self) -> float:
        """Training time of all epochs, without validation."""
        return float(sum(line["seconds"] for line in self.epochs))

    @property
    def data_wait(self) -> float:
        """Share 0..1 of the training time spent waiting for the loader; of a run with epochs."""
        return float(sum(line["data_wait"] * line["seconds"] for line in self.epochs) / self.seconds)

    @property
    def images_per_second(self) -> float:
        """Images trained on per second over all epochs; of a run with epochs."""
        images = sum(line["images_per_second"] * line["seconds"] for line in self.epochs)
        return float(images / self.seconds)

    @property
    def device(self) -> str | None:
        """What it was trained on: a CPU with its cores, a GPU without them; None if not recorded."""
        name, cores = self.environment.get("device"), self.environment.get("cores")
        if not name:
            return None
        on_cpu = self.environment.get("device_type") == "cpu"
        return f"{name}, {cores} cores" if on_cpu and cores else str(name)

    @property
    def best_epoch(self) -> int | None:
        """The epoch of the best weights, which the run has."""
        return next((int(line["epoch"]) for line in reversed(self.epochs) if line.get("best")), None)


def read_training_log(run: RunDirectory) -> TrainingLog:
    """Read metrics.jsonl, config.json and environment.json of a run, those of them that are there.

    A last line of metrics.jsonl that a kill cut off is left out. Raises BadData naming the file, and
    the line of metrics.jsonl, that is damaged.
    """
    return TrainingLog(
        name=run.name,
        # The lines of a sweep stand before step 1.
        epochs=tuple(line for line in run.read_metrics() if line["kind"] == "epoch" and line["step"]),
        config=run.read_config() if run.config.is_file() else {},
        environment=run.read_environment() if run.environment.is_file() else {},
    )


def duration(seconds: float) -> str:
    """Return `12.3 s`, `4 min 5 s` or `2 h 10 min`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
