import hashlib
import os
import re
from pathlib import Path

import pytest

from shards.errors import ResourceMissing
from shards.publishing import publish, publish_text, sha256_of


def test_a_file_appears_whole_in_a_folder_that_is_made_for_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    with publish(path) as partial:
        partial.write_bytes(b"half")
        assert not path.exists()
        partial.write_bytes(b"whole")
    assert path.read_bytes() == b"whole"
    assert os.listdir(path.parent) == ["a.txt"]


def test_text_is_utf_8_with_bare_line_feeds_and_replaces_what_was_there(tmp_path: Path) -> None:
    publish_text(tmp_path / "a.txt", "old, and longer")
    publish_text(tmp_path / "a.txt", "é\n")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa9\n"


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()], ids=repr)
def test_an_error_keeps_the_old_file_and_leaves_nothing_beside_it(
    tmp_path: Path, error: BaseException
) -> None:
    path = tmp_path / "a.txt"
    publish_text(path, "old")

    def fail() -> None:
        with publish(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_is_a_missing_resource_that_names_the_file_and_the_cause(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"

    def write_too_much() -> None:
        with publish(path) as partial:
            partial.write_text("half")
            Path("/dev/full").write_text("more than fits")

    with pytest.raises(
        ResourceMissing, match=re.escape(f"cannot write {path}: No space left on device")
    ) as error:
        write_too_much()
    assert "make room" in error.value.message
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("under", ["file/a.txt", "file/deep/a.txt", "folder"], ids=["file", "deep", "folder"])
def test_a_place_that_cannot_be_written_is_a_missing_resource(tmp_path: Path, under: str) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder" / "full").mkdir(parents=True)
    with pytest.raises(ResourceMissing, match=r"cannot write .* name another folder") as error:
        publish_text(tmp_path / under, "text")
    assert "make room" not in error.value.message
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_the_hash_is_sha_256_of_the_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000  # more than one block
    (tmp_path / "a").write_bytes(content)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()
