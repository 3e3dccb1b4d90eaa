"""Killed, stopped, out of room, changed or damaged in between: what the same command then does."""

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shards.errors import BadData, CannotResume
from shards.files import exclusive_lock
from shards.folder import open_shards
from shards.manifest import Manifest
from shards.packing import pack
from shards.packing.planning import SplitRecipe, make_plan
from shards.pixels import PixelRecipe

ROOT = Path(__file__).parents[2]
TIMEOUT = 300
MakeTree = Callable[..., Path]
Png = Callable[..., bytes]
NAMES = [f"{1 + n // 2:08d}_{n % 2:03d}.png" for n in range(36)]
BAD = {"00000001_000.png": b"", "00000004_001.png": b"no image", "00000009_001.png": b"\x89PNG\r\n\x1a\n"}


def packed_into(out: Path, tree: Path, **options: int) -> Manifest:
    plan = make_plan(tree, SplitRecipe(val_fraction=0.3))
    return pack(plan, out, PixelRecipe(size=16), **{"shard_size": 4, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def state(folder: Path) -> dict[str, tuple[int, int]]:
    found = ((path, path.stat()) for path in (folder, *folder.rglob("*")))
    return {path.name: (stat.st_mtime_ns, stat.st_ino) for path, stat in found}


def place_of(tree: Path, name: str) -> Path:
    (path,) = tree.glob(f"images_*/images/{name}")
    return path


def interrupted(out: Path, tree: Path) -> None:
    """Leave `out` as a kill before the last shard leaves it."""
    last = place_of(tree, "00000009_001.png")  # of the last shard
    good = last.read_bytes()
    last.write_bytes(b"")
    with pytest.raises(BadData):
        packed_into(out, tree)
    last.write_bytes(good)


def test_after_mending_the_rejects_the_same_command_ends_at_the_same_bytes(
    make_tree: MakeTree, tmp_path: Path, packed: Path
) -> None:
    tree, good = make_tree(replace=BAD), make_tree()
    with pytest.raises(BadData):
        packed_into(tmp_path / "out", tree)
    for path in good.rglob("*.png"):
        shutil.copy(path, tree / path.relative_to(good))
    packed_into(tmp_path / "out", tree)
    assert contents(tmp_path / "out") == contents(packed)


def test_finished_shards_are_kept_when_packing_goes_on(make_tree: MakeTree, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(BadData):
        packed_into(out, make_tree(replace={"00000003_000.png": b""}))
    before = {path.name: path.stat().st_ino for path in out.glob("*.tar")}
    packed_into(out, make_tree())
    rewritten = [name for name, inode in before.items() if (out / name).stat().st_ino != inode]
    assert rewritten == ["test-00000.tar"]


def make_shards(tree: Path, out: Path, jobs: int, **popen: object) -> "subprocess.Popen[str]":
    options = ["--size", "16", "--shard-size", "2", "--jobs", str(jobs)]
    return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
        [sys.executable, ROOT / "scripts" / "make_shards.py", tree, out, *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **popen,
    )


@pytest.fixture
def slow_tree(make_tree: MakeTree, png: Png) -> Path:
    """36 images of which each takes about 20 ms."""
    noise = png(np.random.default_rng(0).integers(0, 256, (1000, 1000), dtype=np.uint8))
    return make_tree(18, replace=dict.fromkeys(NAMES, noise))


@pytest.fixture
def undisturbed(slow_tree: Path, tmp_path: Path) -> dict[str, bytes]:
    """What packing `slow_tree` in one go gives."""
    pack(make_plan(slow_tree, SplitRecipe()), tmp_path / "undisturbed", PixelRecipe(16), shard_size=2, jobs=2)
    return contents(tmp_path / "undisturbed")


def stop_somewhere(process: "subprocess.Popen[str]", out: Path, number: int, finished: int) -> str:
    """Send a signal once so many shards are finished; return what was said on stderr."""
    while len(list((out / ".packing").glob("*-*.json"))) < finished:
        assert process.poll() is None, process.communicate()[1]
    process.send_signal(number)
    return process.communicate(timeout=TIMEOUT)[1]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.full)])
def test_killed_at_any_moment_no_short_file_stands_and_the_same_command_ends_at_the_same_bytes(
    slow_tree: Path, undisturbed: dict[str, bytes], tmp_path: Path, kills: int
) -> None:
    draw = random.Random(kills)
    for kill in range(kills):
        out, jobs = tmp_path / f"out{kill}", 1 + kill % 2
        process = make_shards(slow_tree, out, jobs)
        # Spread over the whole run, the start and the end included, and in between at any instruction.
        stop_somewhere(process, out, signal.SIGKILL, kill * 18 // kills)
        assert process.returncode == -signal.SIGKILL
        whole = {name: data for name, data in contents(out).items() if not name.startswith(".")}
        assert whole.items() <= undisturbed.items()
        if draw.random() < 0.5:  # and again, while it resumes
            again = make_shards(slow_tree, out, jobs)
            with contextlib.suppress(subprocess.TimeoutExpired):
                again.communicate(timeout=draw.uniform(0.3, 1.5))
            again.kill()
            again.communicate()
        _, errors = make_shards(slow_tree, out, jobs).communicate(timeout=TIMEOUT)
        assert contents(out) == undisturbed, errors


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM")])
def test_stopped_by_a_signal_it_says_so_in_one_line_and_the_same_command_goes_on(
    slow_tree: Path, undisturbed: dict[str, bytes], tmp_path: Path, number: int, name: str
) -> None:
    out = tmp_path / "out"
    process = make_shards(slow_tree, out, jobs=2)
    errors = stop_somewhere(process, out, number, finished=3)
    assert process.returncode == 128 + number
    assert (
        errors.splitlines()[-1] == f"stopped by {name}; packed shards are kept; run the same command again to continue"
    )
    assert "Traceback" not in errors and not list(out.glob(".*.partial"))
    receipts = list((out / ".packing").glob("*-*.json"))  # a tar without one is written again
    kept = {f"{path.stem}.tar": (out / f"{path.stem}.tar").stat().st_ino for path in receipts}
    make_shards(slow_tree, out, jobs=1).communicate(timeout=TIMEOUT)
    assert contents(out) == undisturbed
    assert kept and all((out / tar).stat().st_ino == inode for tar, inode in kept.items())


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_disk_that_fills_up_is_exit_4_without_a_short_file_and_with_room_again_all_is_finished(
    make_tree: MakeTree, tmp_path: Path, jobs: int
) -> None:
    tree, out = make_tree(), tmp_path / "out"

    def allow_no_tar() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))  # a tar has 10,240 bytes or more

    process = make_shards(tree, out, jobs, preexec_fn=allow_no_tar)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 4, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith(f"Error: cannot write {out}/") and "File too large" in errors
    assert not [name for name in contents(out) if name.endswith((".tar", ".idx", ".partial"))]
    _, errors = make_shards(tree, out, jobs).communicate(timeout=TIMEOUT)
    assert len(open_shards(out).entries) == 18, errors


@pytest.mark.parametrize("when", ["new", "interrupted", "finished"])
def test_two_commands_do_not_pack_into_one_folder(make_tree: MakeTree, tmp_path: Path, when: str) -> None:
    tree, out = make_tree(), tmp_path / "out"
    if when == "new":
        out.mkdir()
    else:
        packed_into(out, tree) if when == "finished" else interrupted(out, tree)
    before = state(out)
    with exclusive_lock(out):
        process = make_shards(tree, out, jobs=1)
        _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 4
    assert errors == f"Error: another command is at work in {out}; wait for it, or give another folder\n"
    assert state(out) == before


def brighter(path: Path, png: Png) -> None:
    stat = path.stat()
    path.write_bytes(png(np.full((24, 24), 200, np.uint8)))
    # Times set back, as by unpacking an archive over it.
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("when", ["finished", "interrupted"])
def test_an_image_that_changed_after_it_was_packed_is_named(
    make_tree: MakeTree, tmp_path: Path, png: Png, when: str
) -> None:
    tree, out = make_tree(), tmp_path / "out"
    packed_into(out, tree) if when == "finished" else interrupted(out, tree)
    changed = place_of(tree, "00000001_000.png")
    good = changed.read_bytes()
    brighter(changed, png)
    before = state(out)
    with pytest.raises(CannotResume, match=f"{changed} is not the file that was packed"):
        packed_into(out, tree)
    assert state(out) == before
    changed.write_bytes(good)
    packed_into(out, tree)
    assert len(open_shards(out).entries) == 18


@pytest.mark.parametrize("when", ["finished", "interrupted"])
def test_other_metadata_is_named(make_tree: MakeTree, tmp_path: Path, when: str) -> None:
    tree, out = make_tree(), tmp_path / "out"
    packed_into(out, tree) if when == "finished" else interrupted(out, tree)
    csv = tree / "Data_Entry_2017_v2020.csv"
    csv.write_text(csv.read_text().replace("Mass", "Nodule"))
    with pytest.raises(CannotResume, match=r"metadata CSV was .*, is now "):
        packed_into(out, tree)


@pytest.mark.parametrize("when", ["finished", "interrupted"])
def test_another_set_of_images_is_named_though_it_is_as_large(make_tree: MakeTree, tmp_path: Path, when: str) -> None:
    tree, out = make_tree(), tmp_path / "out"
    away, back = place_of(tree, "00000002_001.png"), place_of(tree, "00000001_001.png")
    kept = back.read_bytes()
    back.unlink()
    options = {"allow_missing": True}
    recipe = SplitRecipe(val_fraction=0)
    if when == "finished":
        pack(make_plan(tree, recipe, **options), out, PixelRecipe(16), shard_size=20)
    else:
        place = place_of(tree, "00000003_000.png")  # of test
        good = place.read_bytes()
        place.write_bytes(b"")
        with pytest.raises(BadData):
            pack(make_plan(tree, recipe, **options), out, PixelRecipe(16), shard_size=20)
        place.write_bytes(good)
    back.write_bytes(kept)
    away.unlink()
    with pytest.raises(CannotResume, match=r"00000002_001\.png is gone and .*00000001_001\.png is new"):
        pack(make_plan(tree, recipe, **options), out, PixelRecipe(16), shard_size=20)


def test_an_untouched_image_whose_times_are_new_is_no_change(shards: Path, make_tree: MakeTree, tmp_path: Path) -> None:
    tree = shutil.copytree(make_tree(), tmp_path / "copied")
    before = state(shards)
    packed_into(shards, tree)
    assert state(shards) == before


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped", "index gone", "index cut"])
def test_a_damaged_shard_of_a_finished_folder_is_mended_to_the_same_bytes(
    shards: Path, make_tree: MakeTree, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    before = contents(shards)
    path = shards / ("val-00000.idx" if "index" in damage else "val-00000.tar")
    data = path.read_bytes()
    path.unlink()
    if "cut" in damage:
        path.write_bytes(data[:-600])
    elif damage == "flipped":
        path.write_bytes(data[:700] + bytes([data[700] ^ 1]) + data[701:])
    packed_into(shards, make_tree())
    assert contents(shards) == before
    assert "val-00000.tar" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["entries.csv", "rejects.csv"])
def test_a_damaged_table_of_a_finished_folder_is_an_error_that_says_what_to_do(
    shards: Path, make_tree: MakeTree, name: str
) -> None:
    with (shards / name).open("a") as file:
        file.write("x")
    with pytest.raises(BadData, match=rf"{name} is missing or not the file that was packed; .*pack again"):
        packed_into(shards, make_tree())


def test_a_finished_folder_with_more_rejects_than_are_allowed_now_is_no_success(
    make_tree: MakeTree, tmp_path: Path
) -> None:
    tree = make_tree(replace=BAD)
    packed_into(tmp_path, tree, max_rejects=3)
    with pytest.raises(BadData, match="3 images were left out, more than --max-rejects 2"):
        packed_into(tmp_path, tree, max_rejects=2)
    assert packed_into(tmp_path, tree, max_rejects=3).rejects == 3


def test_what_a_kill_left_behind_is_gone_at_the_end(make_tree: MakeTree, tmp_path: Path, packed: Path) -> None:
    tree = make_tree()
    interrupted(tmp_path, tree)
    (tmp_path / ".train-00000.tar.partial").write_bytes(b"half")
    packed_into(tmp_path, tree)
    assert contents(tmp_path) == contents(packed)


@pytest.mark.parametrize("content", [b"", b"{", b"5", b"{}"])
def test_a_damaged_note_of_an_interrupted_pack_is_named(make_tree: MakeTree, tmp_path: Path, content: bytes) -> None:
    tree = make_tree()
    interrupted(tmp_path, tree)
    (tmp_path / ".packing" / "plan.json").write_bytes(content)
    with pytest.raises(BadData, match=r"plan\.json is damaged: .*; delete"):
        packed_into(tmp_path, tree)
