"""What metrics.json and thresholds.json hold."""

import math
from typing import Any

import pandas as pd

from eval.evaluation import FITTED_ON, Evaluation
from eval.scores.bootstrap import Resampled
from eval.scores.thresholds import parse_rule

LEVEL = 0.95
"""Of the intervals in files and pages."""


def thresholds_record(evaluation: Evaluation) -> dict[str, Any]:
    """Return thresholds.json: the rule, the split they were fitted on, and one number a finding."""
    return {
        "rule": evaluation.rule,
        "meaning": f"probability >= threshold; {parse_rule(evaluation.rule).meaning}",
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
        "mirror_averaged": evaluation.tta,
        "patients": evaluation.patients,
        "threshold_rule": evaluation.rule,
        "thresholds_fitted_on": FITTED_ON,
        **evaluation.scores.to_json(),
        "warnings": list(evaluation.warnings),
        "at_half": evaluation.at_half.to_json(),
        "intervals": None
        if resampled is None or evaluation.intervals is None
        else _intervals(resampled, evaluation.intervals),
        "calibration": None if evaluation.calibrated is None else _frame(evaluation.calibrated),
        "subgroups": None if evaluation.subgroups is None else evaluation.subgroups.to_json(),
        "localization": None if evaluation.localization is None else _frame(evaluation.localization.table),
    }


def _intervals(resampled: Resampled, intervals: pd.DataFrame) -> dict[str, Any]:
    return {
        "level": LEVEL,
        "resamples": resampled.resamples,
        "seed": resampled.seed,
        "values": _frame(intervals),
    }


def _frame(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Return a frame as a dict of its rows by index, with None for NaN."""
    return {
        str(name): {str(key): None if pd.isna(value) else value for key, value in row.items()}
        for name, row in frame.to_dict("index").items()
    }
