"""runs/NAME: what a run was told, on what, what it measured, and the weights it kept."""

import json
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

import click
from msgspec import Meta

from shards.cores import available_cores
from shards.documents import Scalar, convert, parse_json, read_bytes, read_json
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


LARGEST_CONFIG = 2**20
"""Bytes of config.json and environment.json, which have 5 KB."""
_LARGEST_METRICS = 2**30  # bytes; a million steps on record have 300 MB
_TEXTS = {"arch", "shards"}  # of the options, those that are read before the command line is
_Count = Annotated[int, Meta(ge=0, le=2**53)]
_Number = Annotated[float, Meta(ge=-1e100, le=1e100)]  # so that sums and curves of them are finite
_Positive = Annotated[float, Meta(gt=0, le=1e100)]


@dataclass(frozen=True)
class _Option:
    """An option in config.json."""

    value: Scalar


@dataclass(frozen=True)
class _Text(_Option):
    value: str


@dataclass(frozen=True)
class _Line:
    """A line of metrics.jsonl."""

    kind: Literal["step", "epoch", "sweep"]
    epoch: _Count
    step: _Count
    """0: of a sweep, before the first step."""


@dataclass(frozen=True)
class _Step:
    """What a line after the first step has besides."""

    lr: _Number
    train_loss: _Number


@dataclass(frozen=True)
class _Epoch(_Step):
    """What a line at the end of an epoch has."""

    val_loss: _Number
    best: bool
    seconds: _Positive
    data_wait: _Number
    images_per_second: _Number
    val_auroc: _Number | None = None


class Environment(TypedDict, total=False):
    """environment.json: what a run was trained on; files of other versions may lack some."""

    device_type: str
    precision: str
    world_size: int
    command: str
    commit: str | None
    manifest_sha256: str
    findings: list[str]
    device: str
    cores: int
    python: str
    platform: str
    versions: dict[str, str | None]
    cuda: str | None


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
        record = self._read_options()
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

        Each has kind, epoch and step; after the first step also lr, at the end of an epoch its losses,
        times and whether it was the best. Raises BadData naming any other line that is damaged.
        """
        if not self.metrics.is_file():
            return []
        records = []
        lines = read_bytes(self.metrics, _LARGEST_METRICS).splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                records.append(_parse_metrics(line, f"{self.metrics}, line {number}"))
            except BadData as error:
                if number < len(lines) or line.endswith(b"\n"):
                    raise BadData(f"{error.message}; delete that line to go on without it") from error
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
        return {key: option["value"] for key, option in self._read_options().items()}

    def read_environment(self) -> Environment:
        """Return environment.json; BadData where it is damaged."""
        return read_json(self.environment, Environment, largest=LARGEST_CONFIG)

    def _read_options(self) -> dict[str, Any]:
        found = read_json(self.config, dict[str, Any], largest=LARGEST_CONFIG)
        for key, option in found.items():
            convert(option, _Text if key in _TEXTS else _Option, f"{self.config}, {key[:64]}")
        return found

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


def _parse_metrics(line: bytes, name: str) -> dict[str, Any]:
    record = parse_json(line, dict[str, Scalar], name)
    found = convert(record, _Line, name)
    if found.step:
        convert(record, _Epoch if found.kind == "epoch" else _Step, name)
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
