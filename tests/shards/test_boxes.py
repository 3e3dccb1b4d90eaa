"""BBox_List_2017.csv becomes boxes.csv: which boxes are kept, in what form, and what is refused."""

import gzip
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner, Result

from scripts.make_shards import main as make_shards
from shards.boxes import BOX_LIST, BOXES, by_row, find_box_list, read_box_list, read_boxes, to_csv
from shards.errors import BadData, CannotResume
from shards.fetching import fetch_shards
from shards.findings import FINDINGS
from shards.folder import ShardFolder, open_shards
from shards.manifest import read_manifest
from shards.packing import pack
from shards.packing.planning import SplitRecipe, make_plan
from shards.pixels import PixelRecipe
from shards.verification import verify_shards

HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,"
LINES = (
    "00000002_001.png,Infiltrate,512,256,128.5,64",
    "00000001_000.png,Nodule,0,0,1024,1024,,,",
    "00000002_001.png,Atelectasis,100.25,200.5,50,60",
)


def write_list(path: Path, *lines: str, header: str = HEADER) -> Path:
    path.write_text("\n".join([header, *lines, ""]))
    return path


def pack_tree(tree: Path, out: Path, boxes: Path | None = None) -> ShardFolder:
    plan = make_plan(tree, SplitRecipe(val_fraction=0.3), boxes=boxes)
    pack(plan, out, PixelRecipe(size=16), shard_size=4)
    return open_shards(out)


@pytest.fixture
def tree(make_tree, tmp_path: Path) -> Path:
    """A tree of 18 images with a list of three boxes in two of them."""
    tree = Path(shutil.copytree(make_tree(), tmp_path / "tree"))
    write_list(tree / BOX_LIST, *LINES)
    return tree


def command(*arguments: object) -> Result:
    return CliRunner().invoke(make_shards, [str(argument) for argument in arguments])


def test_boxes_become_shares_of_the_grid_and_infiltrate_becomes_infiltration(tmp_path: Path) -> None:
    boxes = read_box_list(write_list(tmp_path / BOX_LIST, *LINES))
    assert boxes["finding"].tolist() == ["Infiltration", "Nodule", "Atelectasis"]
    assert boxes.loc[0, ["x", "y", "width", "height"]].tolist() == [0.5, 0.25, 0.125488281250, 0.0625]
    assert boxes.loc[1, ["x", "y", "width", "height"]].tolist() == [0, 0, 1, 1]


def test_a_compressed_list_reads_as_the_plain_one(tmp_path: Path) -> None:
    plain = write_list(tmp_path / BOX_LIST, *LINES)
    packed = tmp_path / f"{BOX_LIST}.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    pd.testing.assert_frame_equal(read_box_list(packed), read_box_list(plain))
    plain.unlink()
    assert find_box_list(tmp_path) == packed


def test_the_whole_list_of_nih_is_read(nih_data: Path) -> None:
    boxes = read_box_list(nih_data / "nih_metadata" / f"{BOX_LIST}.gz")
    assert (len(boxes), boxes["image"].nunique(), boxes["finding"].nunique()) == (984, 880, 8)
    assert (boxes["finding"] == "Infiltration").sum() == 123
    assert boxes["x"].iloc[0] == 225.084745762712 / 1024


def test_boxes_of_the_real_sample_are_packed_and_the_others_counted(nih_data: Path, tmp_path: Path) -> None:
    done = command(nih_data / "nih_sample", tmp_path / "out", "--size", 16, "--jobs", 1)
    assert done.exit_code == 0, done.output
    boxes = open_shards(tmp_path / "out").boxes
    assert boxes is not None
    assert boxes["row"].nunique() == 12
    assert f"note: {nih_data / 'nih_sample' / BOX_LIST}: {984 - len(boxes)} of 984 boxes are of images" in (done.stderr)


def test_a_packed_folder_holds_the_boxes_by_row_in_the_order_of_findings(tree: Path, tmp_path: Path) -> None:
    folder = pack_tree(tree, tmp_path / "out")
    assert folder.boxes is not None
    images = folder.entries.loc[folder.boxes["row"], "image"].tolist()
    found = sorted(zip(images, folder.boxes["finding"], strict=True))
    assert found == [
        ("00000001_000.png", "Nodule"),
        ("00000002_001.png", "Atelectasis"),
        ("00000002_001.png", "Infiltration"),
    ]
    order = [(row, FINDINGS.index(finding)) for row, finding in folder.boxes[["row", "finding"]].to_numpy()]
    assert order == sorted(order)
    assert folder.boxes["width"].max() == 1
    assert verify_shards(folder.path).faults == ()


def test_packing_twice_gives_the_same_bytes_of_boxes_and_manifest(tree: Path, tmp_path: Path) -> None:
    first, second = (pack_tree(tree, tmp_path / name).path for name in ("first", "second"))
    for name in (BOXES, "manifest.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    before = (first / BOXES).stat().st_mtime_ns
    pack_tree(tree, first)
    assert (first / BOXES).stat().st_mtime_ns == before


def test_a_tree_without_a_list_is_packed_without_boxes_as_ever(make_tree, tmp_path: Path) -> None:
    folder = pack_tree(make_tree(), tmp_path / "out")
    assert folder.boxes is None
    assert not (folder.path / BOXES).exists()
    assert "boxes" not in (folder.path / "manifest.json").read_text()
    assert verify_shards(folder.path).faults == ()


def test_a_list_of_boxes_elsewhere_is_named_by_an_option(make_tree, tmp_path: Path) -> None:
    listed = write_list(tmp_path / "mine.csv", LINES[1], "elsewhere.png,Mass,1,2,3,4")
    done = command(make_tree(), tmp_path / "out", "--size", 16, "--val-fraction", 0.3, "--jobs", 1, "--boxes", listed)
    assert done.exit_code == 0, done.output
    assert f"note: {listed}: 1 of 2 boxes are of images that are not packed here" in done.stderr
    assert len(open_shards(tmp_path / "out").boxes) == 1
    missing = command(make_tree(), tmp_path / "other", "--boxes", tmp_path / "none.csv")
    assert missing.exit_code == 3
    assert "none.csv cannot be read as CSV: No such file" in missing.stderr


def test_another_list_of_boxes_is_another_recipe(tree: Path, tmp_path: Path) -> None:
    pack_tree(tree, tmp_path / "out")
    write_list(tree / BOX_LIST, LINES[0])
    with pytest.raises(CannotResume, match="box_list_sha256 was"):
        pack_tree(tree, tmp_path / "out")


def test_boxes_of_images_that_did_not_decode_are_left_out(tree: Path, tmp_path: Path) -> None:
    next(tree.glob("images_*/images/00000001_000.png")).write_bytes(b"no image")
    plan = make_plan(tree, SplitRecipe(val_fraction=0.3))
    pack(plan, tmp_path / "out", PixelRecipe(size=16), max_rejects=1)
    assert open_shards(tmp_path / "out").boxes["finding"].tolist() == ["Atelectasis", "Infiltration"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda path: path.unlink(), "boxes.csv is missing"),
        (lambda path: path.write_text(path.read_text() + "\n"), "is not the file that was packed"),
        (lambda path: path.write_text("row\n1\n"), "cannot be read: its columns are row"),
        (lambda path: path.write_text(path.read_text() + "99,Mass,0.1,0.1,0.1,0.1\n"), "has a box of row 99"),
    ],
)
def test_damage_to_boxes_is_found_by_verification_and_by_opening_them(
    tree: Path, tmp_path: Path, change, fault: str
) -> None:
    folder = pack_tree(tree, tmp_path / "out")
    change(folder.path / BOXES)
    assert any(fault in found for found in verify_shards(folder.path).faults)
    with pytest.raises(BadData, match=r"boxes\.csv is missing or not the file"):
        _ = open_shards(folder.path).boxes
    with pytest.raises(BadData, match=r"boxes\.csv is missing or not the file"):
        pack_tree(tree, folder.path)


def test_boxes_that_the_manifest_does_not_name_are_a_fault(make_tree, tmp_path: Path) -> None:
    folder = pack_tree(make_tree(), tmp_path / "out")
    (folder.path / BOXES).write_text(",".join(("row", "finding", "x", "y", "width", "height")) + "\n")
    assert any("the manifest does not name it" in fault for fault in verify_shards(folder.path).faults)


def test_fetching_brings_the_boxes_too(tree: Path, tmp_path: Path) -> None:
    folder = pack_tree(tree, tmp_path / "out")
    fetch_shards(str(folder.path), tmp_path / "copy")
    assert (tmp_path / "copy" / BOXES).read_bytes() == (folder.path / BOXES).read_bytes()
    assert verify_shards(tmp_path / "copy").faults == ()


def test_the_manifest_says_which_boxes(tree: Path, tmp_path: Path) -> None:
    folder = pack_tree(tree, tmp_path / "out")
    assert read_manifest(folder.path) == folder.manifest
    record = json.loads((folder.path / "manifest.json").read_text())
    assert record["boxes_sha256"] == folder.manifest.boxes_sha256
    assert list(record)[-2:] == ["boxes_sha256", "sha256"]


def test_boxes_written_and_read_are_the_same_to_six_digits(tmp_path: Path) -> None:
    listed = read_box_list(write_list(tmp_path / BOX_LIST, *LINES))
    images = pd.Series(["00000002_001.png", "00000001_000.png"], index=pd.Index([7, 3], name="row"))
    table = by_row(listed, images, FINDINGS)
    assert table["row"].tolist() == [3, 7, 7]
    (tmp_path / BOXES).write_text(to_csv(table))
    pd.testing.assert_frame_equal(read_boxes(tmp_path / BOXES, FINDINGS), table, atol=1e-6, rtol=0)
    (tmp_path / BOXES).write_text(to_csv(table.iloc[:0]))
    assert read_boxes(tmp_path / BOXES, FINDINGS).empty


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("a.png,Masse,1,2,3,4", "row 2: unknown finding 'Masse'; the nearest valid name is 'Mass'"),
        ("a.png,Mass,1,2,x,4", "row 2: could not convert string to float"),
        ("a.png,Mass,1,2,nan,4", "row 2: a box of x, y, width, height 1, 2, nan, 4 does not lie"),
        ("a.png,Mass,1,2,0,4", "row 2: a box of"),
        ("a.png,Mass,1000,2,30,4", "does not lie in the 1024 x 1024 grid"),
        ("a.png,Mass,-1,2,30,4", "does not lie"),
        ("a.png,Mass,1,2,3", "row 2: expected an image, a finding and four numbers, got 5 cells"),
    ],
)
def test_a_line_that_is_no_box_is_named(tmp_path: Path, line: str, cause: str) -> None:
    with pytest.raises(BadData) as error:
        read_box_list(write_list(tmp_path / BOX_LIST, line))
    assert str(error.value).startswith(f"{tmp_path / BOX_LIST}, row 2: ")
    assert cause in str(error.value)


def test_another_csv_is_no_list_of_boxes(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="its header must begin with Image Index"):
        read_box_list(write_list(tmp_path / BOX_LIST, header="image,finding,x,y,w,h"))
    (tmp_path / f"{BOX_LIST}.gz").write_bytes(b"not compressed")
    with pytest.raises(BadData, match="cannot be read"):
        read_box_list(tmp_path / f"{BOX_LIST}.gz")
