"""runs/NAME: what a run was told, on what, what it measured, and the weights it kept."""

import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shards.cores import available_cores
from shards.errors import BadData, CannotResume, ResourceMissing
from shards.findings import FINDINGS
from shards.folder import ShardFolder
from shards.publishing import publish_text

if TYPE_CHECKING:  # what is written here can be read where torch is not wanted
    import torch

    from trainer.config import TrainConfig

_VERSIONS_OF = (
    "torch",
    "torchvision",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "webdataset",
    "numpy",
    "pandas",
)


class RunDirectory:
    """The files of one run; every path of it is named here and nowhere else."""

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path
        self.writes = writes
        """Whether this process is the one that writes here: for others say and record do nothing."""
        self.name = path.name
        self.config = path / "config.json"
        self.environment = path / "environment.json"
        self.metrics = path / "metrics.jsonl"
        self.log = path / "log.txt"
        self.last = path / "checkpoints" / "last.pt"
        self.previous = path / "checkpoints" / "previous.pt"
        self.best = path / "checkpoints" / "best.pt"
        self.model = path / "model.safetensors"
        self.decisions = path / "decisions.json"
        self.curves = path / "curves.png"
        self.sweep = path / "sweep.csv"
        self.evaluations = path / "eval"

    @property
    def has_checkpoint(self) -> bool:
        """Whether an earlier start saved anything, be it whole or damaged."""
        return self.last.is_file() or self.previous.is_file()

    def begin(
        self,
        config: "TrainConfig",
        sources: dict[str, str],
        shards: ShardFolder,
        device: "torch.device",
        precision: str,
        world_size: int = 1,
    ) -> None:
        """Write config.json and environment.json, or check that those of an earlier start fit.

        A start that saved nothing does not count: its files are written anew. Raises CannotResume
        naming what differs from the earlier start's.
        """
        now = {"device_type": device.type, "precision": precision, "world_size": world_size}
        if self.has_checkpoint or self.model.is_file():
            self._check_same(config, shards, now)
        else:
            record = {
                key: {"value": value, "from": sources.get(key, "default")}
                for key, value in config.to_json().items()
            }
            environment = {**now, **_environment(shards, device)}
            publish_text(self.environment, json.dumps(environment, indent=1) + "\n")
            publish_text(self.config, json.dumps(record, indent=1) + "\n")

    def choose(self, values: dict[str, Any], source: str) -> None:
        """Put on record in config.json what options came to after the start, and from what."""
        record = _read_json(self.config)
        record.update({key: {"value": value, "from": source} for key, value in values.items()})
        publish_text(self.config, json.dumps(record, indent=1) + "\n")

    def say(self, line: str) -> None:
        """Print a line and keep it in log.txt."""
        if self.writes:
            click.echo(line)
            _append(self.log, line)

    def record(self, **values: Any) -> None:
        """Append a line to metrics.jsonl."""
        if self.writes:
            _append(self.metrics, json.dumps(values, allow_nan=False))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl; a last one that a kill cut off is left out.

        Raises BadData naming any other line that is damaged.
        """
        if not self.metrics.is_file():
            return []
        records = []
        lines = self.metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                records.append(_parse_object(line))
            except ValueError as error:
                if number < len(lines) or line.endswith("\n"):
                    raise BadData(
                        f"{self.metrics}, line {number} is damaged: {error}; delete that line to go on "
                        "without it"
                    ) from error
        return records

    def forget_after(self, epoch: int, step: int) -> None:
        """Drop the metrics that a killed process wrote after the checkpoint it is resumed from.

        That is of this step, in this epoch, which has not ended.
        """
        if self.writes and self.metrics.is_file():
            kept = [
                line
                for line in self.read_metrics()
                if line["step"] <= step and line["epoch"] < epoch + (line["kind"] != "epoch")
            ]
            publish_text(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))

    def read_config(self) -> dict[str, Any]:
        """Return option -> value as the run was started with; BadData where config.json is damaged."""
        record = _read_json(self.config)
        try:
            return {key: option["value"] for key, option in record.items()}
        except (KeyError, TypeError) as error:
            raise BadData(f"{self.config} cannot be read: an option in it has no value") from error

    def read_environment(self) -> dict[str, Any]:
        """Return environment.json; BadData where it is damaged."""
        return _read_json(self.environment)

    def _check_same(self, config: "TrainConfig", shards: ShardFolder, now: dict[str, Any]) -> None:
        then = self.read_config()
        differing = [
            f"{key} was {then.get(key)}, is now {value}"
            for key, value in config.identity().items()
            if then.get(key) != value
        ]
        environment = self.read_environment()
        for key, value in now.items():
            if environment.get(key) != value:
                differing.append(f"{key} was {environment.get(key)}, is now {value}")
        if environment.get("manifest_sha256") != shards.digest:
            differing.append(f"the shards in {shards.path} are not those it was started on")
        if differing:
            raise CannotResume(
                f"the run {self.name} exists with other settings: {'; '.join(differing)}. "
                "Give another --name, or the same settings to resume it"
            )


def find_run(text: str, runs: Path) -> RunDirectory:
    """Return the run of this name in `runs`, or at this path; UsageError lists the runs there are."""
    for path in (runs / text, Path(text)):
        if (path / "config.json").is_file():
            return RunDirectory(path.resolve() if path.name in ("", ".", "..") else path)
    known = ", ".join(run.name for run in list_runs(runs)) or "none yet; train one with python -m trainer"
    raise click.UsageError(f"no run {text!r} in {runs}; the runs there: {known}")


def list_runs(runs: Path) -> list[RunDirectory]:
    """Return every run in a folder, by name."""
    return [RunDirectory(path.parent) for path in sorted(runs.glob("*/config.json"))]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return _parse_object(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadData(f"{path} cannot be read: {error}") from error


def _parse_object(text: str) -> dict[str, Any]:
    record = json.loads(text)
    if not isinstance(record, dict):
        raise ValueError("no JSON object")
    return record


def _append(path: Path, line: str) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise ResourceMissing(
            f"cannot write {path}: {error.strerror}; make room, and the same command goes on from the last "
            "checkpoint"
        ) from error


def _environment(shards: ShardFolder, device: "torch.device") -> dict[str, Any]:
    import torch

    installed = {dist.metadata["Name"] for dist in metadata.distributions()}
    return {
        "command": " ".join([Path(sys.executable).name, "-m", "trainer", *sys.argv[1:]]),
        "commit": _commit(),
        "manifest_sha256": shards.digest,
        "findings": list(FINDINGS),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or "cpu",
        "cores": available_cores(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: metadata.version(name) for name in _VERSIONS_OF if name in installed},
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }


def _commit() -> str | None:
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return found.stdout.strip() or None
