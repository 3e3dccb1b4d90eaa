"""Five hundred short epochs: neither memory nor open files grow."""

import os
import subprocess
from pathlib import Path

import pytest

from shards.folder import ShardFolder
from tests.trainer.running import ROOT, command, metrics

EPOCHS = 500


def family(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    found = [pid]
    for one in found:
        for thread in Path(f"/proc/{one}/task").iterdir():
            found += map(int, (thread / "children").read_text().split())
    return found


def anonymous_kib(pid: int) -> int:
    """Return the memory that is a process's own: libraries, which others share, are not counted."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


@pytest.mark.full
@pytest.mark.parametrize("loader", ["dali", "resident"])
def test_five_hundred_epochs_take_no_more_memory_and_files(
    phantom_shards: ShardFolder, tmp_path: Path, loader: str
) -> None:
    start = command(phantom_shards, tmp_path, "long", epochs=EPOCHS, batch_size=16, loader=loader)
    kib: dict[int, int] = {}
    files: dict[int, int] = {}
    with subprocess.Popen(start, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:  # one an epoch, printed before its checkpoint is saved
            if line.startswith("epoch "):
                epoch = int(line.split()[1].rstrip(":"))
                processes = family(run.pid)
                kib[epoch] = sum(map(anonymous_kib, processes))
                files[epoch] = sum(len(os.listdir(f"/proc/{one}/fd")) for one in processes)
    assert run.returncode == 0
    assert len(metrics(tmp_path / "long", "epoch")) == EPOCHS
    early, late = (sorted(kib[epoch] for epoch in range(21, 41)), sorted(kib[epoch] for epoch in range(481, 501)))
    print(f"{loader}: MiB {early[10] / 1024:.0f} after 20 epochs, {late[10] / 1024:.0f} at the end")
    assert late[10] == pytest.approx(early[10], rel=0.05)
    assert sorted(files[epoch] for epoch in range(21, 41))[10] == sorted(files[e] for e in range(481, 501))[10]
