"""Checkpoints that are whole or refused."""

import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import trainer_log
from shards.errors import CannotResume, ResourceMissing
from shards.files import hash_file, sha256_of
from trainer.logging import checkpoints
from trainer.logging.checkpoints import CheckpointSaver, load_checkpoint, load_newest, save_checkpoint
from trainer.run_directory import RunDirectory


def test_a_checkpoint_comes_back_with_the_same_bits(tmp_path: Path) -> None:
    state = {"weights": torch.randn(5), "epoch": 3, "rng": torch.get_rng_state()}
    save_checkpoint(tmp_path / "last.pt", state)
    found = load_checkpoint(tmp_path / "last.pt")
    assert found["epoch"] == 3
    assert torch.equal(found["weights"], state["weights"])
    assert torch.equal(found["rng"], state["rng"])


def test_a_changed_byte_or_a_missing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    with pytest.raises(CannotResume, match=r"no checkpoint .*last\.pt"):
        load_checkpoint(path)
    save_checkpoint(path, {"weights": torch.zeros(100)})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CannotResume, match=r"last\.pt is damaged"):
        load_checkpoint(path)


def test_a_kill_between_the_hash_and_the_checkpoint_leaves_the_old_one_readable(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 1})
    old = path.read_bytes()
    save_checkpoint(path, {"epoch": 2})
    path.write_bytes(old)  # what the disk holds when the rename did not happen
    assert load_checkpoint(path)["epoch"] == 1


def test_kills_in_two_saves_in_a_row_leave_the_checkpoint_readable(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 1})
    for epoch in (2, 3):
        old = path.read_bytes()
        save_checkpoint(path, {"epoch": epoch})
        path.write_bytes(old)  # what the disk holds when the rename did not happen
    assert load_checkpoint(path)["epoch"] == 1


def test_a_full_disk_is_a_missing_resource(tmp_path: Path, no_room: contextlib.AbstractContextManager[None]) -> None:
    with no_room, pytest.raises(ResourceMissing, match=r"cannot write .*last\.pt"):
        save_checkpoint(tmp_path / "last.pt", {"weights": torch.zeros(1000)})


def test_a_failed_save_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 1})
    blocked = tmp_path / "file" / "last.pt"
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ResourceMissing, match=r"cannot write .*last\.pt"):
        save_checkpoint(blocked, {"epoch": 2})
    assert load_checkpoint(path)["epoch"] == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "last.pt", "last.pt.sha256"]


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"path": Path("anything but a tensor or a plain value")})
    with pytest.raises(CannotResume, match="cannot be read"):
        load_checkpoint(path)


def test_the_one_before_is_kept_under_its_own_name(tmp_path: Path) -> None:
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    for epoch in (1, 2, 3):
        save_checkpoint(last, {"epoch": epoch}, keep_as=previous)
    assert (load_checkpoint(last)["epoch"], load_checkpoint(previous)["epoch"]) == (3, 2)


@pytest.mark.parametrize(
    ("last", "previous", "expected"),
    # What the disk holds after a kill in the third save: (last, previous) with the third's hash files.
    [(2, 1, 2), (None, 2, 2), (3, 2, 3)],
)
def test_a_kill_anywhere_in_a_save_leaves_the_newest_whole_one_readable(
    tmp_path: Path, last: int | None, previous: int, expected: int
) -> None:
    paths = [tmp_path / "last.pt", tmp_path / "previous.pt"]
    contents = {}
    for epoch in (1, 2, 3):
        save_checkpoint(paths[0], {"epoch": epoch}, keep_as=paths[1])
        contents[epoch] = paths[0].read_bytes()
    for path, epoch in zip(paths, (last, previous), strict=True):
        path.unlink() if epoch is None else path.write_bytes(contents[epoch])
    with trainer_log() as lines:
        assert load_newest(paths)["epoch"] == expected
    assert bool(lines) == (last is None)
    assert load_checkpoint(paths[1])["epoch"] == previous


def some_state(value: float = 1.0) -> dict[str, Any]:
    return {
        "model": {"w": torch.full((3,), value)},
        "average": {},
        "optimizer": {"state": {}},
        "step": 1,
        "rngs": [(2,)],
    }


@pytest.fixture
def saver(tmp_path: Path) -> CheckpointSaver:
    return CheckpointSaver(RunDirectory(tmp_path), torch.device("cpu"))


def test_a_save_holds_the_state_as_it_was_however_training_goes_on(
    saver: CheckpointSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, write = threading.Event(), checkpoints.save_checkpoint

    def late(*arguments: Any, **options: Any) -> None:
        assert go_on.wait(60)
        write(*arguments, **options)

    monkeypatch.setattr(checkpoints, "save_checkpoint", late)
    run, state = RunDirectory(tmp_path), some_state()
    with saver:
        saver.save(state, {"epoch": 7}, RuntimeError())
        state["model"]["w"].zero_()
        assert not run.last.exists()
        go_on.set()
        saver.save(some_state(2.0), None, RuntimeError())  # waits for the first
        assert load_checkpoint(run.last)["model"]["w"].tolist() == [1, 1, 1]
    assert load_checkpoint(run.best) == {"epoch": 7}
    found = load_checkpoint(run.last)
    assert found["model"]["w"].tolist() == [2, 2, 2]
    assert (found["step"], found["rngs"]) == (1, [(2,)])
    assert load_checkpoint(run.previous)["model"]["w"].tolist() == [1, 1, 1]


def test_hashes_are_those_of_the_files_without_reading_them(
    saver: CheckpointSaver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path)
    read: list[Path] = []
    monkeypatch.setattr("shards.files.sha256_of", read.append)
    with saver:
        for value in (1, 2, 3):
            saver.save(some_state(float(value)), None, RuntimeError())
    assert not read
    assert hash_file(run.last).read_text().split() == [sha256_of(run.last), sha256_of(run.previous)]


def test_a_weight_that_is_not_finite_is_never_saved(saver: CheckpointSaver, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    saver.save(some_state(), None, RuntimeError())
    saver.save(some_state(torch.nan), {"epoch": 1}, RuntimeError("a weight"))
    with pytest.raises(RuntimeError, match="a weight"):
        saver.join()
    assert load_checkpoint(run.last)["model"]["w"].tolist() == [1, 1, 1]
    assert not run.best.exists() and not run.previous.exists()


def test_a_save_that_fails_is_raised_at_the_next_one_and_the_one_before_stands(
    saver: CheckpointSaver, tmp_path: Path, no_room: contextlib.AbstractContextManager[None]
) -> None:
    run = RunDirectory(tmp_path)
    saver.save(some_state(), None, RuntimeError())
    saver.join()
    with no_room:
        saver.save(some_state(2.0), None, RuntimeError())
        with pytest.raises(ResourceMissing, match=r"cannot write .*last\.pt"):
            saver.save(some_state(3.0), None, RuntimeError())
    assert load_checkpoint(run.last)["model"]["w"].tolist() == [1, 1, 1]
