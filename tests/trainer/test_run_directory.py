"""The folder of a run: which names it may have, how it is found, what is said where it is read-only."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from shards.errors import ResourceMissing
from shards.folder import ShardFolder
from tests.trainer.running import train
from trainer.run_directory import RunDirectory, find_run, list_runs


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("..", "is no plain name but a path"),
        (".", "is no plain name but a path"),
        ("../elsewhere", "is no plain name but a path"),
        ("a/b", "is no plain name but a path"),
        ("a\\b", "is no plain name but a path"),
        (" ", "is empty"),
        ("\x1b[2J", "has characters that cannot be printed"),
        ("a\x00b", "has characters that cannot be printed"),
        ("a\nb", "has characters that cannot be printed"),
        ("n" * 201, "has 201 bytes, and at most 200 are taken"),
        ("ü" * 101, "has 202 bytes, and at most 200 are taken"),
    ],
)
def test_a_name_that_is_not_one_new_folder_is_refused_by_its_rule(
    phantom_shards: ShardFolder, tmp_path: Path, name: str, rule: str
) -> None:
    (tmp_path / "config.json").write_text("of somebody else")
    done = train(phantom_shards, tmp_path / "runs", name, epochs=1)
    assert (done.exit_code, rule in done.stderr) == (2, True), done.stderr
    assert done.stderr.isprintable() or "\x1b" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "of somebody else"


def test_a_longest_name_of_any_letters_is_taken(phantom_shards: ShardFolder, tmp_path: Path) -> None:
    name = "ü Röntgen".ljust(198, "x")
    assert len(name.encode()) == 200
    done = train(phantom_shards, tmp_path, name, epochs=1)
    assert done.exit_code == 0, done.stderr
    assert find_run(name, tmp_path).state == "finished"


@pytest.fixture
def somebody_elses(tmp_path: Path) -> Path:
    """A folder of runs, in one that has a config.json of its own."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.json").write_text("{}")
    return tmp_path / "runs"


@pytest.mark.parametrize("name", ["..", "", "x" * 300, "a\x00b", "x" * 5000, "\x1b[2J"])
def test_what_is_no_name_of_a_run_finds_none(somebody_elses: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(somebody_elses / "mine" / "..")
    (somebody_elses.parent / "config.json").unlink()
    with pytest.raises(click.UsageError, match="the runs there: mine") as refused:
        find_run(name, somebody_elses)
    assert "\x1b" not in refused.value.message


def test_the_parent_of_the_runs_is_no_run(somebody_elses: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (somebody_elses / "mine" / "empty").mkdir()
    monkeypatch.chdir(somebody_elses / "mine" / "empty")
    # As a path it is what the user stands in; as a name in the folder of the runs it would be their parent.
    assert find_run("..", somebody_elses).path == (somebody_elses / "mine").resolve()


@pytest.mark.parametrize("text", ["mine", "runs/mine", "./runs/mine/"])
def test_a_run_is_found_by_name_and_by_path(somebody_elses: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(somebody_elses.parent)
    assert find_run(text, somebody_elses).path.resolve() == (somebody_elses / "mine").resolve()
    assert find_run(str((somebody_elses / "mine").resolve()), somebody_elses).name == "mine"


def test_a_run_may_lie_on_another_disk_behind_a_link(phantom_shards: ShardFolder, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "linked").symlink_to(tmp_path / "disk")
    done = train(phantom_shards, tmp_path / "runs", "linked", epochs=1)
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "disk" / "model.safetensors").is_file()
    assert [run.state for run in list_runs(tmp_path / "runs")] == ["finished"]


@pytest.mark.parametrize("there", ["file", "dangling link"])
def test_a_name_that_something_else_has_is_refused_and_that_is_left(
    phantom_shards: ShardFolder, tmp_path: Path, there: str
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("kept") if there == "file" else taken.symlink_to(tmp_path / "nowhere")
    done = train(phantom_shards, tmp_path, "taken")
    assert (done.exit_code, done.stderr.count("\n")) == (3 if there == "file" else 4, 1), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_folder_with_another_programs_config_is_refused_and_left(phantom_shards: ShardFolder, tmp_path: Path) -> None:
    theirs = tmp_path / "bert"
    theirs.mkdir()
    (theirs / "config.json").write_text('{"hidden_size": 768}')
    done = train(phantom_shards, tmp_path, "bert", epochs=1)
    assert done.exit_code == 3, done.stderr
    assert "no run's folder" in done.stderr and "--name" in done.stderr
    assert [(path.name, path.read_text()) for path in theirs.iterdir()] == [("config.json", '{"hidden_size": 768}')]


@contextlib.contextmanager
def as_a_user() -> Iterator[None]:
    """Root may write everything, so for this it is nobody."""
    user = os.geteuid()
    if not user:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def log_a_line() -> None:
    logging.getLogger("cxrapid.trainer").info("a line")


def test_a_log_that_may_not_be_written_is_a_matter_of_permission_and_not_of_room(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.log.write_text("")
    run.log.chmod(0o400)
    denied = pytest.raises(ResourceMissing, match=r"log\.txt: Permission denied")
    with run.at_work(keep_on=ResourceMissing), as_a_user(), denied as refused:
        log_a_line()
    assert "--runs" in refused.value.message
    assert "make room" not in refused.value.message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_a_matter_of_room(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.log.symlink_to("/dev/full")
    full = pytest.raises(ResourceMissing, match=r"No space left on device; make room")
    with run.at_work(keep_on=ResourceMissing), full:
        log_a_line()
