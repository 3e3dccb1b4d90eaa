"""runs/NAME: the files of a run, its lock, its log, and the checks on resume."""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click
from msgspec import Meta

from shards.console import echo, printable
from shards.documents import Scalar, convert, parse_json, read_bytes, read_json
from shards.errors import BadData, CannotResume, ResourceMissing
from shards.files import atomic_write_text, exclusive_lock, hash_file, remove_partials
from shards.folder import ShardFolder
from trainer.environment import Environment, describe_environment

if TYPE_CHECKING:  # what is written here can be read where torch is not wanted
    import torch

    from trainer.options import TrainConfig

# Bytes. File systems take 255, and files made of a run may be named after it with something around.
_LONGEST_NAME = 200
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
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
class _Text:
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
    """Further fields of a line after the first step."""

    lr: _Number
    train_loss: _Number


@dataclass(frozen=True)
class _Epoch(_Step):
    """Further fields of a line at the end of an epoch."""

    val_loss: _Number
    best: bool
    seconds: _Positive
    data_wait: _Number
    images_per_second: _Number
    val_auroc: _Number | None = None


class _RunLog(logging.Handler):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        echo(line)
        _append(self._path, printable(line))


@contextlib.contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Send what the logger cxrapid gets from INFO on to the console and to this file."""
    logger, handler = logging.getLogger("cxrapid"), _RunLog(path)
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


class RunDirectory:
    """The files of one run; every path of it is named here and nowhere else."""

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path
        self.writes = writes
        """Whether this process writes here; for others the methods that write do nothing."""
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
        self.features = path / "features"
        """Features of a frozen part, until the run has finished."""
        self._made: set[Path] = set()

    @property
    def state(self) -> str:
        """`finished`, `unfinished`, or `nothing saved`: killed early, so the next start begins anew."""
        if self.model.is_file():
            return "finished"
        return "unfinished" if self.has_checkpoint else "nothing saved"

    @property
    def has_checkpoint(self) -> bool:
        """Whether an earlier start saved a checkpoint, intact or damaged."""
        return self.last.is_file() or self.previous.is_file()

    @contextlib.contextmanager
    def at_work(self, *, keep_on: type[BaseException]) -> Iterator[None]:
        """Lock the run, log to it, and remove what killed commands left half written.

        A start that fails before its first checkpoint leaves nothing that looks like a run: the files it made are
        removed, and the folder if it made that and nothing else is in it. Features of a frozen part stay for the next
        start. If the exception is a `keep_on`, nothing is removed.
        """
        is_new = not self.path.exists()
        with exclusive_lock(self.path), _logging_to(self.log):
            # What training writes before, or with, its first checkpoint.
            files = [self.config, self.environment, self.metrics, self.log, self.curves, self.sweep, self.best]
            files += [hash_file(self.best), hash_file(self.last)]
            self._made = {path for path in files if not os.path.lexists(path)}
            for folder in (self.path, self.last.parent, self.features, *self.evaluations.rglob("")):
                remove_partials(folder)
            try:
                yield
            except BaseException as error:
                if self.state == "nothing saved" and not isinstance(error, keep_on):
                    self._remove_start(is_new)
                raise

    def _remove_start(self, is_new: bool) -> None:
        for path in self._made:
            with contextlib.suppress(OSError):
                path.unlink()
        for folder in (self.last.parent, self.features, *([self.path] if is_new else [])):
            with contextlib.suppress(OSError):  # something else is in it
                folder.rmdir()

    def keep_one_checkpoint(self) -> None:
        """Remove what only an unfinished run needs: all checkpoints but the last, and features."""
        if self.writes:
            for path in (self.best, self.previous):
                path.unlink(missing_ok=True)
                hash_file(path).unlink(missing_ok=True)
            shutil.rmtree(self.features, ignore_errors=True)

    def begin(
        self,
        config: "TrainConfig",
        sources: dict[str, str],
        shards: ShardFolder,
        device: "torch.device",
        precision: str,
        world_size: int,
    ) -> None:
        """Write config.json and environment.json, or check that those of an earlier start fit.

        A start that saved nothing does not count: its files are written anew. Raises CannotResume naming what differs
        from the earlier start's, BadData where the folder holds another program's config.json.
        """
        now = {"device_type": device.type, "precision": precision, "world_size": world_size}
        if self.state != "nothing saved":
            self._check_same(config, shards, now)
            return
        if self.config.is_file():
            try:
                self.read_config()
            except BadData as error:
                raise BadData(
                    f"{self.path} is no run's folder, and its config.json would be overwritten: {error.message}; "
                    "give another --name"
                ) from error
        self._made |= {self.config, self.environment}
        record = {key: {"value": value, "from": sources[key]} for key, value in config.to_json().items()}
        _write_json(self.environment, {**now, **describe_environment(shards, device)})
        _write_json(self.config, record)

    def update_config(self, values: dict[str, Any], source: str) -> None:
        """Write to config.json what options came to after the start, and from what."""
        record = self._read_options()
        record.update({key: {"value": value, "from": source} for key, value in values.items()})
        _write_json(self.config, record)

    def log_metrics(self, **values: Any) -> None:
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

    def truncate_metrics(self, epoch: int, step: int) -> None:
        """Drop the metrics that a killed process wrote after this step, in this unfinished epoch."""
        if self.writes and self.metrics.is_file():
            lines = [
                line
                for line in self.read_metrics()
                if line["step"] <= step and line["epoch"] < epoch + (line["kind"] != "epoch")
            ]
            atomic_write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in lines))

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
        # An option that is newer than the run counts as its default.
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        then, environment = {**defaults, **self.read_config()}, self.read_environment()
        differing = [
            f"{key} was {before.get(key)}, is now {value}"
            for before, after in ((then, config.identity()), (environment, now))
            for key, value in after.items()
            if before.get(key) != value
        ]
        if environment.get("manifest_sha256") != shards.digest:
            differing.append(f"the shards in {shards.path} are not those it was started on")
        if differing:
            raise CannotResume(
                f"the run {self.name} exists with other settings: {'; '.join(differing)}. "
                "Give another --name, or the same settings to resume it"
            )


def find_run(text: str, runs: Path) -> RunDirectory:
    """Return the run of this name in `runs`, or at this path; UsageError lists the runs there are."""
    paths = [Path(text)] if what_is_wrong_with(text) else [runs / text, Path(text)]
    for path in paths:
        with contextlib.suppress(OSError, ValueError):  # too long for the file system, or with a NUL in it
            if (path / "config.json").is_file():
                return RunDirectory(path.resolve() if path.name in ("", ".", "..") else path)
    known = ", ".join(run.name for run in list_runs(runs)) or "none yet; train one with python -m trainer"
    raise click.UsageError(f"no run {text!r} in {runs}; the runs there: {known}")


def require_plain_name(name: str) -> None:
    """Raise UsageError unless a run of this name is one folder in that of the runs."""
    if problem := what_is_wrong_with(name):
        raise click.UsageError(f"--name {name!r} {problem}; it names one folder in that of --runs")


def what_is_wrong_with(name: str) -> str:
    """Return why a run cannot have this name; empty if it can."""
    if not name.strip():
        return "is empty"
    if name in (".", "..") or "/" in name or "\\" in name:
        return "is no plain name but a path"
    if not name.isprintable():
        return "has characters that cannot be printed"
    length = len(name.encode())
    return f"has {length} bytes, and at most {_LONGEST_NAME} are taken" if length > _LONGEST_NAME else ""


def list_runs(runs: Path) -> list[RunDirectory]:
    """Return every run in a folder, by name."""
    return [RunDirectory(path.parent) for path in sorted(runs.glob("*/config.json"))]


def _parse_metrics(line: bytes, name: str) -> dict[str, Any]:
    record = parse_json(line, dict[str, Scalar], name)
    found = convert(record, _Line, name)
    if found.step:
        convert(record, _Epoch if found.kind == "epoch" else _Step, name)
    return record


def _write_json(path: Path, record: dict[str, Any]) -> None:
    atomic_write_text(path, json.dumps(record, indent=1) + "\n")


def _append(path: Path, line: str) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        advice = (
            "make room, and the same command resumes from the last checkpoint"
            if error.errno in _NO_ROOM
            else "let this user write there, or give another --runs"
        )
        raise ResourceMissing(f"cannot write {path}: {error.strerror}; {advice}") from error
