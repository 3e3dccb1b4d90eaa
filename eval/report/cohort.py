"""The tables around the scores: groups of patients, prevalence, the run's epochs, published results."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from eval.report.published import OFFICIAL, OWN_SPLIT, Published
from eval.report.table import (
    MISSING,
    Cell,
    Column,
    Table,
    count,
    interval,
    name_cell,
    number,
    percent,
    text_cell,
)
from eval.scores.bootstrap import MEANS
from eval.scores.metrics import Scores
from shards.manifest import Manifest
from shards.splits import SPLITS


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


def floor_table(floor: pd.DataFrame, scores: Scores, intervals: pd.DataFrame | None) -> Table:
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
    for row in floor.to_dict("records"):
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
    return Table("floor-table", "The floor: view position alone", columns, tuple(rows.values()), means)


def prevalence_table(manifest: Manifest, scored: str, findings: tuple[str, ...]) -> Table:
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
    for finding in findings:
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
