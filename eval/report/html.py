"""The parts of a page: tables with sortable cells, embedded pictures, templates."""

import base64
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from eval.report.canvas import readable
from eval.scores.bootstrap import MEANS

MISSING = "\N{EN DASH}"

HINTS = {
    "images": "Images in the split",
    "positives": "Images that show the finding",
    "prevalence": "Share of images that show the finding: the AUPRC of a model that knows nothing",
    "threshold": "Positive at or above this probability; fitted on val",
    "auroc": "Area under the ROC curve; 0.5 is chance",
    "average_precision": "Area under the precision-recall curve; the prevalence is chance",
    "precision": "Share of the predicted positives that are correct: the positive predictive value (PPV)",
    "recall": "Share of the positives that are found: the sensitivity",
    "specificity": "Share of the negatives that are predicted negative",
    "npv": "Share of the predicted negatives that are correct: the negative predictive value",
    "f1": "Harmonic mean of precision and recall",
    "tp": "True positives",
    "fp": "False positives",
    "fn": "False negatives",
    "tn": "True negatives",
    "brier": "Mean squared difference of probability and label; 0 is best",
    "ece": "Expected calibration error over 15 bins; 0 is best",
}
"""What a measure is, by its name in metrics.csv."""

TITLES = {
    "auroc": "AUROC",
    "average_precision": "AUPRC",
    "precision": "Precision (PPV)",
    "recall": "Recall (sensitivity)",
    "npv": "NPV",
    "f1": "F1",
    "brier": "Brier",
    "ece": "ECE",
    **{count: count.upper() for count in ("tp", "fp", "fn", "tn")},
}


Row = Mapping[str, Any]
CellOf = Callable[[Row], "Cell"]


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    title: str
    hint: str = ""
    """Shown when hovering over the title."""
    is_number: bool = True
    cell: CellOf | None = None
    """How `frame_table` makes the column's cell from a row."""


@dataclass(frozen=True)
class Cell:
    """What a cell shows."""

    text: str
    value: float | str | None = None
    """What it is sorted by; None sorts last, in both directions."""
    small: str = ""
    """A second line, such as an interval."""
    bar: tuple[float, float, float] | None = None
    """Low, point and high, each 0..100 across the cell, drawn over the text."""


@dataclass(frozen=True)
class Table:
    """A table whose rows can be sorted; those of `means` stay below them."""

    name: str
    """Its id in the page."""
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    """Each begins with the cell that names the row."""
    means: tuple[tuple[Cell, ...], ...] = field(default=())


def frame_table(name: str, caption: str, columns: Sequence[Column], frame: pd.DataFrame) -> Table:
    """Return a table with a row of each of the frame; those indexed macro and micro stay below.

    The columns' `cell` is given the row by column name, and its index as `name`.
    """
    rows: list[tuple[Cell, ...]] = []
    means: list[tuple[Cell, ...]] = []
    for index, values in zip(frame.index, frame.to_dict("records"), strict=True):
        row: dict[str, Any] = {"name": str(index), **{str(key): value for key, value in values.items()}}
        cells = tuple(column.cell(row) for column in columns if column.cell is not None)
        (means if index in MEANS else rows).append(cells)
    return Table(name, caption, tuple(columns), tuple(rows), tuple(means))


def measure_column(measure: str, cell: CellOf | None = None) -> Column:
    """Return the column of a measure, given by its name in metrics.csv; by default of numbers."""
    title = TITLES.get(measure, measure.capitalize())
    return Column(title, HINTS.get(measure, ""), cell=cell or number_of(measure))


def name_column(title: str, cell: CellOf | None = None) -> Column:
    """Return the first column, which names the rows."""
    return Column(title, is_number=False, cell=cell or (lambda row: name_cell(row["name"])))


def number_of(key: str, digits: int = 3) -> CellOf:
    """Cells of a number, with its interval where the row has KEY_low and KEY_high."""
    return lambda row: number(row[key], digits, interval(row.get(f"{key}_low"), row.get(f"{key}_high"), digits))


def count_of(key: str) -> CellOf:
    """Cells of a whole number."""
    return lambda row: count(row[key])


def percent_of(key: str, digits: int = 1) -> CellOf:
    """Cells of a share as a percentage."""
    return lambda row: percent(row[key], digits)


def text_of(key: str) -> CellOf:
    """Cells of text."""
    return lambda row: text_cell(row[key])


def name_cell(name: str) -> Cell:
    """Return the cell that names a row."""
    return Cell(readable(name), readable(name))


def text_cell(value: Any) -> Cell:
    """Return a word, or a dash for one that is missing."""
    return Cell(MISSING) if is_missing(value) or value == "" else Cell(str(value), str(value))


def count(value: Any) -> Cell:
    """Return a whole number with thousands set apart, or a dash for one that does not exist."""
    return Cell(MISSING) if is_missing(value) else Cell(f"{int(value):,}", int(value))


def number(value: Any, digits: int = 3, small: str = "") -> Cell:
    """Return a number of so many decimals, or a dash for one that does not exist."""
    if is_missing(value):
        return Cell(MISSING, small=small)
    return Cell(f"{float(value):.{digits}f}", float(value), small)


def percent(value: Any, digits: int = 1) -> Cell:
    """Return a share 0..1 as a percentage, or a dash for one that does not exist."""
    return Cell(MISSING) if is_missing(value) else Cell(f"{100 * float(value):.{digits}f} %", float(value))


def interval(low: Any, high: Any, digits: int = 3) -> str:
    """Return `0.712 to 0.745`, or nothing where there is no interval."""
    return "" if is_missing(low) or is_missing(high) else f"{float(low):.{digits}f} to {float(high):.{digits}f}"


def is_missing(value: Any) -> bool:
    """Tell whether a number does not exist: None, NaN or NA."""
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def fill(template: str, **values: Any) -> str:
    """Return the text of a template of this room with these values in it."""
    environment = Environment(
        loader=PackageLoader("eval.report", package_path="."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


@dataclass(frozen=True)
class Picture:
    """A PNG inside of a page."""

    name: str
    """Of the file, without its ending; its id in the page is figure-NAME."""
    source: str
    """A data URI."""
    alt: str
    width: int
    """Pixels."""
    height: int
    caption: str = ""


def read_picture(name: str, path: Path, alt: str, caption: str = "") -> Picture:
    """Return the PNG `path` as a picture."""
    png = path.read_bytes()
    width, height = struct.unpack(">II", png[16:24])  # of the IHDR chunk, which is always the first
    return Picture(name, data_uri(png), alt, width, height, caption)


def data_uri(png: bytes) -> str:
    """Return a PNG as a `data:` URI, which a page shows without a request."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
