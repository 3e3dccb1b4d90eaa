"""Starting `python -m trainer` on phantoms and reading what it wrote, for the tests beside this file."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from shards.folder import ShardFolder
from trainer.__main__ import main
from trainer.step import Step

ROOT = Path(__file__).parents[2]
TIMEOUT = 300


def command(folder: ShardFolder, runs: Path, run: str, **changes: Any) -> list[str]:
    options = {
        "arch": "custom_cnn",
        "shards": folder.path,
        "runs": runs,
        "name": run,
        "batch_size": 8,
        "epochs": 3,
        "patience": 0,
        "lr": 1e-3,
        "log_every": 2,
        **changes,
    }
    pairs = ((f"--{key.replace('_', '-')}", str(value)) for key, value in options.items())
    return [sys.executable, "-m", "trainer", *(text for pair in pairs for text in pair)]


def train(folder: ShardFolder, runs: Path, run: str, **changes: Any) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(main, command(folder, runs, run, **changes)[3:])


def metrics(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def losses(run: Path) -> list[tuple[float, float]]:
    return [(line["train_loss"], line["val_loss"]) for line in metrics(run, "epoch")]


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Have this process get SIGTERM in the middle of a step."""
    apply = Step.optimizer_step

    def interrupted(self: Step, number: int) -> None:
        if number == step:
            terminate()
        apply(self, number)

    monkeypatch.setattr(Step, "optimizer_step", interrupted)


def kill(arguments: list[str], ready: Callable[[], bool], wait: float) -> None:
    """Start the command, and kill -9 it so many seconds after it is `ready`."""
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + TIMEOUT
    while not ready():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(wait)
    process.kill()
    process.communicate()
