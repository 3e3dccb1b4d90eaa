"""What a loader's processes lack or do not do is one line with a way out: files, shared memory, answers."""

import contextlib
import errno
import gc
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

import loaders.worker_pool
from loaders import LoaderSpec, make_loader
from shards.errors import ResourceMissing
from shards.folder import ShardFolder, SplitReader
from tests.trainer.running import TIMEOUT
from tests.trainer.running import command as training

SCRIPT = Path(__file__).with_name("one_epoch.py")
ROOT = Path(__file__).parents[2]
WITH_PROCESSES = ["dataloader", "webdataset"]


def run(*arguments: object, before: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*before, sys.executable, str(SCRIPT), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def errors(done: "subprocess.CompletedProcess[str]") -> str:
    """What a command wrote to stderr, but for progress bars."""
    return "".join(line for line in re.split(r"(?<=[\n\r])", done.stderr) if "img/s" not in line).strip()


def in_tiny_memory(kilobytes: int) -> tuple[str, ...]:
    """Run a command with a /dev/shm of its own, so small; as in a container."""
    mount = f'mount -t tmpfs -o size={kilobytes}k tmpfs /dev/shm && exec "$@"'
    command = ("unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh")
    if not shutil.which("unshare") or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("nobody may mount here: what holds for a small /dev/shm is not tested")
    return command


@pytest.mark.parametrize("files", [20, 28])
@pytest.mark.parametrize("name", WITH_PROCESSES)
def test_a_limit_of_open_files_is_named_with_a_way_out(phantom_shards: ShardFolder, name: str, files: int) -> None:
    done = run(phantom_shards.path, name, "--files", files)
    assert (done.returncode, done.stdout) == (4, "")
    assert re.fullmatch(
        rf"Error: the loader {name} needs \d\d open files with 1 processes, and may have {files}: raise the "
        "limit with ulimit -n 4096, or take fewer --threads",
        errors(done),
    )


def test_a_limit_of_open_files_below_the_number_of_shards_is_named(phantom_shards: ShardFolder) -> None:
    assert len(phantom_shards.manifest.shards_of("train")) > 1 and len(phantom_shards.entries)
    gc.collect()  # else files of tests before may be closed meanwhile
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/dev/fd"))) + 8, hard))
    taken: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        os.close(taken.pop())  # for the first shard
        with pytest.raises(ResourceMissing, match=r"train-00001\.tar cannot be opened: .*ulimit -n 4096$"):
            SplitReader(phantom_shards, "train")
    finally:
        for number in taken:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# The second size has room for what the processes share from the start, not for images.
@pytest.mark.parametrize("kilobytes", [16, 64])
@pytest.mark.parametrize("name", WITH_PROCESSES)
def test_shared_memory_that_is_too_small_is_named_with_a_way_out(
    phantom_shards: ShardFolder, name: str, kilobytes: int
) -> None:
    done = run(phantom_shards.path, name, before=in_tiny_memory(kilobytes))
    assert (done.returncode, done.stdout) == (4, "")
    assert errors(done) == (
        f"Error: the loader {name} has no room left in shared memory (/dev/shm): free some, start the "
        "container with docker run --shm-size 1g, or take fewer --threads or a smaller --batch-size"
    )


@pytest.mark.parametrize("name", WITH_PROCESSES)
def test_a_process_that_hangs_is_named_and_ended(
    phantom_shards: ShardFolder, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    others = set(multiprocessing.active_children())
    spec = LoaderSpec(phantom_shards, "train", 4, torch.device("cpu"), training=True, threads=1)
    with make_loader(name, spec) as loader:
        next(iter(loader))
        (process,) = set(multiprocessing.active_children()) - others
        os.kill(process.pid or 0, signal.SIGSTOP)
        monkeypatch.setattr(loaders.worker_pool, "PATIENCE", 2.0)
        with pytest.raises(ResourceMissing) as caught:
            list(loader)
        assert set(multiprocessing.active_children()) <= others
        assert caught.value.message.startswith(
            f"process {process.pid} of the loader {name} sent nothing for 2 s and was ended: it was stopped"
        )
        monkeypatch.undo()
        assert sum(len(batch.rows) for batch in loader) > 0


def test_what_a_start_that_failed_had_started_is_ended(
    phantom_shards: ShardFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, others = BaseProcess.start, set(multiprocessing.active_children())

    def start_one(process: BaseProcess) -> None:
        if set(multiprocessing.active_children()) - others:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        start(process)

    monkeypatch.setattr(BaseProcess, "start", start_one)
    # The destructor of a DataLoader's iterator stumbles over what its start did not reach.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    spec = LoaderSpec(phantom_shards, "train", 4, torch.device("cpu"), training=True, threads=2)
    with make_loader("dataloader", spec) as loader, pytest.raises(ResourceMissing, match="cannot open another file"):
        list(loader)
    for process in set(multiprocessing.active_children()) - others:
        process.join(TIMEOUT)
    gc.collect()
    assert set(multiprocessing.active_children()) <= others


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_every_process_of_a_run_stops_it_like_one_to_the_run(
    phantom_shards: ShardFolder, tmp_path: Path, number: signal.Signals
) -> None:
    told = training(phantom_shards, tmp_path, "run", epochs=500, loader="dataloader", threads=1)
    with subprocess.Popen(
        told, cwd=ROOT, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as run:
        while not (tmp_path / "run" / "metrics.jsonl").is_file():
            assert run.poll() is None
        os.killpg(run.pid, number)
        said, _ = run.communicate(timeout=TIMEOUT)
    assert run.returncode == 128 + number, said
    assert ", saved; the same command resumes here" in said and "Traceback" not in said
