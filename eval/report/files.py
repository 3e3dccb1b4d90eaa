"""The files of an evaluation: scores as JSON and CSV, plots, and report.html."""

import math
from pathlib import Path
from typing import Any

import pandas as pd

from eval.evaluation import FITTED_ON, Evaluation
from eval.report.page import render
from eval.report.pictures import draw_pictures
from eval.result_files import remove, write_json, write_table
from eval.scores.bootstrap import LEVEL, Resampled
from eval.scores.thresholds import parse_rule
from eval.training_log import read_training_log
from shards.files import atomic_write_text


def thresholds_record(evaluation: Evaluation) -> dict[str, Any]:
    """Return thresholds.json: the rule, the split they were fitted on, and one number a finding."""
    return {
        "rule": evaluation.operating_point.rule,
        "meaning": f"probability >= threshold; {parse_rule(evaluation.operating_point.rule).meaning}",
        "fitted_on": FITTED_ON,
        "thresholds": {name: None if math.isnan(cut) else cut for name, cut in evaluation.thresholds.items()},
    }


def metrics_record(evaluation: Evaluation) -> dict[str, Any]:
    """Return metrics.json: what was scored on what, and every score; None where there is none."""
    resampled = evaluation.resampled
    return {
        "run": evaluation.name,
        "runs": [run.name for run in evaluation.runs],
        "split": evaluation.split,
        "split_rule": evaluation.shards.manifest.recipe["split"],
        "manifest_sha256": evaluation.shards.digest,
        "scored_on_manifest_sha256": list(evaluation.scored_on),
        "trained_on_manifest_sha256": list(evaluation.trained_on),
        "mirror_averaged": evaluation.operating_point.tta,
        "patients": evaluation.patients,
        "threshold_rule": evaluation.operating_point.rule,
        "thresholds_fitted_on": FITTED_ON,
        **evaluation.scores.to_json(),
        "warnings": list(evaluation.warnings),
        "at_half": evaluation.at_half.to_json(),
        "intervals": None
        if resampled is None or evaluation.intervals is None
        else _intervals(resampled, evaluation.intervals),
        "calibration": None if evaluation.calibrated is None else _frame(evaluation.calibrated),
        "subgroups": None if evaluation.subgroups is None else evaluation.subgroups.to_json(),
        "localization": None
        if evaluation.explanation.localization is None
        else _frame(evaluation.explanation.localization.table),
    }


def _intervals(resampled: Resampled, intervals: pd.DataFrame) -> dict[str, Any]:
    return {"level": LEVEL, "resamples": resampled.resamples, "seed": resampled.seed, "values": _frame(intervals)}


def _frame(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Return a frame as a dict of its rows by index, with None for NaN."""
    return {
        str(name): {str(key): None if pd.isna(value) else value for key, value in row.items()}
        for name, row in frame.to_dict("index").items()
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
    folder = evaluation.folder
    remove(folder, _OF_AN_EVALUATION)
    write_json(folder / "metrics.json", metrics_record(evaluation))
    write_json(folder / "thresholds.json", thresholds_record(evaluation))
    write_table(folder / "metrics.csv", evaluation.scores.to_frame())
    if evaluation.intervals is not None:
        write_table(folder / "intervals.csv", evaluation.intervals)
    if evaluation.operating_point.calibration is not None and evaluation.calibrated is not None:
        write_json(folder / "calibration.json", evaluation.operating_point.calibration.to_json())
        write_table(folder / "calibration.csv", evaluation.calibrated)
    groups = evaluation.subgroups
    if groups is not None:
        for name, frame in (("subgroups", groups.table), ("gaps", groups.gaps), ("floor", groups.view_baseline)):
            write_table(folder / f"{name}.csv", frame, index=False)
    if evaluation.explanation.localization is not None:
        atomic_write_text(folder / "localization.csv", evaluation.explanation.localization.to_csv())
    return folder


def write_report(evaluation: Evaluation) -> Path:
    """Write what `write_scores` does, the pictures, and report.html; return the folder.

    Errors are those of `write_scores`, and BadData for a damaged metrics.jsonl, config.json or
    environment.json of a run.
    """
    folder = write_scores(evaluation)
    logs = tuple(read_training_log(run) for run in evaluation.runs)
    pictures = draw_pictures(evaluation, logs)
    atomic_write_text(folder / "report.html", render(evaluation, logs, pictures))
    return folder
