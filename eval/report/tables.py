"""The tables of report.html."""

import dataclasses
import math
from typing import Any

import pandas as pd

from eval.heatmaps.localization import OVERLAPS, Localization
from eval.report.html import (
    MISSING,
    Cell,
    Column,
    Row,
    Table,
    count_of,
    frame_table,
    measure_column,
    name_column,
    number,
    number_of,
    percent_of,
    text_of,
)
from eval.scores.bootstrap import AT_HALF
from eval.scores.metrics import DECIDED, Scores
from eval.training_log import TrainingLog
from shards.manifest import Manifest
from shards.splits import SPLITS

_COUNTED = ("tp", "fp", "fn", "tn")
_CHANCE = 0.5  # of an AUROC


def scores_table(scores: Scores, intervals: pd.DataFrame | None) -> Table:
    """Return the main table: every measure per finding at the thresholds from val, the means below."""
    frame = _joined(scores.to_frame(), intervals)
    lowest = _lowest_auroc(frame)

    def auroc(row: Row) -> Cell:
        return dataclasses.replace(number_of("auroc")(row), bar=_bar(row, lowest))

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


def decisions_table(at_half: Scores, intervals: pd.DataFrame | None) -> Table:
    """Return the measures of decisions at 0.5, with their intervals."""
    ends = None
    if intervals is not None:
        ends = intervals.filter(like=AT_HALF).rename(columns=lambda name: name.removeprefix(AT_HALF))
    columns = (
        name_column("Finding"),
        measure_column("positives", count_of("positives")),
        *map(measure_column, DECIDED),
        *(measure_column(key, count_of(key)) for key in _COUNTED),
    )
    return frame_table("at-half", "Decisions at 0.5 for every finding", columns, _joined(at_half.to_frame(), ends))


def calibration_table(calibrated: pd.DataFrame, intervals: pd.DataFrame | None) -> Table:
    """Return Brier and ECE per finding before and after; rows macro and micro, if there, stay below."""
    columns = (
        name_column("Finding"),
        Column("Brier", "Of the probabilities as predicted", cell=number_of("brier", 4)),
        Column("Brier, calibrated", cell=number_of("calibrated_brier", 4)),
        Column("ECE", "Of the probabilities as predicted", cell=number_of("ece", 4)),
        Column("ECE, calibrated", cell=number_of("calibrated_ece", 4)),
    )
    return frame_table("calibration-table", "Calibration per finding", columns, _joined(calibrated, intervals))


def localization_table(localization: Localization) -> Table:
    """Return how often heat maps point into the boxes, per finding, beside chance."""
    columns = (
        name_column("Finding"),
        Column("Images", "Images with a box of the finding", cell=count_of("images")),
        Column("Boxes", cell=count_of("boxes")),
        Column("Hit rate", "Share of images whose hottest pixel lies in a box", cell=number_of("hit_rate")),
        Column("Chance", "Hit rate of a random pixel: mean share of the image in boxes", cell=number_of("chance")),
        Column("Ratio", "Hit rate over chance", cell=number_of("ratio", 1)),
        *(
            Column(f"{title} > {overlap}", "Share of images above this overlap", cell=number_of(f"{key}_{overlap}"))
            for title, key in (("IoU", "iou"), ("IoBB", "iobb"))
            for overlap in OVERLAPS
        ),
    )
    return frame_table("localization-table", "Localization per finding", columns, localization.table)


def groups_table(macro: pd.DataFrame) -> Table:
    """Return the macro row of every group: its size, its AUROC and recall with their intervals."""
    columns = (
        Column("Group", is_number=False, cell=lambda row: Cell(f"{row['attribute']}: {row['group']}", row["name"])),
        Column("Images", cell=count_of("images")),
        Column("Patients", cell=count_of("patients")),
        Column("Findings", "Findings in the macro means", cell=count_of("findings")),
        Column("Macro AUROC", cell=number_of("auroc")),
        Column("Macro recall", "At the thresholds from val: the true-positive rate", cell=number_of("recall")),
    )
    frame = macro.set_index(macro["attribute"] + " " + macro["group"])
    return frame_table("groups-table", "Groups of patients", columns, frame)


def gaps_table(gaps: pd.DataFrame) -> Table | None:
    """Return one row per finding: per attribute the gap in the true-positive rate and its two groups.

    Findings and attributes without any gap are left out; None where there is none at all.
    """
    known = gaps[gaps["tpr_gap"].notna()]
    if known.empty:
        return None
    gap_of: dict[tuple[str, str], Any] = {(row["finding"], row["attribute"]): row for row in known.to_dict("records")}

    def column(attribute: str) -> Column:
        hint = "Highest minus lowest true-positive rate"
        return Column(f"By {attribute}", hint, cell=lambda row: _gap(gap_of.get((row["finding"], attribute))))

    columns = [name_column("Finding"), *map(column, known["attribute"].unique())]
    frame = known[["finding"]].drop_duplicates().set_index("finding", drop=False)
    return frame_table("gaps-table", "Gaps in the true-positive rate", columns, frame)


def view_baseline_table(baseline: pd.DataFrame, scores: Scores, intervals: pd.DataFrame | None) -> Table:
    """Return the model's AUROC beside that of the view position alone, and the difference."""
    columns = (
        name_column("Finding"),
        Column("AUROC", cell=number_of("model")),
        Column("View-only AUROC", cell=number_of("auroc")),
        Column("Difference", "The model's AUROC minus the view-only AUROC", cell=number_of("above")),
        Column("More often in", "The view with the greater share of positives", is_number=False, cell=text_of("view")),
    )
    ours = _joined(scores.to_frame()[["auroc"]], intervals).filter(regex="^auroc")
    ours = ours.rename(columns=lambda name: name.replace("auroc", "model"))
    frame = baseline.set_index("finding").join(ours)
    frame["above"] = frame["model"] - frame["auroc"]
    return frame_table("view-baseline-table", "View-only baseline", columns, frame)


def prevalence_table(manifest: Manifest, scored: str) -> Table:
    """Return positives and prevalence of each finding in each split; the scored one is marked."""
    columns, frame = [name_column("Finding")], pd.DataFrame(index=list(manifest.findings))
    for split in SPLITS:
        number_key, share_key, here = f"{split}, n", f"{split}, %", " (scored here)" if split == scored else ""
        columns += [
            Column(number_key, f"Images of {split} that show the finding", cell=count_of(number_key)),
            Column(share_key, f"Share of the images of {split}{here}", cell=percent_of(share_key, 2)),
        ]
        record = manifest.splits[split]
        frame[number_key] = list(record.positives.values())
        frame[share_key] = list(record.prevalence.values())
    return frame_table("prevalence-table", "Positives and prevalence per split", columns, frame)


def epochs_table(log: TrainingLog, number: int) -> Table:
    """Return one row per epoch of the run of this number: losses, time, throughput, data wait, best on val."""
    columns = (
        Column("Epoch", cell=count_of("epoch")),
        Column("Train loss", cell=number_of("train_loss", 4)),
        Column("Val loss", cell=number_of("val_loss", 4)),
        Column("Seconds", "Training time of the epoch, without validation", cell=number_of("seconds", 1)),
        Column("Images/s", cell=number_of("images_per_second", 1)),
        Column("Data wait", "Share of the time spent waiting for the loader", cell=percent_of("data_wait")),
        Column("On val", is_number=False, cell=text_of("on_val")),
    )
    frame = pd.DataFrame(list(log.epochs)).assign(on_val="")
    frame.loc[[bool(line.get("best")) for line in log.epochs], "on_val"] = "best so far"
    frame.loc[frame["epoch"] == log.best_epoch, "on_val"] = "best, saved"
    return frame_table(f"epochs-{number}", f"Epochs of {log.name}", columns, frame)


def _joined(frame: pd.DataFrame, intervals: pd.DataFrame | None) -> pd.DataFrame:
    return frame if intervals is None else frame.join(intervals)


def _gap(row: Row | None) -> Cell:
    if row is None:
        return Cell(MISSING)
    lowest, highest = row["lowest"], row["highest"]
    named = lowest and highest and not pd.isna(lowest)  # a mean of gaps lies between no two groups
    return number(row["tpr_gap"], small=f"{lowest} below {highest}" if named else "")


def _lowest_auroc(frame: pd.DataFrame) -> float:
    """Return where the bars begin: at chance, or at the tenth below the lowest value."""
    lowest: Any = frame.filter(["auroc", "auroc_low"]).min(axis=None)
    return _CHANCE if math.isnan(lowest) else min(_CHANCE, int(10 * lowest) / 10)


def _bar(row: Row, lowest: float) -> tuple[float, float, float] | None:
    value = row["auroc"]
    if pd.isna(value):
        return None
    ends = [value if pd.isna(row.get(key)) else row[key] for key in ("auroc_low", "auroc_high")]
    low, point, high = (round(100 * (each - lowest) / (1 - lowest), 2) for each in (ends[0], value, ends[1]))
    return low, point, high
