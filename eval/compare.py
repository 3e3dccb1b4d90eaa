"""Compare runs on the same images: scores, paired differences to the first run, and cost; comparison.html."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from eval.ensemble import Images, joint_folder, require_same_images
from eval.evaluation import FITTED_ON, Evaluation
from eval.report.html import (
    MISSING,
    Cell,
    CellOf,
    Column,
    Row,
    Table,
    count_of,
    fill,
    frame_table,
    measure_title,
    name_column,
    number_of,
    read_picture,
    text_of,
)
from eval.report.plots import draw_comparison
from eval.result_files import remove, write_json, write_table
from eval.scores.bootstrap import compare
from eval.scores.metrics import MEASURES
from eval.training_log import duration, read_training_log
from shards.files import atomic_write_text
from trainer.model_file import ModelHeader
from trainer.run_directory import RunDirectory

# The three that are quoted most come first, then the rest as metrics.csv has them.
_SHOWN = tuple(dict.fromkeys(("auroc", "average_precision", "f1", *MEASURES)))
_DIFFERENCES = {"difference": "difference", "difference_low": "low", "difference_high": "high", "p": "p"}


@dataclass(frozen=True)
class Cost:
    """The price of a run, or of several that are used as one; None is a number nobody recorded."""

    parameters: int
    """That an image goes through; of several runs the sum."""
    images_per_second: float | None
    """In training, over all epochs; None of several runs, which may have run on different machines."""
    training_seconds: float | None
    """Of all epochs, without validation; what a killed process did after its last checkpoint is not in it."""
    epochs: int
    device: str | None
    """What it was trained on; None where several runs say different things."""


def cost_of(runs: Sequence[RunDirectory], headers: Sequence[ModelHeader]) -> Cost:
    """Add up one run's cost, or that of several. Raises BadData where a record is damaged."""
    logs = [read_training_log(run) for run in runs]
    recorded = all(log.epochs for log in logs)
    devices = {log.device for log in logs}
    return Cost(
        parameters=sum(header.parameters for header in headers),
        images_per_second=logs[0].images_per_second if recorded and len(logs) == 1 else None,
        training_seconds=sum(log.seconds for log in logs) if recorded else None,
        epochs=sum(len(log.epochs) for log in logs),
        device=devices.pop() if len(devices) == 1 else None,
    )


@dataclass(frozen=True, eq=False)
class RunComparison:
    """Evaluations of the same images, made with the same resamples of the same patients."""

    evaluations: tuple[Evaluation, ...]
    names: tuple[str, ...]
    """One an evaluation: its name, or its path where two have one name."""
    costs: tuple[Cost, ...]
    table: pd.DataFrame
    """A row per run, finding (then macro, micro) and measure: run, finding, measure, value, low, high, and
    of value minus the first run's: difference, difference_low, difference_high, p; NaN for the first."""

    @property
    def folder(self) -> Path:
        """Where its files go: A-vs-B/eval/SPLIT beside the first run.

        SPLIT has -DIGEST behind it where one of the runs is scored on other shards than its own.
        """
        first = self.evaluations[0]
        foreign = (each for each in self.evaluations if each.on_other_shards)
        runs = [run for each in self.evaluations for run in each.runs]
        return joint_folder(list(dict.fromkeys(runs)), "-vs-") / next(foreign, first).folder.name

    @property
    def warnings(self) -> tuple[str, ...]:
        """Those of the evaluations, each with its name before it."""
        named = zip(self.names, self.evaluations, strict=True)
        return tuple(f"{name}: {warning}" for name, each in named for warning in each.warnings)

    def write(self) -> Path:
        """Write comparison.csv (the table) and comparison.json (table and costs); return their folder.

        All that an earlier comparison left there is removed first, its page and picture too.
        """
        remove(self.folder, ["comparison.*"])
        write_table(self.folder / "comparison.csv", self.table, index=False)
        write_json(self.folder / "comparison.json", self.to_json())
        return self.folder

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists and numbers, with None for NaN."""
        first = self.evaluations[0]
        plain = self.table.astype(object).where(self.table.notna(), None)
        return {
            "split": first.split,
            "images": len(first.predictions[first.split].rows),
            "patients": first.patients,
            "thresholds_fitted_on": FITTED_ON,
            "rule": first.operating_point.rule,
            "first": self.names[0],
            "runs": {
                name: {"manifest_sha256": each.shards.digest, **dataclasses.asdict(cost)}
                for name, each, cost in zip(self.names, self.evaluations, self.costs, strict=True)
            },
            "warnings": list(self.warnings),
            "scores": plain.to_dict("records"),
        }

    def to_text(self) -> str:
        """Return for a terminal AUROC and F1 per finding, run beside run, and the costs under them."""
        costs = {
            name: {
                "parameters": f"{cost.parameters:,}",
                "images/s": _number(cost.images_per_second, ".1f"),
                "training": "-" if cost.training_seconds is None else duration(cost.training_seconds),
                "epochs": str(cost.epochs),
                "trained on": cost.device or "-",
            }
            for name, cost in zip(self.names, self.costs, strict=True)
        }
        tables = [self._beside(measure) for measure in ("auroc", "f1")]
        return "\n\n".join([*tables, pd.DataFrame(costs).T.to_string()])

    def _beside(self, measure: str) -> str:
        chosen = self.table[self.table["measure"] == measure]
        columns: dict[str, list[str]] = {}
        for place, name in enumerate(self.names):
            rows = chosen[chosen["run"] == name]
            columns[name] = [_number(value) for value in rows["value"]]
            if place:
                columns[f"{name} - {self.names[0]}"] = [
                    f"{_number(row.difference, '+.3f')} ({_number(row.difference_low, '+.3f')} to "
                    f"{_number(row.difference_high, '+.3f')}) p {_number(row.p)}"
                    for row in rows.itertuples()
                ]
        findings = chosen["finding"][chosen["run"] == self.names[0]]
        text = pd.DataFrame(columns, index=list(findings)).to_string()
        return f"{measure_title(measure)}, and the difference with its 95 % confidence interval\n{text}"


def compare_runs(evaluations: Sequence[Evaluation]) -> RunComparison:
    """Compare each evaluation with the first. All must have been resampled.

    Raises BadData, as `require_same_images` does, where they are not of the same images.
    """
    names = [each.name for each in evaluations]
    if len(set(names)) < len(names):
        names = [str(each.folder) for each in evaluations]
    first = evaluations[0]
    for part in dict.fromkeys((FITTED_ON, first.split)):
        require_same_images(
            [Images.of_predictions(each.name, each.shards, each.predictions[part]) for each in evaluations], part
        )
    parts = [part for name, each in zip(names, evaluations, strict=True) for part in _by_measure(name, each, first)]
    return RunComparison(
        evaluations=tuple(evaluations),
        names=tuple(names),
        costs=tuple(cost_of(each.runs, each.headers) for each in evaluations),
        table=pd.concat(parts, ignore_index=True),
    )


def _by_measure(name: str, evaluation: Evaluation, first: Evaluation) -> Iterator[pd.DataFrame]:
    """Yield the slices of the table that are about one evaluation, one a measure."""
    assert evaluation.resampled is not None and first.resampled is not None
    scores, intervals = evaluation.scores.to_frame(), evaluation.resampled.intervals()
    differences = None
    if evaluation is not first:
        differences = compare(first.resampled, evaluation.resampled, first.scores, evaluation.scores)
    for measure in MEASURES:
        columns: dict[str, Any] = {
            "run": name,
            "finding": scores.index,
            "measure": measure,
            "value": scores[measure].to_numpy(),
            "low": intervals[f"{measure}_low"].to_numpy(),
            "high": intervals[f"{measure}_high"].to_numpy(),
        }
        for column, kind in _DIFFERENCES.items():
            columns[column] = float("nan") if differences is None else differences[f"{measure}_{kind}"].to_numpy()
        yield pd.DataFrame(columns)


def _number(value: Any, form: str = ".3f") -> str:
    return "-" if value is None or pd.isna(value) else format(float(value), form)


def write_comparison(comparison: RunComparison) -> Path:
    """Write what `RunComparison.write` does, comparison.png and comparison.html; return their folder.

    The page, like report.html, asks nothing of the network.
    """
    folder = comparison.write()
    table, first = comparison.table, comparison.evaluations[0]
    images = f"{len(first.predictions[first.split].rows):,}"
    plot = folder / "comparison.png"
    draw_comparison(table[table["measure"] == "auroc"], comparison.names, f"{first.split} split, {images} images", plot)
    page = fill(
        "comparison.html",
        names=comparison.names,
        split=first.split,
        images=images,
        patients=f"{first.patients:,}",
        fitted_on=FITTED_ON,
        rule=first.operating_point.rule,
        warnings=comparison.warnings,
        picture=read_picture(plot),
        costs=_costs_table(comparison),
        tables=[(measure_title(measure), _measure_table(comparison, measure)) for measure in _SHOWN],
    )
    atomic_write_text(folder / "comparison.html", page)
    return folder


def _costs_table(comparison: RunComparison) -> Table:
    columns = (
        Column("Run", is_number=False, cell=text_of("run")),
        Column("Macro AUROC", cell=number_of("auroc")),
        Column("Macro F1", cell=number_of("f1")),
        Column("Parameters", cell=count_of("parameters")),
        Column("Images/s", "In training, over all epochs", cell=number_of("images_per_second", 1)),
        Column("Training time", "Of all epochs, without validation", cell=_training_time),
        Column("Epochs", cell=count_of("epochs")),
        Column("Trained on", is_number=False, cell=text_of("device")),
    )
    rows = []
    for name, each, cost in zip(comparison.names, comparison.evaluations, comparison.costs, strict=True):
        scores: dict[str, Any] = {key: each.scores.macro[key] for key in ("auroc", "f1")}
        if each.intervals is not None:
            scores |= {key: each.intervals.at["macro", key] for key in ("auroc_low", "auroc_high")}
        rows.append({"run": name, **vars(cost), **scores})
    return frame_table("costs-table", "Runs and their cost", columns, pd.DataFrame(rows))


def _training_time(row: Row) -> Cell:
    seconds = row["training_seconds"]
    return Cell(MISSING) if pd.isna(seconds) else Cell(duration(seconds), seconds)


def _measure_table(comparison: RunComparison, measure: str) -> Table:
    """Return one row per finding: every run's value, and the other runs' difference to the first."""
    names, chosen = comparison.names, comparison.table[comparison.table["measure"] == measure]
    columns, differences = [name_column("Finding")], []
    frame = pd.DataFrame(index=chosen["finding"].unique())
    for number, name in enumerate(names):
        mine = chosen[chosen["run"] == name].set_index("finding")
        frame = frame.join(mine.rename(columns={"low": "value_low", "high": "value_high"}).add_prefix(f"{number}_"))
        columns.append(Column(name, cell=number_of(f"{number}_value")))
        if number:
            differences += [
                Column(f"{name} minus {names[0]}", cell=_difference_of(f"{number}_difference")),
                Column("p", "Two-sided, of this difference", cell=number_of(f"{number}_p")),
            ]
    title = f"{measure_title(measure)} side by side"
    return frame_table(f"compared-{measure}", title, [*columns, *differences], frame)


def _difference_of(key: str) -> CellOf:
    def cell(row: Row) -> Cell:
        difference, low, high = (row[name] for name in (key, f"{key}_low", f"{key}_high"))
        if pd.isna(difference):
            return Cell(MISSING)
        return Cell(f"{difference:+.3f}", difference, "" if pd.isna(low) else f"{low:+.3f} to {high:+.3f}")

    return cell
