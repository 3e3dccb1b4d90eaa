"""BBox_List_2017.csv <-> boxes.csv: bounding boxes of findings, in fractions of the image's sides."""

import csv
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import pandas as pd

from shards.csv_tables import largest_table, parse_table, read_csv_text
from shards.documents import read_bytes
from shards.errors import BadData
from shards.findings import canonical

BOXES = "boxes.csv"
BOX_LIST = "BBox_List_2017.csv"
_SHARES = ["x", "y", "width", "height"]
COLUMNS = ["row", "finding", *_SHARES]
MOST_BOXES = 2**20
"""Rows of a boxes.csv; NIH's has 984."""
GRID = 1024
"""NIH's images have 1024 pixels to a side, and its boxes are in these pixels, with digits behind the point."""
_HEADER = ["Image Index", "Finding Label", "Bbox [x", "y", "w", "h]"]


def find_box_list(source: Path) -> Path | None:
    """Return `source/BBox_List_2017.csv`, or its .gz, or None where neither is there."""
    for name in (BOX_LIST, f"{BOX_LIST}.gz"):
        if (source / name).is_file():
            return source / name
    return None


def read_box_list(path: Path) -> pd.DataFrame:
    """Read NIH's list of boxes (.csv or .csv.gz): image, finding, x, y, width, height, in the file's order.

    x and y are the upper left corner. All four are float64 shares 0..1 of the image's width and height: the file's are
    in pixels of the image's own 1024 grid, which a resize does not change as shares. `Infiltrate` becomes Infiltration;
    empty columns behind the sixth are passed over. Raises BadData naming the file, the row and the cause: another
    header, an unknown finding, what is no number, a box without area or not wholly in the image.
    """
    try:
        lines = list(csv.reader(io.StringIO(read_csv_text(path), newline="")))
    except csv.Error as error:
        raise BadData(f"{path} cannot be read as CSV: {error}") from error
    if not lines or [cell.strip() for cell in lines[0][:6]] != _HEADER:
        raise BadData(f"{path} is no list of boxes: its header must begin with {','.join(_HEADER)}")
    boxes = []
    for number, cells in enumerate(lines[1:], start=2):
        if any(cells):
            try:
                boxes.append(_box(cells))
            except ValueError as error:
                raise BadData(f"{path}, row {number}: {error}") from error
    return pd.DataFrame(boxes, columns=["image", "finding", *_SHARES]).astype(dict.fromkeys(_SHARES, "float64"))


def by_row(listed: pd.DataFrame, images: "pd.Series[str]", findings: Sequence[str]) -> pd.DataFrame:
    """Return the listed boxes of `images` (name by row) with COLUMNS, sorted by row, finding, then as listed.

    Boxes of other images are left out. All are of these findings, whose order counts.
    """
    rows = pd.Series(images.index, index=images.to_numpy())
    mine = listed[listed["image"].isin(rows.index)]
    table = mine.assign(row=mine["image"].map(rows).astype("int64"), order=mine["finding"].map(list(findings).index))
    return table.sort_values(["row", "order"], kind="stable")[COLUMNS].reset_index(drop=True)


def to_csv(boxes: pd.DataFrame) -> str:
    """Return the text of boxes.csv, whose shares have six digits: 0.001 px of the grid."""
    text: str = boxes[COLUMNS].to_csv(index=False, lineterminator="\n", float_format="%.6f")
    return text


def read_boxes(path: Path, findings: Sequence[str]) -> pd.DataFrame:
    """Read a boxes.csv as `parse_boxes` does."""
    return parse_boxes(read_bytes(path, largest_table(MOST_BOXES)), findings, path)


def parse_boxes(data: bytes, findings: Sequence[str], name: Path | str) -> pd.DataFrame:
    """Return a boxes.csv of these findings: COLUMNS, row as int64, shares as float64.

    Raises BadData naming the file and the line of what is no box.
    """
    shares = dict.fromkeys(_SHARES, r"[0-9]\.[0-9]{1,9}")
    cells = {"row": "[0-9]{1,9}", "finding": "|".join(map(re.escape, findings)), **shares}
    boxes = parse_table(data, cells, name).astype({"row": "int64", **dict.fromkeys(_SHARES, "float64")})
    for line, box in enumerate(boxes[_SHARES].to_numpy().tolist(), start=2):
        try:
            _check(*box)
        except ValueError as error:
            raise BadData(f"{name}, line {line}: {error}") from error
    return boxes


def by_row_and_finding(boxes: pd.DataFrame) -> dict[tuple[int, str], npt.NDArray[np.float64]]:
    """Return x, y, width, height, float64 [B, 4], of each pair of a row and a finding that has boxes."""
    groups = boxes.groupby(["row", "finding"], sort=False)[_SHARES]
    return {cast("tuple[int, str]", pair): group.to_numpy(dtype=np.float64) for pair, group in groups}


def _box(cells: list[str]) -> tuple[str, str, float, float, float, float]:
    if len(cells) < 6 or any(cell.strip() for cell in cells[6:]):
        raise ValueError(f"expected an image, a finding and four numbers, got {len(cells)} cells")
    finding = canonical(cells[1].strip())
    x, y, width, height = (float(cell) / GRID for cell in cells[2:6])
    _check(x, y, width, height)
    return cells[0].strip(), finding, x, y, width, height


def _check(x: float, y: float, width: float, height: float) -> None:
    slack = 2e-6  # what six digits may add to a box at the edge
    inside = x >= 0 and y >= 0 and x + width <= 1 + slack and y + height <= 1 + slack
    if not (all(map(math.isfinite, (x, y, width, height))) and width > 0 and height > 0 and inside):
        corners = ", ".join(f"{GRID * length:.6g}" for length in (x, y, width, height))
        raise ValueError(f"a box of x, y, width, height {corners} does not lie in the {GRID} x {GRID} grid")
