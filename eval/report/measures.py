"""The tables of scores: per finding, at other thresholds, before and after calibration, localization."""

from typing import Any

import pandas as pd

from eval.heatmaps.localization import Localization
from eval.report.table import (
    Cell,
    Column,
    Table,
    count,
    interval,
    is_missing,
    measure_column,
    name_cell,
    number,
    percent,
)
from eval.scores.bootstrap import MEANS
from eval.scores.intervals import AT_HALF
from eval.scores.metrics import DECIDED, Scores

_COUNTED = ("tp", "fp", "fn", "tn")
_CHANCE = 0.5  # of an AUROC


def scores_table(scores: Scores, intervals: pd.DataFrame | None) -> Table:
    """Return the main table: every measure per finding at the thresholds from val, the means below."""
    frame = scores.to_frame()
    low = _lowest_auroc(frame, intervals)
    columns = (
        Column("Finding", is_number=False),
        measure_column("auroc"),
        measure_column("positives"),
        measure_column("prevalence"),
        measure_column("average_precision"),
        measure_column("threshold"),
        *map(measure_column, (*DECIDED, *_COUNTED, "brier", "ece")),
    )

    def row(name: str) -> tuple[Cell, ...]:
        values = frame.loc[name]

        def measure(key: str) -> Cell:
            return number(values[key], small=_interval_of(intervals, name, key))

        auroc = measure("auroc")
        return (
            name_cell(name),
            Cell(auroc.text, auroc.value, auroc.small, _bar(values["auroc"], intervals, name, low)),
            count(values["positives"]),
            percent(values["prevalence"]),
            measure("average_precision"),
            number(values["threshold"]),
            *map(measure, DECIDED),
            *(count(values[key]) for key in _COUNTED),
            *map(measure, ("brier", "ece")),
        )

    return _table("scores", "Scores per finding", columns, row, scores)


def decisions_table(scores: Scores, threshold: float, intervals: pd.DataFrame | None) -> Table:
    """Return the measures of decisions at 0.5, the `threshold` of all findings, with their intervals."""
    frame = scores.to_frame()
    columns = (
        Column("Finding", is_number=False),
        measure_column("positives"),
        *map(measure_column, (*DECIDED, *_COUNTED)),
    )

    def row(name: str) -> tuple[Cell, ...]:
        values = frame.loc[name]
        return (
            name_cell(name),
            count(values["positives"]),
            *(number(values[key], small=_interval_of(intervals, name, AT_HALF + key)) for key in DECIDED),
            *(count(values[key]) for key in _COUNTED),
        )

    return _table("at-half", f"Decisions at {threshold:g} for every finding", columns, row, scores)


def calibration_table(calibrated: pd.DataFrame, intervals: pd.DataFrame | None) -> Table:
    """Return Brier and ECE per finding before and after; rows macro and micro, if there, stay below."""
    columns = (
        Column("Finding", is_number=False),
        Column("Brier", "Of the probabilities as predicted"),
        Column("Brier, calibrated"),
        Column("ECE", "Of the probabilities as predicted"),
        Column("ECE, calibrated"),
    )
    keys = ("brier", "calibrated_brier", "ece", "calibrated_ece")
    rows = {
        name: (
            name_cell(name),
            *(number(calibrated.at[name, key], 4, _interval_of(intervals, name, key, 4)) for key in keys),
        )
        for name in map(str, calibrated.index)
    }
    means = tuple(rows.pop(name) for name in MEANS if name in rows)
    return Table("calibration-table", "Calibration per finding", columns, tuple(rows.values()), means)


def localization_table(localization: Localization) -> Table:
    """Return how often heat maps point into the boxes, per finding, beside chance."""
    table = localization.table
    overlaps = [name for name in table.columns if name.startswith(("iou_", "iobb_"))]
    columns = (
        Column("Finding", is_number=False),
        Column("Images", "Images with a box of the finding"),
        Column("Boxes"),
        Column("Hit rate", "Share of images whose hottest pixel lies in a box"),
        Column("Chance", "Hit rate of pointing blindly: mean share of the image that is in boxes"),
        Column("Ratio", "Hit rate over chance"),
        *(Column(_overlap(name), "Share of images whose overlap is above this") for name in overlaps),
    )
    rows = {
        str(row["finding"]): (
            name_cell(str(row["finding"])),
            count(row["images"]),
            count(row["boxes"]),
            number(row["hit_rate"], small=interval(row["hit_rate_low"], row["hit_rate_high"])),
            number(row["chance"]),
            number(row["ratio"], 1),
            *(number(row[name]) for name in overlaps),
        )
        for row in table.reset_index().to_dict("records")
    }
    means = tuple(rows.pop(name) for name in MEANS if name in rows)
    return Table("localization-table", "Localization per finding", columns, tuple(rows.values()), means)


def _table(name: str, caption: str, columns: tuple[Column, ...], row: Any, scores: Scores) -> Table:
    rows = tuple(row(str(finding)) for finding in scores.per_finding.index)
    return Table(name, caption, columns, rows, (row("macro"), row("micro")))


def _overlap(name: str) -> str:
    measure, _, threshold = name.partition("_")
    return f"{'IoU' if measure == 'iou' else 'IoBB'} > {threshold}"


def _interval_of(intervals: pd.DataFrame | None, name: str, measure: str, digits: int = 3) -> str:
    if intervals is None or f"{measure}_low" not in intervals:
        return ""
    return interval(intervals.at[name, f"{measure}_low"], intervals.at[name, f"{measure}_high"], digits)


def _lowest_auroc(frame: pd.DataFrame, intervals: pd.DataFrame | None) -> float:
    """Return where the bars begin: at chance, or at the tenth below the lowest value."""
    values = [frame["auroc"].min()]
    if intervals is not None and "auroc_low" in intervals:
        values.append(intervals["auroc_low"].min())
    known = [value for value in values if not is_missing(value)]
    return min(_CHANCE, *(int(10 * value) / 10 for value in known)) if known else _CHANCE


def _bar(
    value: Any, intervals: pd.DataFrame | None, name: str, lowest: float
) -> tuple[float, float, float] | None:
    if is_missing(value):
        return None
    low, high = value, value
    if intervals is not None and not is_missing(intervals.at[name, "auroc_low"]):
        low, high = intervals.at[name, "auroc_low"], intervals.at[name, "auroc_high"]
    left, point, right = (round(100 * (each - lowest) / (1 - lowest), 2) for each in (low, value, high))
    return left, point, right
