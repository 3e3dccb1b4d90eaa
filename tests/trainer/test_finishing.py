"""A run that finishes keeps its model and its last checkpoint, whatever moment it is killed at."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shards.folder import ShardFolder
from tests.trainer.running import ROOT, TIMEOUT, command, losses, train
from trainer.logging.checkpoints import load_checkpoint

KEPT = ["last.pt", "last.pt.sha256"]

# Python names each file to its audit hooks before it renames or removes it.
PROGRAM = """
import os, signal, sys
from pathlib import Path
from trainer.__main__ import main

def hook(event, arguments):
    if event in ("os.rename", "os.remove"):
        if Path(os.fsdecode(arguments[event == "os.rename"])).name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
main(sys.argv[2:])
"""


def kill_before(name: str, folder: ShardFolder, run: Path) -> None:
    """Train until the file of this name is to get its name, or to be removed; kill -9 then."""
    told = command(folder, run.parent, run.name, epochs=2)[3:]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, name, *told], cwd=ROOT, timeout=TIMEOUT, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def undisturbed(phantom_shards: ShardFolder, runs: Path) -> Path:
    done = train(phantom_shards, runs, "undisturbed", epochs=2)
    assert done.exit_code == 0, done.stderr
    return runs / "undisturbed"


@pytest.fixture(scope="module")
def trained(phantom_shards: ShardFolder, runs: Path) -> Path:
    """A run killed when all its epochs were saved and its model had not its name yet."""
    kill_before("model.safetensors", phantom_shards, runs / "trained")
    assert not (runs / "trained" / "model.safetensors").exists()
    assert {"best.pt", "last.pt", "previous.pt"} <= set(checkpoints(runs / "trained"))
    return runs / "trained"


def test_a_finished_run_keeps_its_last_checkpoint_only(undisturbed: Path) -> None:
    assert checkpoints(undisturbed) == KEPT
    assert load_checkpoint(undisturbed / "checkpoints" / "last.pt")["progress"]["epoch"] == 3


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "best.pt",
        pytest.param("best.pt.sha256", marks=pytest.mark.full),
        "previous.pt",
        pytest.param("previous.pt.sha256", marks=pytest.mark.full),
    ],
)
def test_a_kill_at_any_moment_of_finishing_leaves_what_the_same_command_finishes(
    undisturbed: Path, trained: Path, phantom_shards: ShardFolder, runs: Path, name: str
) -> None:
    run = runs / f"killed-before-{name}"
    shutil.copytree(trained, run)
    kill_before(name, phantom_shards, run)
    done = train(phantom_shards, runs, run.name, epochs=2)
    assert done.exit_code == 0, done.stderr
    assert checkpoints(run) == KEPT
    assert losses(run) == losses(undisturbed)
    assert (run / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert not list(run.rglob("*.partial"))
    again = train(phantom_shards, runs, run.name, epochs=2)
    assert (again.exit_code, "has finished already" in again.stdout) == (0, True)


def test_a_finished_run_that_lost_its_model_says_so_and_what_to_do(
    trained: Path, phantom_shards: ShardFolder, runs: Path
) -> None:
    run = runs / "lost"
    shutil.copytree(trained, run)
    assert train(phantom_shards, runs, "lost", epochs=2).exit_code == 0
    (run / "model.safetensors").unlink()
    refused = train(phantom_shards, runs, "lost", epochs=2)
    assert refused.exit_code == 5
    assert "best.pt" in refused.stderr and "to start this run anew" in refused.stderr
