"""`python scripts/make_shards.py` as a user runs it."""

import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from scripts.make_shards import main
from shards.folder import open_shards

ROOT = Path(__file__).parents[2]
TIMEOUT = 300
Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    """(arguments) -> the result of the command at 32 px with one job."""

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(main, [*map(str, arguments), "--size", "32", "--jobs", "1"])

    return invoke


@pytest.fixture
def tree(phantom_tree: Path, tmp_path: Path) -> Path:
    """Phantoms that a test may damage."""
    return shutil.copytree(phantom_tree, tmp_path / "nih")


def assert_says(result: Result, exit_code: int, *texts: str) -> None:
    """Leaving with `exit_code`, the command's last line is the error, and it holds `texts`."""
    assert result.exit_code == exit_code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    *before, last = result.stderr.splitlines()
    assert last.startswith("Error: ") and all(text in last for text in texts), last
    assert not any("Error" in line for line in before)


def test_a_tree_is_packed_verified_and_the_next_step_is_named(phantom_tree: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    result = run(phantom_tree, out, "--shard-size", "16")
    assert result.exit_code == 0, result.output
    folder = open_shards(out)
    lines = result.stdout.splitlines()
    images = [folder.manifest.splits[split].images for split in ("train", "val", "test")]
    assert lines[1].split() == ["images", *map(str, images)] and sum(images) == 96
    assert "patients in two splits: 0" in lines
    counts = [f"{s.positives['Mass']} ({s.prevalence['Mass']:.1%})" for s in folder.manifest.splits.values()]
    assert [line.split() for line in lines if line.startswith("Mass")] == [["Mass", *" ".join(counts).split()]]
    assert (
        lines[-1] == f"{out}: {len(folder.manifest.shards)} shards, 0 rejects; next: python -m trainer --shards {out}"
    )


def test_the_same_command_again_writes_nothing_and_says_the_same(phantom_tree: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    first = run(phantom_tree, out)
    before = {path: path.stat().st_mtime_ns for path in (out, *out.iterdir())}
    again = run(phantom_tree, out)
    assert again.exit_code == 0 and again.stdout == first.stdout
    assert {path: path.stat().st_mtime_ns for path in (out, *out.iterdir())} == before


def test_a_remark_about_the_data_goes_to_stderr(tree: Path, tmp_path: Path, run: Run) -> None:
    csv = tree / "Data_Entry_2017_v2020.csv"
    header, first, rest = csv.read_text().split("\n", 2)
    fields = first.split(",")
    fields[4] = "411"
    csv.write_text("\n".join([header, ",".join(fields), rest]))
    result = run(tree, tmp_path / "out")
    assert result.exit_code == 0
    assert result.stderr.startswith(f"note: {csv}: 1 ages over 120 years") and "row 2: 411" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--colour", "red"],
        ["--split", "image-wise"],
        ["--size", "0"],
        ["--size", "big"],
        ["--filter", "nearest"],
        ["--quality", "101"],
        ["--shard-size", "0"],
        ["--jobs", "0"],
        ["--seed", "-1"],
        ["--val-fraction", "0.5"],
        ["--max-rejects", "-1"],
        ["--folders", "all"],
        ["--folders", "1,"],
        ["--folders", "-1"],
        ["--split", "file"],
        ["--split", "file", "--train-list", "a", "--test-list", "b"],
        ["--split", "random", "--test-list", "a"],
        ["--val-list", "a", "--val-fraction", "0.1"],
        ["--split", "file", "--train-list", "a", "--val-list", "b", "--test-list", "c", "--val-fraction", "0.1"],
        ["a-third-folder"],
    ],
    ids=" ".join,
)
def test_a_wrong_option_is_exit_2_and_nothing_is_written(
    phantom_tree: Path, tmp_path: Path, arguments: list[str]
) -> None:
    result = CliRunner().invoke(main, [str(phantom_tree), str(tmp_path / "out"), *arguments])
    assert_says(result, 2)
    assert list(tmp_path.iterdir()) == []


def no_source(tree: Path) -> None:
    shutil.rmtree(tree)


def no_csv(tree: Path) -> None:
    (tree / "Data_Entry_2017_v2020.csv").unlink()


def no_list(tree: Path) -> None:
    (tree / "test_list.txt").unlink()


def no_image(tree: Path) -> None:
    next((tree / "images_001" / "images").iterdir()).unlink()


def unknown_finding(tree: Path) -> None:
    csv = tree / "Data_Entry_2017_v2020.csv"
    csv.write_text(csv.read_text().replace("Hernia", "Hernja"))


def torn_patient(tree: Path) -> None:
    train_val, test = (tree / f"{which}_list.txt" for which in ("train_val", "test"))
    names = test.read_text().split()
    patients = [name[:8] for name in names]
    moved = next(name for name in names if patients.count(name[:8]) > 1)
    train_val.write_text(train_val.read_text() + "\n" + moved)
    test.write_text("\n".join(name for name in names if name != moved))


def bad_image(tree: Path) -> None:
    path = next((tree / "images_001" / "images").iterdir())
    path.write_bytes(path.read_bytes()[:-5])


def other_bytes(tree: Path) -> None:
    path = next((tree / "images_001" / "images").iterdir())
    (tree / "images_099").mkdir()
    (tree / "images_099" / path.name).write_bytes(b"other")


def bomb(tree: Path) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(bytes(1000)), b"IEND"]
    framed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    path = next((tree / "images_001" / "images").iterdir())
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(framed))


@pytest.mark.parametrize(
    ("damage", "texts"),
    [
        (no_source, ["is no folder", "make_phantoms"]),
        (no_csv, ["must hold one Data_Entry_2017*.csv; found none"]),
        (no_list, ["cannot read the list", "test_list.txt"]),
        (no_image, ["1 of 96 images are not in", "--allow-missing"]),
        (unknown_finding, ["unknown finding 'Hernja'; the nearest valid name is 'Hernia'"]),
        (torn_patient, ["patients are in both", "the first is patient"]),
        (other_bytes, ["have one name but different bytes", "images_001"]),
        (bomb, ["1 images do not decode", "claims 30000x30000 pixels"]),
        (bad_image, ["1 images do not decode, more than --max-rejects 0", "the file is truncated", "rejects.csv"]),
    ],
)
def test_bad_data_is_exit_3_with_one_line_and_no_manifest(
    tree: Path, tmp_path: Path, run: Run, damage: Callable[[Path], None], texts: list[str]
) -> None:
    damage(tree)
    assert_says(run(tree, tmp_path / "out"), 3, *texts)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(("damage", "option"), [(no_image, ["--allow-missing"]), (bad_image, ["--max-rejects", "1"])])
def test_what_is_bad_can_be_left_out_when_asked(
    tree: Path, tmp_path: Path, run: Run, damage: Callable[[Path], None], option: list[str]
) -> None:
    damage(tree)
    result = run(tree, tmp_path / "out", *option)
    assert result.exit_code == 0, result.output
    assert len(open_shards(tmp_path / "out").entries) == 95


def test_images_smaller_than_the_size_are_warned_of_and_refused_by_strict(phantom_tree: Path, tmp_path: Path) -> None:
    arguments = [str(phantom_tree), str(tmp_path / "out"), "--size", "160", "--jobs", "1"]
    assert_says(CliRunner().invoke(main, [*arguments, "--strict"]), 3, "96 images are smaller than --size")
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("warning: "))
    assert line.startswith("warning: 96 images are smaller than --size (the first is images_0")
    assert open_shards(tmp_path / "out").manifest.warnings == {"enlarged": 96}


def test_folders_restrict_what_is_packed(phantom_tree: Path, tmp_path: Path, run: Run) -> None:
    assert_says(
        run(phantom_tree, tmp_path / "out", "--folders", "99"), 3, "image folders; --folders 99 asks for others"
    )
    for choice, folders in (("1", {1}), ("2", {1, 2}), ("2,4", {2, 4})):
        out = tmp_path / choice
        result = run(phantom_tree, out, "--folders", choice, "--split", "random")
        assert result.exit_code == 0, result.output
        assert set(open_shards(out).entries["folder"]) == {f"images_{n:03d}/images" for n in folders}


def test_another_recipe_for_the_same_folder_is_exit_5_with_what_differs(
    phantom_tree: Path, tmp_path: Path, run: Run
) -> None:
    assert run(phantom_tree, tmp_path / "out").exit_code == 0
    result = run(phantom_tree, tmp_path / "out", "--seed", "1", "--encoding", "png")
    assert_says(result, 5, "seed was 0, is now 1", "encoding was jpeg, is now png", "Give another folder")


def test_an_image_that_changed_is_exit_5_with_its_name(tree: Path, tmp_path: Path, run: Run) -> None:
    assert run(tree, tmp_path / "out").exit_code == 0
    first, second, *_ = sorted((tree / "images_001" / "images").iterdir())
    first.write_bytes(second.read_bytes())
    assert_says(run(tree, tmp_path / "out"), 5, str(first), "is not the file that was packed")


def test_a_filter_is_chosen_by_name(phantom_tree: Path, tmp_path: Path, run: Run) -> None:
    assert run(phantom_tree, tmp_path / "out", "--filter", "bicubic").exit_code == 0
    assert open_shards(tmp_path / "out").manifest.recipe["filter"] == "bicubic"


def test_a_place_that_cannot_be_written_is_exit_4(phantom_tree: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "file").write_text("in the way")
    assert_says(run(phantom_tree, tmp_path / "file" / "out"), 4, "cannot write")


def test_options_also_come_from_the_environment(
    phantom_tree: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXRAPID_ENCODING", "png")
    assert run(phantom_tree, tmp_path / "out").exit_code == 0
    assert open_shards(tmp_path / "out").manifest.extension == "png"


def test_as_a_process_it_ends_with_one_line_and_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "make_shards.py", tmp_path / "nowhere", tmp_path / "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"Error: {tmp_path / 'nowhere'} is no folder")
