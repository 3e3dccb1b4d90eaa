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
    count_of,
    frame_table,
    is_missing,
    measure_column,
    name_column,
    number,
    number_of,
    percent_of,
    text_of,
)
from eval.report.published import OFFICIAL, OWN_SPLIT, Published
from eval.scores.bootstrap import AT_HALF
from eval.scores.metrics import DECIDED, Scores
from shards.findings import FINDINGS
from shards.manifest import Manifest
from shards.splits import SPLITS

_COUNTED = ("tp", "fp", "fn", "tn")
_CHANCE = 0.5  # of an AUROC


def scores_table(scores: Scores, intervals: pd.DataFrame | None) -> Table:
    """Return the main table: every measure per finding at the thresholds from val, the means below."""
    frame = _joined(scores.to_frame(), intervals)
    lowest = _lowest_auroc(frame)

    def auroc(row: Mapping[str, Any]) -> Cell:
        cell = number_of("auroc")(row)
        return Cell(cell.text, cell.value, cell.small, _bar(row, lowest))

    columns = (
        name_column("Finding"),
        measure_column("auroc", auroc),
        measure_column("positives", count_of("positives")),
        measure_column("prevalence", percent_of("prevalence")),
        *map(measure_column, ("average_precision", "threshold", *DECIDED)),
        *(measure_column(key, count_of(key)) for key in _COUNTED),
        *map(measure_column, ("brier", "ece")),
    )
    return frame_table("scores", "Scores per finding", columns, frame)


def decisions_table(scores: Scores, threshold: float, intervals: pd.DataFrame | None) -> Table:
    """Return the measures of decisions at 0.5, the `threshold` of all findings, with their intervals."""
    ends = None
    if intervals is not None:
        ends = intervals.filter(like=AT_HALF).rename(columns=lambda name: name.removeprefix(AT_HALF))
    columns = (
        name_column("Finding"),
        measure_column("positives", count_of("positives")),
        *map(measure_column, DECIDED),
        *(measure_column(key, count_of(key)) for key in _COUNTED),
    )
    caption = f"Decisions at {threshold:g} for every finding"
    return frame_table("at-half", caption, columns, _joined(scores.to_frame(), ends))


def calibration_table(calibrated: pd.DataFrame, intervals: pd.DataFrame | None) -> Table:
    """Return Brier and ECE per finding before and after; rows macro and micro, if there, stay below."""
    columns = (
        name_column("Finding"),
        Column("Brier", "Of the probabilities as predicted", cell=number_of("brier", 4)),
        Column("Brier, calibrated", cell=number_of("calibrated_brier", 4)),
        Column("ECE", "Of the probabilities as predicted", cell=number_of("ece", 4)),
        Column("ECE, calibrated", cell=number_of("calibrated_ece", 4)),
    )
    frame = _joined(calibrated, intervals)
    return frame_table("calibration-table", "Calibration per finding", columns, frame)


def localization_table(localization: Localization) -> Table:
    """Return how often heat maps point into the boxes, per finding, beside chance."""
    table = localization.table
    overlaps = [name for name in table.columns if name.startswith(("iou_", "iobb_"))]
    columns = (
        name_column("Finding"),
        Column("Images", "Images with a box of the finding", cell=count_of("images")),
        Column("Boxes", cell=count_of("boxes")),
        Column("Hit rate", "Share of images whose hottest pixel lies in a box", cell=number_of("hit_rate")),
        Column(
            "Chance", "Hit rate of pointing blindly: mean share of the image that is in boxes", cell=number_of("chance")
        ),
        Column("Ratio", "Hit rate over chance", cell=number_of("ratio", 1)),
        *(
            Column(_overlap(name), "Share of images whose overlap is above this", cell=number_of(name))
            for name in overlaps
        ),
    )
    return frame_table("localization-table", "Localization per finding", columns, table)


def groups_table(macro: pd.DataFrame) -> Table:
    """Return the macro row of every group: its size, its AUROC and recall with their intervals."""
    columns = (
        name_column("Group", lambda row: Cell(f"{row['attribute']}: {row['group']}", row["name"])),
        Column("Images", cell=count_of("images")),
        Column("Patients", cell=count_of("patients")),
        Column("Findings", "How many findings the macro means are of", cell=count_of("findings")),
        Column("Macro AUROC", cell=number_of("auroc")),
        Column("Macro recall", "At the thresholds from val: the true-positive rate", cell=number_of("recall")),
    )
    frame = macro.set_index(macro["attribute"] + " " + macro["group"])
    return frame_table("groups-table", "Groups of patients", columns, frame)


def gaps_table(gaps: pd.DataFrame) -> Table | None:
    """Return a row a finding: per attribute the gap in the true-positive rate and its two groups.

    Findings and attributes without any gap are left out; None where there is none at all.
    """
    known = gaps[gaps["tpr_gap"].notna()]
    if known.empty:
        return None
    attributes = list(dict.fromkeys(known["attribute"]))
    found = {(row["finding"], row["attribute"]): row for row in known.to_dict("records")}
    columns = [name_column("Finding")]
    for attribute in attributes:
        hint = "Highest minus lowest true-positive rate"
        columns.append(Column(f"By {attribute}", hint, cell=lambda row, of=attribute: _gap(row[of])))  # type: ignore[misc]
    findings = list(dict.fromkeys(known["finding"]))
    cells = {of: [found.get((finding, of)) for finding in findings] for of in attributes}
    frame = pd.DataFrame(cells, index=findings, dtype=object)
    return frame_table("gaps-table", "Gaps in the true-positive rate", columns, frame)


def view_baseline_table(baseline: pd.DataFrame, scores: Scores, intervals: pd.DataFrame | None) -> Table:
    """Return the model's AUROC beside what view position alone scores, and the difference."""
    columns = (
        name_column("Finding"),
        Column("AUROC", cell=number_of("model")),
        Column("Of the view alone", cell=number_of("auroc")),
        Column("Above it", "The model's AUROC minus that of the view alone", cell=number_of("above")),
        Column("More often in", "The view with the greater share of positives", is_number=False, cell=text_of("view")),
    )
    ours = _joined(scores.to_frame()[["auroc"]], intervals).filter(regex="^auroc")
    ours = ours.rename(columns=lambda name: name.replace("auroc", "model"))
    frame = baseline.set_index("finding").join(ours)
    frame["above"] = frame["model"] - frame["auroc"]
    return frame_table("view-baseline-table", "View-only baseline", columns, frame)


def prevalence_table(manifest: Manifest, scored: str) -> Table:
    """Return positives and prevalence of each finding in each split; the scored one is marked."""
    columns, frame = [name_column("Finding")], pd.DataFrame(index=list(FINDINGS))
    for split in SPLITS:
        here = " (scored here)" if split == scored else ""
        number_key, share_key = f"{split}, n", f"{split}, %"
        columns += [
            Column(number_key, f"Images of {split} that show the finding", cell=count_of(number_key)),
            Column(share_key, f"Share of the images of {split}{here}", cell=percent_of(share_key, 2)),
        ]
        record = manifest.splits[split]
        frame[number_key] = [record.positives[finding] for finding in FINDINGS]
        frame[share_key] = [record.prevalence[finding] for finding in FINDINGS]
    return frame_table("prevalence-table", "Positives and prevalence per split", columns, frame)


def epochs_table(epochs: tuple[Mapping[str, Any], ...], name: str, number: int) -> Table:
    """Return a row an epoch of the run of this number: losses, time, throughput, data wait, best on val."""
    columns = (
        Column("Epoch", cell=count_of("epoch")),
        Column("Train loss", cell=number_of("train_loss", 4)),
        Column("Val loss", cell=number_of("val_loss", 4)),
        Column("Seconds", "Training time of the epoch, without validation", cell=number_of("seconds", 1)),
        Column("Images/s", cell=number_of("images_per_second", 1)),
        Column("Data wait", "Share of the time spent waiting for the loader", cell=percent_of("data_wait")),
        Column("On val", is_number=False, cell=text_of("on_val")),
    )
    best = [line["epoch"] for line in epochs if line.get("best")][-1:]
    on_val = ["best, kept" if line["epoch"] in best else "best so far" if line.get("best") else "" for line in epochs]
    frame = pd.DataFrame(list(epochs)).assign(on_val=on_val)
    return frame_table(f"epochs-{number}", f"Epochs of {name}", columns, frame)


def published_table(name: str, macro_auroc: float, auroc_interval: str, macro_f1: float, micro_f1: float) -> Table:
    """Return the run among published results on the official split and the baseline paper's, best first."""
    columns = (
        Column("Model", is_number=False, cell=text_of("model")),
        Column("Mean AUROC", cell=lambda row: number(row["macro_auroc"], small=row["small"])),
        Column("Macro F1", cell=number_of("macro_f1", 2)),
        Column("Micro F1", cell=number_of("micro_f1", 2)),
        Column("Test images", is_number=False, cell=lambda row: Cell(row["split"], row["split"].split()[0])),
        Column("Source", is_number=False, cell=text_of("source")),
    )
    ours = Published(name, macro_auroc, "this report", macro_f1, micro_f1)
    rows: list[dict[str, Any]] = [{**vars(ours), "small": auroc_interval, "split": "official split"}]
    rows += [{**vars(each), "small": "", "split": "official split"} for each in OFFICIAL]
    rows += [{**vars(each), "small": "", "split": "own random split"} for each in OWN_SPLIT]
    rows.sort(key=lambda row: -float(row["macro_auroc"]))
    return frame_table("published-table", "Published results", columns, pd.DataFrame(rows))


def _joined(frame: pd.DataFrame, intervals: pd.DataFrame | None) -> pd.DataFrame:
    return frame if intervals is None else frame.join(intervals)


def _gap(row: Mapping[str, Any] | None) -> Cell:
    if row is None:
        return Cell(MISSING)
    lowest, highest = row["lowest"], row["highest"]
    named = lowest and highest and not pd.isna(lowest)  # a mean of gaps lies between no two groups
    return number(row["tpr_gap"], small=f"{lowest} below {highest}" if named else "")


def _overlap(name: str) -> str:
    measure, _, threshold = name.partition("_")
    return f"{'IoU' if measure == 'iou' else 'IoBB'} > {threshold}"


def _lowest_auroc(frame: pd.DataFrame) -> float:
    """Return where the bars begin: at chance, or at the tenth below the lowest value."""
    values = [frame[column].min() for column in ("auroc", "auroc_low") if column in frame]
    known = [float(value) for value in values if not is_missing(value)]
    return min([_CHANCE, *(int(10 * value) / 10 for value in known)])


def _bar(row: Mapping[str, Any], lowest: float) -> tuple[float, float, float] | None:
    value = row["auroc"]
    if is_missing(value):
        return None
    has_interval = not is_missing(row.get("auroc_low"))
    low, high = (row["auroc_low"], row["auroc_high"]) if has_interval else (value, value)
    left, point, right = (round(100 * (each - lowest) / (1 - lowest), 2) for each in (low, value, high))
    return left, point, right
