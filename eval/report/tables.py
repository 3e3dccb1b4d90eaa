"""The tables of report.html."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from eval.heatmaps.localization import Localization
from eval.report.html import (
    MISSING,
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
    text_cell,
)
from eval.report.published import OFFICIAL, OWN_SPLIT, Published
from eval.scores.bootstrap import AT_HALF, MEANS
from eval.scores.metrics import DECIDED, Scores
from shards.findings import FINDINGS
from shards.manifest import Manifest
from shards.splits import SPLITS

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


def groups_table(macro: pd.DataFrame) -> Table:
    """Return the macro row of every group: its size, its AUROC and recall with their intervals."""
    columns = (
        Column("Group", is_number=False),
        Column("Images"),
        Column("Patients"),
        Column("Findings", "How many findings the macro means are of"),
        Column("Macro AUROC"),
        Column("Macro recall", "At the thresholds from val: the true-positive rate"),
    )
    rows = []
    for row in macro.to_dict("records"):
        cells = [Cell(f"{row['attribute']}: {row['group']}", f"{row['attribute']} {row['group']}")]
        cells += [count(row.get(key)) for key in ("images", "patients", "findings")]
        cells += [
            number(row.get(key), small=interval(row.get(f"{key}_low"), row.get(f"{key}_high")))
            for key in ("auroc", "recall")
        ]
        rows.append(tuple(cells))
    return Table("groups-table", "Groups of patients", columns, tuple(rows))


def gaps_table(gaps: pd.DataFrame) -> Table | None:
    """Return a row a finding: per attribute the gap in the true-positive rate and its two groups.

    Findings and attributes without any gap are left out; None where there is none at all.
    """
    known = gaps[gaps["tpr_gap"].notna()]
    if known.empty:
        return None
    attributes = list(dict.fromkeys(known["attribute"]))
    columns = (
        Column("Finding", is_number=False),
        *(Column(f"By {attribute}", "Highest minus lowest true-positive rate") for attribute in attributes),
    )
    by_place = {(row["finding"], row["attribute"]): row for row in known.to_dict("records")}
    rows = {
        finding: (name_cell(finding), *(_gap(by_place.get((finding, attribute))) for attribute in attributes))
        for finding in dict.fromkeys(known["finding"])
    }
    means = tuple(rows.pop(name) for name in MEANS if name in rows)
    return Table("gaps-table", "Gaps in the true-positive rate", columns, tuple(rows.values()), means)


def view_baseline_table(baseline: pd.DataFrame, scores: Scores, intervals: pd.DataFrame | None) -> Table:
    """Return the model's AUROC beside what view position alone scores, and the difference."""
    columns = (
        Column("Finding", is_number=False),
        Column("AUROC"),
        Column("Of the view alone"),
        Column("Above it", "The model's AUROC minus that of the view alone"),
        Column("More often in", "The view with the greater share of positives", is_number=False),
    )
    ours = scores.to_frame()["auroc"]
    rows = {}
    for row in baseline.to_dict("records"):
        name = str(row["finding"])
        between = "" if intervals is None else interval(*intervals.loc[name, ["auroc_low", "auroc_high"]])
        rows[name] = (
            name_cell(name),
            number(ours[name], small=between),
            number(row["auroc"], small=interval(row.get("auroc_low"), row.get("auroc_high"))),
            number(ours[name] - row["auroc"]),
            text_cell(row.get("view")),
        )
    means = tuple(rows.pop(name) for name in MEANS if name in rows)
    return Table("view-baseline-table", "View-only baseline", columns, tuple(rows.values()), means)


def prevalence_table(manifest: Manifest, scored: str) -> Table:
    """Return positives and prevalence of each finding in each split; the scored one is named first."""
    columns = [Column("Finding", is_number=False)]
    for split in SPLITS:
        columns += [
            Column(f"{split}, n", f"Images of {split} that show the finding"),
            Column(
                f"{split}, %",
                f"Share of the images of {split}" + (" (scored here)" if split == scored else ""),
            ),
        ]
    rows = []
    for finding in FINDINGS:
        cells = [name_cell(finding)]
        for split in SPLITS:
            record = manifest.splits[split]
            cells += [count(record.positives[finding]), percent(record.prevalence[finding], 2)]
        rows.append(tuple(cells))
    return Table("prevalence-table", "Positives and prevalence per split", tuple(columns), tuple(rows))


def epochs_table(epochs: tuple[Mapping[str, Any], ...], name: str, place: int) -> Table:
    """Return a row an epoch of the run at this place: losses, time, throughput, data wait, best on val."""
    columns = (
        Column("Epoch"),
        Column("Train loss"),
        Column("Val loss"),
        Column("Seconds", "Training time of the epoch, without validation"),
        Column("Images/s"),
        Column("Data wait", "Share of the time spent waiting for the loader"),
        Column("On val", is_number=False),
    )
    best = [line["epoch"] for line in epochs if line.get("best")]
    rows = tuple(
        (
            count(line["epoch"]),
            number(line["train_loss"], 4),
            number(line["val_loss"], 4),
            number(line["seconds"], 1),
            number(line["images_per_second"], 1),
            percent(line["data_wait"]),
            text_cell(
                "best, kept" if line["epoch"] in best[-1:] else "best so far" if line.get("best") else ""
            ),
        )
        for line in epochs
    )
    return Table(f"epochs-{place}", f"Epochs of {name}", columns, rows)


def published_table(
    name: str, macro_auroc: float, auroc_interval: str, macro_f1: float, micro_f1: float
) -> Table:
    """Return the run among the results on the official split, and the earlier report's, best AUROC first."""
    columns = (
        Column("Model", is_number=False),
        Column("Mean AUROC"),
        Column("Macro F1"),
        Column("Micro F1"),
        Column("Test images", is_number=False),
        Column("Source", is_number=False),
    )
    official, own = Cell("official split", "official"), Cell("own random split", "own")
    ours = (
        Cell(name, name),
        number(macro_auroc, small=auroc_interval),
        number(macro_f1, 2),
        number(micro_f1, 2),
        official,
        Cell("this report", "this report"),
    )
    theirs = [(_published(result, official), result.macro_auroc) for result in OFFICIAL]
    theirs += [(_published(result, own), result.macro_auroc) for result in OWN_SPLIT]
    rows = sorted([(ours, macro_auroc), *theirs], key=lambda each: -each[1])
    return Table("published-table", "Published results", columns, tuple(row for row, _ in rows))


def _published(result: Published, split: Cell) -> tuple[Cell, ...]:
    return (
        Cell(result.model, result.model),
        number(result.macro_auroc),
        number(result.macro_f1, 2),
        number(result.micro_f1, 2),
        split,
        Cell(result.source, result.source),
    )


def _gap(row: Mapping[Any, Any] | None) -> Cell:
    if row is None:
        return Cell(MISSING)
    lowest, highest = row["lowest"], row["highest"]
    named = lowest and highest and not pd.isna(lowest)  # a mean of gaps lies between no two groups
    return number(row["tpr_gap"], small=f"{lowest} below {highest}" if named else "")
