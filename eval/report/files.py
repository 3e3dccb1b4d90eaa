"""The files of an evaluation: scores as JSON and CSV, plots, and report.html."""

from pathlib import Path
from typing import Any

from eval.evaluation import FITTED_ON, Evaluation
from eval.report.html import Picture, read_picture
from eval.report.page import render
from eval.report.plots import (
    draw_confusion,
    draw_precision_recall,
    draw_prevalence,
    draw_reliability,
    draw_roc,
    draw_subgroups,
    draw_training,
)
from eval.result_files import remove, write_json, write_table
from eval.scores.bootstrap import LEVEL
from eval.scores.metrics import plain_rows
from eval.scores.subgroups import MACRO
from eval.scores.thresholds import parse_rule
from eval.training_log import TrainingLog, read_training_log
from shards.files import atomic_write_text


def metrics_record(evaluation: Evaluation) -> dict[str, Any]:
    """Return metrics.json: what was scored on what, and every score; None where there is none."""
    point, resampled, localization = (
        evaluation.operating_point,
        evaluation.resampled,
        evaluation.explanation.localization,
    )
    intervals = None
    if resampled is not None and evaluation.intervals is not None:
        settings = {"level": LEVEL, "resamples": resampled.resamples, "seed": resampled.seed}
        intervals = {**settings, "values": plain_rows(evaluation.intervals.to_dict("index"))}
    return {
        "run": evaluation.name,
        "runs": [run.name for run in evaluation.runs],
        "split": evaluation.split,
        "split_rule": evaluation.shards.manifest.recipe["split"],
        "manifest_sha256": evaluation.shards.digest,
        "scored_on_manifest_sha256": list(evaluation.scored_on),
        "trained_on_manifest_sha256": list(evaluation.trained_on),
        "mirror_averaged": point.tta,
        "patients": evaluation.patients,
        "threshold_rule": point.rule,
        "thresholds_fitted_on": FITTED_ON,
        **evaluation.scores.to_json(),
        "warnings": list(evaluation.warnings),
        "at_half": evaluation.at_half.to_json(),
        "intervals": intervals,
        "calibration": None if evaluation.calibrated is None else plain_rows(evaluation.calibrated.to_dict("index")),
        "subgroups": None if evaluation.subgroups is None else evaluation.subgroups.to_json(),
        "localization": None if localization is None else plain_rows(localization.table.to_dict("index")),
    }


# Those files of an evaluation that another one of the same images may not have.
_OF_AN_EVALUATION = (
    *("metrics.*", "thresholds.json", "*.png", "report.html", "intervals.csv", "calibration.*"),
    *("subgroups.csv", "gaps.csv", "floor.csv", "localization.csv"),
)


def write_scores(evaluation: Evaluation) -> Path:
    """Write every number of an evaluation beside its predictions; return the folder.

    metrics.json, metrics.csv and thresholds.json always; intervals.csv, calibration.json,
    calibration.csv, subgroups.csv, gaps.csv, floor.csv and localization.csv where the evaluation has
    them. Each is written atomically; the files of an earlier evaluation are removed first, so
    that nothing stands beside numbers that it does not belong to. Raises ResourceMissing from the disk.
    """
    folder, point, groups = evaluation.folder, evaluation.operating_point, evaluation.subgroups
    remove(folder, _OF_AN_EVALUATION)
    write_json(folder / "metrics.json", metrics_record(evaluation))
    thresholds = {
        "rule": point.rule,
        "meaning": f"probability >= threshold; {parse_rule(point.rule).meaning}",
        "fitted_on": FITTED_ON,
        "thresholds": point.by_finding(),
    }
    write_json(folder / "thresholds.json", thresholds)
    write_table(folder / "metrics.csv", evaluation.scores.to_frame())
    if evaluation.intervals is not None:
        write_table(folder / "intervals.csv", evaluation.intervals)
    if point.calibration is not None and evaluation.calibrated is not None:
        write_json(folder / "calibration.json", point.calibration.to_json())
        write_table(folder / "calibration.csv", evaluation.calibrated)
    if groups is not None:
        for name, frame in (("subgroups", groups.table), ("gaps", groups.gaps), ("floor", groups.view_baseline)):
            write_table(folder / f"{name}.csv", frame, index=False)
    if evaluation.explanation.localization is not None:
        atomic_write_text(folder / "localization.csv", evaluation.explanation.localization.to_csv())
    return folder


def write_report(evaluation: Evaluation) -> Path:
    """Write what `write_scores` does, the plots, and report.html; return the folder.

    Errors are those of `write_scores`, and BadData for a damaged metrics.jsonl, config.json or
    environment.json of a run.
    """
    folder = write_scores(evaluation)
    logs = tuple(read_training_log(run) for run in evaluation.runs)
    atomic_write_text(folder / "report.html", render(evaluation, logs, _draw_plots(evaluation, logs)))
    return folder


def _draw_plots(evaluation: Evaluation, logs: tuple[TrainingLog, ...]) -> dict[str, Picture]:
    """Draw every plot of the report into the evaluation's folder, which has no PNG yet; return them by name.

    These are roc, precision_recall, confusion, reliability, prevalence, where there are groups
    subgroups, and per run with epochs training-1, -2, ...
    """
    scored, calibration = evaluation.predictions[evaluation.split], evaluation.operating_point.calibration
    arrays, findings = (scored.labels, scored.probabilities), evaluation.operating_point.findings
    calibrated = None if calibration is None else calibration.apply(scored.probabilities)
    folder, title = evaluation.folder, f"{evaluation.name}, {evaluation.split} split"
    draw_roc(*arrays, findings, title, folder / "roc.png")
    draw_precision_recall(*arrays, findings, title, folder / "precision_recall.png")
    draw_confusion(
        evaluation.scores.per_finding, f"{title}, thresholds fitted on {FITTED_ON}", folder / "confusion.png"
    )
    draw_reliability(*arrays, calibrated, findings, title, folder / "reliability.png")
    if evaluation.subgroups is not None:
        table = evaluation.subgroups.table
        macro = table[table["finding"] == MACRO]
        draw_subgroups(macro, evaluation.scores.macro["auroc"], title, folder / "subgroups.png")
    splits = evaluation.shards.manifest.splits
    draw_prevalence(
        {name: record.prevalence for name, record in splits.items()},
        {name: record.images for name, record in splits.items()},
        "Prevalence of the findings in each split",
        folder / "prevalence.png",
    )
    for number, log in enumerate(logs, start=1):
        if log.epochs:  # by number, not by the run's name: two averaged runs may share one
            draw_training(log.epochs, log.name, folder / f"training-{number}.png")
    return {path.stem: read_picture(path) for path in folder.glob("*.png")}
