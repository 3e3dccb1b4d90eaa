"""Worker processes that stop, die or find no files: one line that says what it was, and none is left."""

import itertools
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loaders import LoaderSpec, make_loader, processes
from shards.errors import ResourceMissing
from shards.folder import ShardFolder

ROOT = Path(__file__).parents[2]
WITH_PROCESSES = ("dataloader", "webdataset")


@pytest.mark.parametrize("name", WITH_PROCESSES)
def test_a_process_that_does_nothing_any_more_is_named_and_ended(
    name: str, phantom_shards: ShardFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "HANGS", 15.0)  # starting one takes seconds, too
    spec = LoaderSpec(phantom_shards, "train", 8, torch.device("cpu"), training=True, threads=2)
    before = set(multiprocessing.active_children())
    with make_loader(name, spec) as loader:
        batches = iter(loader)
        next(batches)
        mine = set(multiprocessing.active_children()) - before
        for process in mine:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(ResourceMissing, match=rf"of the loader {name} gave nothing for 15 s") as caught:
            list(itertools.chain(batches, loader))  # what was decoded ahead comes first
        assert any(f"process {process.pid} " in caught.value.message for process in mine)
        assert set(multiprocessing.active_children()) == before


@pytest.mark.parametrize("name", WITH_PROCESSES)
def test_too_few_open_files_for_processes_end_with_the_hint(
    name: str, phantom_shards: ShardFolder, tmp_path: Path
) -> None:
    few = (32, 32)
    done = subprocess.run(
        [
            sys.executable, "-m", "trainer", "--shards", str(phantom_shards.path), "--runs", str(tmp_path),
            "--arch", "custom_cnn", "--loader", name, "--batch-size", "8", "--threads", "4", "--epochs", "1",
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, few),
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr
    assert "ulimit -n 4096" in done.stderr.splitlines()[-1]
