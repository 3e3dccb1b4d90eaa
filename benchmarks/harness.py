"""What every benchmark does the same way: repeat, interleave, summarise, count what a process uses, record."""

import contextlib
import datetime
import json
import logging
import os
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from shards.files import atomic_write_text
from shards.processes import available_cores

RESULTS = Path(__file__).parent / "results"
_VERSIONS_OF = (
    "torch",
    "torchvision",
    "triton",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "webdataset",
    "pillow",
    "simplejpeg",
    "numpy",
)


def interleave(contenders: dict[str, Callable[[], float]], runs: int) -> dict[str, list[float]]:
    """Call every contender once per round, `runs` rounds; return its figures in order.

    Taking turns spreads a slow moment of the machine over all of them. One round before is
    not counted: it fills the page cache and starts what starts once.
    """
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(runs + 1):
        for name, measure in contenders.items():
            figure = measure()
            print(f"{'warm-up' if number == 0 else f'run {number}':8} {name:18} {figure:10.1f}", file=sys.stderr)
            if number:
                figures[name].append(figure)
    return figures


def summary(figures: list[float]) -> dict[str, Any]:
    """Return the median, its 95 % interval, and the figures themselves.

    The interval is the percentile bootstrap of the median (2,000 resamples, seeded); of a few runs it
    is little narrower than their range.
    """
    resamples = np.random.default_rng(0).choice(figures, (2000, len(figures)))
    low, high = np.percentile(np.median(resamples, axis=1), [2.5, 97.5])
    return {"median": statistics.median(figures), "interval95": [float(low), float(high)], "runs": figures}


def utilisation(real: list[float], ceiling: list[float]) -> float:
    """Return the median over rounds of the rate by that of the ceiling in the same round, 0..1 but for noise.

    Round by round: what slows a moment of the machine down slows both.
    """
    return statistics.median(one / free for one, free in zip(real, ceiling, strict=True))


@contextlib.contextmanager
def trainer_log() -> Iterator[list[str]]:
    """Yield the list of what the trainer logs in this block: a failed torch.compile, for example."""
    logger, handler = logging.getLogger("cxrapid"), _Lines()
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        yield handler.lines
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Usage(NamedTuple):
    """Of a process and of all that descend from it and are alive."""

    cpu_seconds: float
    """User and system time so far, ended children that were waited for included."""
    memory: int
    """Bytes held now besides files: a page that several processes share counts once."""


def usage_of(pid: int) -> Usage:
    """Return the usage of a process tree now, as Linux counts it."""
    fields = {int(path.name): _stat(path) for path in Path("/proc").iterdir() if path.name.isdigit()}
    family, grown = {pid}, True
    while grown:
        children = {child for child, stat in fields.items() if stat and int(stat[1]) in family}
        grown = not children <= family
        family |= children
    # utime, stime, cutime, cstime: fields 14 to 17 of /proc/PID/stat, which begins here with field 3.
    ticks = sum(int(number) for member in family if (stat := fields.get(member)) for number in stat[11:15])
    return Usage(ticks / os.sysconf("SC_CLK_TCK"), sum(memory_of(member) for member in family))


def _stat(process: Path) -> list[str]:
    try:
        # The second field is the command in brackets, which may hold anything.
        return (process / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def memory_of(pid: int) -> int:
    """Return the memory of one process, counted as in Usage; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def peak_memory_of_this_process() -> int:
    """Return the bytes that this process has held at most (VmHWM); ru_maxrss may be those of the one before it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def result_path(name: str, device: str, folder: Path = RESULTS) -> Path:
    """Return FOLDER/NAME_HARDWARE_DATE.json; the hardware is that of the device measured on, gpu or cpuCORES."""
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    hardware = "gpu" if device.startswith("cuda") else f"cpu{available_cores()}"
    return folder / f"{name}_{hardware}_{today}.json"


def write_result(name: str, record: dict[str, Any], path: Path | None = None) -> Path:
    """Write a record as JSON, with the machine and the command; return its path.

    The default is `result_path` for the record's `device`, without one for a CPU.
    """
    path = path or result_path(name, record.get("device", "cpu"))
    command = shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    atomic_write_text(path, json.dumps({"command": command, "machine": _machine(), **record}, indent=1) + "\n")
    return path


def _machine() -> dict[str, Any]:
    installed = {dist.metadata["Name"].lower() for dist in metadata.distributions()}
    return {
        "cpu": _cpu(),
        "cores": available_cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": _driver(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: metadata.version(name) for name in _VERSIONS_OF if name in installed},
    }


def _cpu() -> str:
    return _found_in("/proc/cpuinfo", r"^model name\s*:(.*)") or platform.processor()


def _driver() -> str | None:
    # As in: NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build ..
    return _found_in("/proc/driver/nvidia/version", r"^NVRM version:.*?(\d+(?:\.\d+)+)")


def _found_in(file: str, pattern: str) -> str | None:
    try:
        found = re.search(pattern, Path(file).read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else None
