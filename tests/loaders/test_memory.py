"""Memory that processes share under a name, whoever of them ends how."""

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import loaders.memory
from loaders.memory import SharedMemory, remove_stale, shared_bytes, stale_bytes
from shards.errors import ResourceMissing

SIZE = 1000


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(loaders.memory, "_folder", lambda: tmp_path)
    return tmp_path


def sevens(memory: npt.NDArray[np.uint8]) -> None:
    memory[:] = 7


def untouched(memory: npt.NDArray[np.uint8]) -> None:
    raise AssertionError("filled already")


def test_the_first_fills_the_second_finds_and_the_last_removes(folder: Path) -> None:
    first = SharedMemory("images", SIZE, sevens)
    second = SharedMemory("images", SIZE, untouched)
    assert shared_bytes("images") == SIZE + 1
    first.memory[3] = 9
    assert second.memory[3] == 9 and second.memory[4] == 7
    first.close()
    assert shared_bytes("images") == SIZE + 1
    second.close()
    assert shared_bytes("images") == 0


def test_what_was_not_filled_to_its_end_is_filled_by_the_next(folder: Path) -> None:
    def fails(memory: npt.NDArray[np.uint8]) -> None:
        memory[:500] = 1
        raise ValueError("one image does not decode")

    with pytest.raises(ValueError, match="does not decode"):
        SharedMemory("images", SIZE, fails)
    shared = SharedMemory("images", SIZE, sevens)
    assert (shared.memory == 7).all()
    shared.close()


def test_what_belongs_to_the_same_shards_is_spared(folder: Path) -> None:
    for name in ("one-train", "one-val", "other-train"):
        shared = SharedMemory(name, SIZE, sevens)
        os.close(shared._fd)  # as if the process had died
    del shared
    assert stale_bytes("one") == SIZE + 1  # asking removes nothing
    assert shared_bytes("other-train") == SIZE + 1
    remove_stale("one")
    assert [shared_bytes(name) for name in ("one-train", "one-val", "other-train")] == [SIZE + 1, SIZE + 1, 0]


def hold(folder: Path, pipe: Connection) -> None:
    loaders.memory._folder = lambda: folder
    SharedMemory("images", SIZE, sevens)
    pipe.send("held")
    pipe.recv()


@pytest.mark.parametrize("taken_up", [True, False])
def test_what_a_killed_process_left_is_taken_up_or_removed(folder: Path, taken_up: bool) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=hold, args=(folder, there))
    process.start()
    assert here.recv() == "held"
    assert stale_bytes("others") == 0, "still held"
    remove_stale("others")
    assert shared_bytes("images") == SIZE + 1, "still held"
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    if taken_up:
        shared = SharedMemory("images", SIZE, untouched)
        assert (shared.memory == 7).all()
        shared.close()
    remove_stale("others")
    assert shared_bytes("images") == 0


def test_memory_that_is_not_there_is_said() -> None:
    with pytest.raises(ResourceMissing, match=r"no room for 4,611,686,018,427,387,904 bytes .*--loader dali"):
        SharedMemory("images", 1 << 62, sevens)
