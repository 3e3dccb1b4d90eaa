"""Repeat, interleave, summarise, record: what every benchmark does the same way."""

import datetime
import json
import platform
import shlex
import statistics
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shards.files import atomic_write_text
from shards.processes import available_cores

RESULTS = Path(__file__).parent / "results"


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


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    versions = ("torch", "torchvision", "nvidia-dali-cuda130", "webdataset", "pillow", "numpy")
    installed = {dist.metadata["Name"].lower() for dist in metadata.distributions()}
    return {
        "cpu": _cpu(),
        "cores": available_cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: metadata.version(name) for name in versions if name in installed},
    }


def write_result(name: str, record: dict[str, Any], path: Path | None = None) -> Path:
    """Write a record as JSON, with the machine and the command; return its path.

    The default is benchmarks/results/NAME_HARDWARE_DATE.json.
    """
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    hardware = "gpu" if torch.cuda.is_available() else f"cpu{available_cores()}"
    path = path or RESULTS / f"{name}_{hardware}_{today}.json"
    module = Path(sys.argv[0]).stem
    command = shlex.join(["python", "-m", f"benchmarks.{module}", *sys.argv[1:]])
    atomic_write_text(path, json.dumps({"command": command, "machine": machine(), **record}, indent=1) + "\n")
    return path


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
