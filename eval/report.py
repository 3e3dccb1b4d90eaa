"""The files of an evaluation under runs/NAME/eval/SPLIT/."""

import json
import math
from pathlib import Path
from typing import Any

from eval.evaluation import FITTED_ON, Evaluation
from eval.plots import draw_precision_recall, draw_roc
from shards.findings import FINDINGS
from shards.publishing import publish_text


def write_report(evaluation: Evaluation) -> Path:
    """Write predictions.csv, thresholds.json, metrics.json, metrics.csv and the curves; return the folder.

    The predictions that the thresholds were fitted on stand beside them as val_predictions.csv.
    """
    split, folder = evaluation.split, evaluation.folder
    for part, predictions in evaluation.predictions.items():
        name = "predictions.csv" if part == split else f"{part}_predictions.csv"
        predictions.to_csv(folder / name, evaluation.shards)
    publish_text(folder / "thresholds.json", json_text(thresholds_record(evaluation)))
    publish_text(folder / "metrics.json", json_text(metrics_record(evaluation)))
    publish_text(folder / "metrics.csv", evaluation.scores.to_frame().to_csv(lineterminator="\n"))
    scored = evaluation.predictions[split]
    for draw, name in ((draw_roc, "roc.png"), (draw_precision_recall, "precision_recall.png")):
        draw(
            scored.labels,
            scored.probabilities,
            FINDINGS,
            f"{evaluation.run.name}, {split} split",
            folder / name,
        )
    return folder


def thresholds_record(evaluation: Evaluation) -> dict[str, Any]:
    """Return thresholds.json: the rule, the split they were fitted on, and one number a finding."""
    return {
        "rule": "probability >= threshold, the exact maximum of F1; the highest of equal ones",
        "fitted_on": FITTED_ON,
        "thresholds": {name: None if math.isnan(cut) else cut for name, cut in evaluation.thresholds.items()},
    }


def metrics_record(evaluation: Evaluation) -> dict[str, Any]:
    """Return metrics.json: what was scored on what, and every score; None where there is none."""
    return {
        "run": evaluation.run.name,
        "split": evaluation.split,
        "split_rule": evaluation.shards.manifest.recipe["split"],
        "manifest_sha256": evaluation.shards.digest,
        "trained_on_manifest_sha256": evaluation.trained_on,
        "patients": evaluation.shards.manifest.splits[evaluation.split].patients,
        "thresholds_fitted_on": FITTED_ON,
        **evaluation.scores.to_json(),
    }


def json_text(record: dict[str, Any]) -> str:
    """Return a record as the text of a JSON file, without NaN, which JSON does not have."""
    return json.dumps(record, indent=1, allow_nan=False) + "\n"
