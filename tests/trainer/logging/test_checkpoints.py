"""Checkpoints that are whole or refused."""

import contextlib
from pathlib import Path

import pytest
import torch

from shards.errors import CannotResume, ResourceMissing
from tests.trainer.running import logged
from trainer.logging.checkpoints import load_checkpoint, load_newest, save_checkpoint


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
    with logged() as lines:
        assert load_newest(paths)["epoch"] == expected
    assert bool(lines) == (last is None)
    assert load_checkpoint(paths[1])["epoch"] == previous
