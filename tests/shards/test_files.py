import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shards.errors import ResourceMissing
from shards.files import atomic_write, atomic_write_text, remove_partials, sha256_of

ROOT = Path(__file__).parents[2]


def test_a_file_appears_whole_in_a_folder_that_is_made_for_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    with atomic_write(path) as partial:
        partial.write_bytes(b"half")
        assert not path.exists()
        partial.write_bytes(b"whole")
    assert path.read_bytes() == b"whole"
    assert os.listdir(path.parent) == ["a.txt"]


def test_text_is_utf_8_with_bare_line_feeds_and_replaces_what_was_there(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "a.txt", "old, and longer")
    atomic_write_text(tmp_path / "a.txt", "é\n")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa9\n"


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()], ids=repr)
def test_an_error_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.txt"
    atomic_write_text(path, "old")

    def fail() -> None:
        with atomic_write(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_is_a_missing_resource_that_names_the_file_and_the_cause(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"

    def write_too_much() -> None:
        with atomic_write(path) as partial:
            partial.write_text("half")
            Path("/dev/full").write_text("more than fits")

    with pytest.raises(ResourceMissing, match=re.escape(f"cannot write {path}: No space left on device")) as error:
        write_too_much()
    assert "make room" in error.value.message
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("under", ["file/a.txt", "file/deep/a.txt", "folder"], ids=["file", "deep", "folder"])
def test_a_place_that_cannot_be_written_is_a_missing_resource(tmp_path: Path, under: str) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder" / "full").mkdir(parents=True)
    with pytest.raises(ResourceMissing, match=r"cannot write .* name another folder") as error:
        atomic_write_text(tmp_path / under, "text")
    assert "make room" not in error.value.message
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_the_hash_is_sha_256_of_the_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000  # more than one block
    (tmp_path / "a").write_bytes(content)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_two_that_publish_one_path_at_once_each_have_a_file_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with atomic_write(path) as first, atomic_write(path) as second:
        first.write_text("first, and longer")
        second.write_text("second")
        assert first.read_text() == "first, and longer"
    assert path.read_text() == "first, and longer" and os.listdir(tmp_path) == ["a.txt"]


def test_a_link_in_the_place_of_the_temporary_file_is_never_written_through(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("kept")
    (tmp_path / ".a.txt.partial").symlink_to(tmp_path / "victim")
    atomic_write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "victim").read_text() == "kept" and (tmp_path / "a.txt").read_text() == "new"


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    code = (
        "import os, sys, signal\n"
        "from pathlib import Path\n"
        "from shards.files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    (tmp_path / "kept.partial").write_text("no temporary file: its name begins with no dot")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.txt")], cwd=ROOT, check=False)
    assert len(list(tmp_path.iterdir())) == 2
    remove_partials(tmp_path)
    assert os.listdir(tmp_path) == ["kept.partial"]


def test_a_published_file_has_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "a.txt", "text")
    (tmp_path / "b.txt").write_text("text")
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "b.txt").stat().st_mode
