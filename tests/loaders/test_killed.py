"""Every loader, killed with kill -9 in the middle of an epoch, goes on to the same bits."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from shards.folder import ShardFolder
from tests.loaders.stepwise import EPOCHS
from tests.ranks import start_ranks

SCRIPT = Path(__file__).with_name("stepwise.py")
LOADERS = ["dali", "resident", "dataloader", "webdataset"]
IN_COMMON_ORDER = LOADERS[:-1]
TIMEOUT = 300


def start(shards: ShardFolder, out: Path, ranks: int) -> "subprocess.Popen[str]":
    out.mkdir(exist_ok=True)
    return start_ranks([str(SCRIPT), str(shards.path), str(out), *LOADERS], ranks)


def finished(process: "subprocess.Popen[str]", out: Path, ranks: int) -> list[dict[str, Any]]:
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors
    return [json.loads((out / f"rank{rank}.json").read_text())["seen"] for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_goes_on_to_the_same_bits(phantom_shards: ShardFolder, tmp_path: Path, ranks: int) -> None:
    whole = finished(start(phantom_shards, tmp_path / "whole", ranks), tmp_path / "whole", ranks)
    killed = start(phantom_shards, tmp_path / "killed", ranks)
    assert killed.stdout is not None
    batches = len(whole[0]["dali"])
    for line in killed.stdout:
        if line == f"rank 0 batch {batches // EPOCHS + 2}\n":  # early in the second epoch
            break
    for pid in (tmp_path / "killed").glob("*.pid"):  # torchrun's ranks have sessions of their own
        os.kill(int(pid.read_text()), signal.SIGKILL)
    killed.kill()
    killed.communicate(timeout=TIMEOUT)
    done = len(json.loads((tmp_path / "killed" / "rank0.json").read_text())["seen"]["dali"])
    assert batches // EPOCHS < done < batches
    assert finished(start(phantom_shards, tmp_path / "killed", ranks), tmp_path / "killed", ranks) == whole

    rows = phantom_shards.rows("train").tolist()
    for name in LOADERS:
        for epoch in range(EPOCHS):
            size = len(rows) // ranks
            seen = []
            for rank in whole:
                half = len(rank[name]) // EPOCHS
                batches_of_epoch = rank[name][epoch * half : (epoch + 1) * half]
                mine = [row for batch, _ in batches_of_epoch for row in batch]
                assert size <= len(mine) <= size + 1
                seen += mine
            assert sorted(seen) == rows
    for rank in whole:  # the same samples, flipped and distorted alike, in the same batches
        assert rank["resident"] == rank["dali"]
        for name in IN_COMMON_ORDER:
            assert [batch for batch, _ in rank[name]] == [batch for batch, _ in rank["dali"]]
