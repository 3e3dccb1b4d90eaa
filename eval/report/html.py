"""The parts of a page: tables with sortable cells, embedded pictures, templates."""

import base64
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from eval.scores.bootstrap import MEANS

MISSING = "\N{EN DASH}"

_ABOUT = {
    "positives": ("Positives", "Images that show the finding"),
    "prevalence": ("Prevalence", "Share of images that show the finding: the AUPRC of a random ranking"),
    "threshold": ("Threshold", "Positive at or above this probability; fitted on val"),
    "auroc": ("AUROC", "Area under the ROC curve; 0.5 is chance"),
    "average_precision": ("AUPRC", "Area under the precision-recall curve; the prevalence is chance"),
    "precision": (
        "Precision (PPV)",
        "Share of the predicted positives that are correct: the positive predictive value (PPV)",
    ),
    "recall": ("Recall (sensitivity)", "Share of the positives that are found: the sensitivity"),
    "specificity": ("Specificity", "Share of the negatives that are predicted negative"),
    "npv": ("NPV", "Share of the predicted negatives that are correct: the negative predictive value"),
    "f1": ("F1", "Harmonic mean of precision and recall"),
    "tp": ("TP", "True positives"),
    "fp": ("FP", "False positives"),
    "fn": ("FN", "False negatives"),
    "tn": ("TN", "True negatives"),
    "brier": ("Brier", "Mean squared difference of probability and label; 0 is best"),
    "ece": ("ECE", "Expected calibration error over 15 bins; 0 is best"),
}
"""Title and hint of each measure, by its name in metrics.csv."""

Row = Mapping[str, Any]
CellOf = Callable[[Row], "Cell"]


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    title: str
    hint: str = ""
    """Shown when hovering over the title."""
    is_number: bool = True
    cell: CellOf = field(kw_only=True)
    """Makes the column's cell from a row."""


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
    means: tuple[tuple[Cell, ...], ...]


def frame_table(name: str, caption: str, columns: Sequence[Column], frame: pd.DataFrame) -> Table:
    """Return a table with a row for each of the frame; those indexed macro and micro stay below.

    Each column's `cell` gets the row by column name, and the row's index as `name`.
    """
    rows: list[tuple[Cell, ...]] = []
    means: list[tuple[Cell, ...]] = []
    for index, values in zip(frame.index, frame.to_dict("records"), strict=True):
        row: dict[str, Any] = {"name": str(index), **{str(key): value for key, value in values.items()}}
        (means if index in MEANS else rows).append(tuple(column.cell(row) for column in columns))
    return Table(name, caption, tuple(columns), tuple(rows), tuple(means))


def measure_title(measure: str) -> str:
    """Return the title of a measure, given by its name in metrics.csv."""
    return _ABOUT[measure][0]


def measure_column(measure: str, cell: CellOf | None = None) -> Column:
    """Return the column of a measure, given by its name in metrics.csv; by default of numbers."""
    return Column(*_ABOUT[measure], cell=cell or number_of(measure))


def name_column(title: str) -> Column:
    """Return the first column, which names the rows by their index."""
    return Column(title, is_number=False, cell=lambda row: Cell(readable(row["name"]), readable(row["name"])))


def number_of(key: str, digits: int = 3) -> CellOf:
    """Cells of a number, with its interval where the row has KEY_low and KEY_high."""
    return lambda row: number(row[key], digits, interval(row.get(f"{key}_low"), row.get(f"{key}_high"), digits))


def count_of(key: str) -> CellOf:
    """Cells of a whole number with thousands set apart."""
    return lambda row: Cell(MISSING) if pd.isna(row[key]) else Cell(f"{int(row[key]):,}", int(row[key]))


def percent_of(key: str, digits: int = 1) -> CellOf:
    """Cells of a share 0..1 as a percentage."""
    return lambda row: Cell(MISSING) if pd.isna(row[key]) else Cell(f"{100 * row[key]:.{digits}f} %", float(row[key]))


def text_of(key: str) -> CellOf:
    """Cells of text."""
    return lambda row: Cell(MISSING) if pd.isna(row[key]) or row[key] == "" else Cell(str(row[key]), str(row[key]))


def number(value: Any, digits: int = 3, small: str = "") -> Cell:
    """Return a number of so many decimals, or a dash for one that does not exist."""
    if pd.isna(value):
        return Cell(MISSING, small=small)
    return Cell(f"{float(value):.{digits}f}", float(value), small)


def interval(low: Any, high: Any, digits: int = 3) -> str:
    """Return `0.712 to 0.745`, or nothing where there is no interval."""
    return "" if pd.isna(low) or pd.isna(high) else f"{float(low):.{digits}f} to {float(high):.{digits}f}"


def readable(finding: str) -> str:
    """Return a finding's name as text: Pleural_Thickening with a space."""
    return finding.replace("_", " ")


def data_uri(png: bytes) -> str:
    """Return a PNG as a `data:` URI, which a page shows without a request."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def fill(template: str, **values: Any) -> str:
    """Return the text of a template of this package with these values; all text from them is escaped."""
    environment = Environment(
        loader=PackageLoader("eval.report", package_path="."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_uri": data_uri, "readable": readable}
    return environment.get_template(template).render(**values)


@dataclass(frozen=True)
class Picture:
    """A PNG inside of a page."""

    source: str
    """A data URI."""
    width: int
    """Pixels."""
    height: int


def read_picture(path: Path) -> Picture:
    """Return the PNG `path` as a picture."""
    png = path.read_bytes()
    width, height = struct.unpack(">II", png[16:24])  # of the IHDR chunk, which is always the first
    return Picture(data_uri(png), width, height)
