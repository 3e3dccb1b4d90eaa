"""comparison.html: several runs on the same images side by side, with their costs."""

from pathlib import Path
from typing import Any

import pandas as pd

from eval.compare import RunComparison
from eval.evaluation import FITTED_ON
from eval.report.html import (
    TITLES,
    Cell,
    Column,
    Table,
    count,
    fill,
    interval,
    is_missing,
    name_cell,
    number,
    read_picture,
    text_cell,
)
from eval.report.overview_plots import draw_comparison
from eval.scores.metrics import MEASURES
from eval.training_log import duration
from shards.files import atomic_write_text

# The three that are quoted most come first, then the rest as metrics.csv has them.
_SHOWN = tuple(dict.fromkeys(("auroc", "average_precision", "f1", *MEASURES)))
_MEANS = ("macro", "micro")


def write_comparison(comparison: RunComparison) -> Path:
    """Write comparison.csv, comparison.json, comparison.png and comparison.html; return their folder."""
    folder = comparison.write()
    table, first = comparison.table, comparison.evaluations[0]
    draw_comparison(
        table[table["measure"] == "auroc"],
        comparison.names,
        f"{first.split} split, {len(first.predictions[first.split].rows):,} images",
        folder / "comparison.png",
    )
    atomic_write_text(folder / "comparison.html", render_comparison(comparison, folder / "comparison.png"))
    return folder


def render_comparison(comparison: RunComparison, picture: Path) -> str:
    """Return the text of comparison.html, which like report.html asks nothing of the network.

    `picture` is the PNG that `draw_comparison` drew of it.
    """
    first = comparison.evaluations[0]
    split = first.split
    return fill(
        "comparison.html",
        names=comparison.names,
        split=split,
        images=f"{len(first.predictions[split].rows):,}",
        patients=f"{first.patients:,}",
        fitted_on=FITTED_ON,
        rule=first.operating_point.rule,
        warnings=comparison.warnings,
        picture=read_picture("comparison", picture, "AUROC of every run on every finding"),
        costs=_costs_table(comparison),
        tables=[(TITLES.get(each, each.capitalize()), _measure_table(comparison, each)) for each in _SHOWN],
    )


def _costs_table(comparison: RunComparison) -> Table:
    columns = (
        Column("Run", is_number=False),
        Column("Macro AUROC"),
        Column("Macro F1"),
        Column("Parameters"),
        Column("Images/s", "In training, over all epochs"),
        Column("Training time", "Of all epochs, without validation"),
        Column("Epochs"),
        Column("Trained on", is_number=False),
    )
    rows = []
    for name, each, cost in zip(comparison.names, comparison.evaluations, comparison.costs, strict=True):
        seconds = cost.training_seconds
        ends = () if each.intervals is None else each.intervals.loc["macro", ["auroc_low", "auroc_high"]]
        rows.append(
            (
                Cell(name, name),
                number(each.scores.macro["auroc"], small=interval(*ends) if len(ends) else ""),
                number(each.scores.macro["f1"]),
                count(cost.parameters),
                number(cost.images_per_second, 1),
                Cell(duration(seconds), seconds) if seconds is not None else number(None),
                count(cost.epochs),
                text_cell(cost.device),
            )
        )
    return Table("costs-table", "Runs and their cost", columns, tuple(rows))


def _measure_table(comparison: RunComparison, measure: str) -> Table:
    """Return a row a finding: every run's value, and the other runs' difference to the first."""
    names, chosen = comparison.names, comparison.table[comparison.table["measure"] == measure]
    columns = [Column("Finding", is_number=False), *(Column(name) for name in names)]
    for name in names[1:]:
        columns += [Column(f"{name} minus {names[0]}"), Column("p", "Two-sided, of this difference")]
    by_run = {name: chosen[chosen["run"] == name].set_index("finding") for name in names}
    rows = {}
    for finding in by_run[names[0]].index:
        values = [by_run[name].loc[finding] for name in names]
        cells = [name_cell(finding)]
        cells += [number(value["value"], small=interval(value["low"], value["high"])) for value in values]
        for value in values[1:]:
            cells += [_difference(value), number(value["p"])]
        rows[finding] = tuple(cells)
    means = tuple(rows.pop(mean) for mean in _MEANS if mean in rows)
    title = TITLES.get(measure, measure.capitalize())
    return Table(f"compared-{measure}", f"{title} side by side", tuple(columns), tuple(rows.values()), means)


def _difference(value: "pd.Series[Any]") -> Cell:
    if is_missing(value["difference"]):
        return number(None)
    ends = (
        ""
        if is_missing(value["difference_low"])
        else (f"{value['difference_low']:+.3f} to {value['difference_high']:+.3f}")
    )
    return Cell(f"{value['difference']:+.3f}", float(value["difference"]), ends)
