"""The files of an evaluation: scores as JSON and CSV, pictures, and the page that holds them all."""

from pathlib import Path

from eval.evaluation import Evaluation
from eval.history import read_history
from eval.report.page import render
from eval.report.pictures import draw_pictures
from eval.report.records import metrics_record, thresholds_record
from eval.result_files import remove, write_json, write_table
from shards.files import atomic_write_text

# Those files of an evaluation that another one of the same images may not have.
_OF_AN_EVALUATION = (
    *("metrics.*", "thresholds.json", "*.png", "report.html", "intervals.csv", "calibration.*"),
    *("subgroups.csv", "gaps.csv", "floor.csv", "localization.csv"),
)


def write_scores(evaluation: Evaluation) -> Path:
    """Write every number of an evaluation beside its predictions; return the folder.

    metrics.json, metrics.csv and thresholds.json always; intervals.csv, calibration.json,
    calibration.csv, subgroups.csv, gaps.csv, floor.csv and localization.csv where the evaluation has
    them. Each appears whole or not at all; what an earlier evaluation left there is removed first, so
    that nothing stands beside numbers that it does not belong to. Raises ResourceMissing from the disk.
    """
    folder = evaluation.folder
    remove(folder, _OF_AN_EVALUATION)
    write_json(folder / "metrics.json", metrics_record(evaluation))
    write_json(folder / "thresholds.json", thresholds_record(evaluation))
    write_table(folder / "metrics.csv", evaluation.scores.to_frame())
    if evaluation.intervals is not None:
        write_table(folder / "intervals.csv", evaluation.intervals)
    if evaluation.calibration is not None and evaluation.calibrated is not None:
        write_json(folder / "calibration.json", evaluation.calibration.to_json())
        write_table(folder / "calibration.csv", evaluation.calibrated)
    groups = evaluation.subgroups
    if groups is not None:
        for name, frame in (("subgroups", groups.table), ("gaps", groups.gaps), ("floor", groups.floor)):
            write_table(folder / f"{name}.csv", frame, index=False)
    if evaluation.localization is not None:
        atomic_write_text(folder / "localization.csv", evaluation.localization.to_csv())
    return folder


def write_report(evaluation: Evaluation) -> Path:
    """Write what `write_scores` does, the pictures, and report.html; return the folder.

    Errors are those of `write_scores`, and BadData for a damaged metrics.jsonl, config.json or
    environment.json of a run.
    """
    folder = write_scores(evaluation)
    histories = tuple(read_history(run) for run in evaluation.runs)
    pictures = draw_pictures(evaluation, histories)
    atomic_write_text(folder / "report.html", render(evaluation, histories, pictures))
    return folder
