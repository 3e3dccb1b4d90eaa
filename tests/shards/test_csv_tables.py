"""entries.csv, boxes.csv and rejects.csv that somebody changed and signed again."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from shards.boxes import BOXES
from shards.errors import BadData
from shards.files import sha256_of
from shards.folder import open_shards
from shards.manifest import NAME, read_manifest
from shards.packing import pack
from shards.packing.planning import SplitRecipe, make_plan
from shards.pixels import PixelRecipe
from shards.verification import verify_shards

Change = Callable[[bytes], bytes]
BOX_HEADER = b"row,finding,x,y,width,height\n"


def sign(folder: Path) -> None:
    """Make the manifest's hashes fit the tables as they are."""
    manifest = read_manifest(folder)
    boxes = sha256_of(folder / BOXES) if (folder / BOXES).is_file() else None
    signed = dataclasses.replace(
        manifest,
        entries_sha256=sha256_of(folder / "entries.csv"),
        rejects_sha256=sha256_of(folder / "rejects.csv"),
        boxes_sha256=boxes,
    )
    (folder / NAME).write_text(signed.to_json())


def cell(line: int, column: int, value: bytes) -> Change:
    """Replace a cell; line 0 is the header."""

    def change(data: bytes) -> bytes:
        lines = [each.split(b",") for each in data.splitlines()]
        lines[line][column] = value
        return b"".join(b",".join(cells) + b"\n" for cells in lines)

    return change


def lines(data: bytes, *order: int) -> bytes:
    kept = data.splitlines(keepends=True)
    return b"".join(kept[number] for number in order or range(len(kept)))


ENTRIES: dict[str, tuple[Change, str]] = {
    "not UTF-8": (cell(1, 1, b"\xff\xfe"), "entries.csv cannot be read: 'utf-8' codec"),
    "empty": (lambda data: b"", "entries.csv cannot be read: No columns"),
    "one row wider": (lambda data: data + b",,\n" * 2 + b"," * 40, "entries.csv cannot be read: "),
    "every row wider": (
        lambda data: data.replace(b"\n", b",\n").replace(b",\n", b"\n", 1),
        "entries.csv cannot be read: its columns",
    ),
    "an open quote": (lambda data: data + b'"', "entries.csv cannot be read: "),
    "a NUL byte": (cell(2, 1, b"a\0.png"), "there is a NUL byte in it"),
    "a column missing": (lambda data: data.replace(b",Mass,", b",", 1), "its columns are"),
    "a column renamed": (cell(0, 4, b"Mass"), "its columns are"),
    "another header": (lambda data: b"row,image\n0,a.png\n", "its columns are row, image, not row"),
    "a label of 2": (cell(2, 4, b"2"), "line 3: '2' is no Atelectasis"),
    "a label of nan": (cell(2, 4, b"nan"), "line 3: 'nan' is no Atelectasis"),
    "a fourth split": (cell(3, 3, b"x"), "line 4: 'x' is no split"),
    "a patient as text": (cell(3, 2, b"P7"), "line 4: 'P7' is no patient"),
    "a patient of 30 digits": (cell(3, 2, b"9" * 30), "is no patient"),
    "a row as text": (cell(3, 0, b"x"), "line 4: 'x' is no row"),
    "a row of 1e999": (cell(3, 0, b"1e999"), "line 4: '1e999' is no row"),
    "a row below 0": (cell(1, 0, b"-1"), "line 2: '-1' is no row"),
    "an age of 1e999": (cell(2, 18, b"1e999"), "line 3: '1e999' is no age"),
    "an image elsewhere": (cell(2, 1, b"../a.png"), "line 3: '../a.png' is no image"),
    "rows swapped": (lambda data: lines(data, 0, 2, 1, *range(3, 19)), "its rows are not in order"),
    "a row twice": (lambda data: lines(data, 0, 1, 1, *range(3, 19)), "its rows are not in order"),
    "an image twice": (lambda data: cell(3, 1, data.splitlines()[2].split(b",")[1])(data), "is there twice"),
    "a blank line": (lambda data: data.replace(b"\n", b"\n\n", 2), "line 2: '' is no row"),
    "a huge cell": (cell(2, 1, b"a" * 60_000), "entries.csv has more than 19,456 bytes"),
}


@pytest.mark.parametrize(("change", "cause"), ENTRIES.values(), ids=ENTRIES)
def test_entries_that_were_changed_and_signed_again_are_refused_with_file_and_cause(
    shards: Path, change: Change, cause: str
) -> None:
    csv = shards / "entries.csv"
    csv.write_bytes(change(csv.read_bytes()))
    sign(shards)
    with pytest.raises(BadData) as refused:
        open_shards(shards).rows("train")
    assert refused.value.message.startswith(str(csv)) and cause in refused.value.message
    assert "\n" not in refused.value.message and len(refused.value.message) < 1000
    found = [fault for fault in verify_shards(shards).faults if cause in fault]
    assert found and found[0].startswith(str(csv))


BOX = b"1,Mass,0.100000,0.100000,0.200000,0.200000\n"
BOXES_CHANGED: dict[str, tuple[bytes, str]] = {
    "not UTF-8": (BOX_HEADER + b"\xff", "boxes.csv cannot be read: "),
    "empty": (b"", "boxes.csv cannot be read: No columns"),
    "one row wider": (BOX_HEADER + BOX + b"1" + b",1" * 40, "boxes.csv cannot be read: "),
    "other columns": (BOX, "its columns are"),
    "no finding": (BOX_HEADER + BOX.replace(b"Mass", b"Masse"), "line 2: 'Masse' is no finding"),
    "a row as text": (BOX_HEADER + BOX + b"x" + BOX[1:], "line 3: 'x' is no row"),
    "no number": (BOX_HEADER + BOX.replace(b"0.2", b"nan"), "is no width"),
    "outside": (BOX_HEADER + BOX.replace(b"0.1", b"0.9"), "line 2: a box of x, y, width, height"),
    "1e999": (BOX_HEADER + BOX.replace(b"0.100000", b"1e999", 1), "line 2: '1e999' is no x"),
}


@pytest.mark.parametrize(("content", "cause"), BOXES_CHANGED.values(), ids=BOXES_CHANGED)
def test_boxes_that_were_changed_and_signed_again_are_refused_with_file_and_cause(
    shards: Path, content: bytes, cause: str
) -> None:
    csv = shards / BOXES
    csv.write_bytes(content)
    sign(shards)
    with pytest.raises(BadData) as refused:
        _ = open_shards(shards).boxes
    assert refused.value.message.startswith(str(csv)) and cause in refused.value.message
    assert any(fault.startswith(str(csv)) and cause in fault for fault in verify_shards(shards).faults)


@pytest.mark.parametrize("content", [b"", b"\xff", b"image\na.png\n", b'"'], ids=repr)
def test_rejects_that_were_changed_and_signed_again_stop_the_same_pack(
    shards: Path, make_tree: Callable[..., Path], content: bytes
) -> None:
    (shards / "rejects.csv").write_bytes(content)
    sign(shards)
    with pytest.raises(BadData, match=r"rejects\.csv cannot be read: "):
        pack(make_plan(make_tree(), SplitRecipe(val_fraction=0.3)), shards, PixelRecipe(16), shard_size=4)
