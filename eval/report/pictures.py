"""The plots of an evaluation, drawn into its folder."""

from pathlib import Path

from eval.evaluation import FITTED_ON, Evaluation
from eval.report.finding_plots import draw_confusion, draw_precision_recall, draw_reliability, draw_roc
from eval.report.html import Picture, read_picture
from eval.report.overview_plots import draw_prevalence, draw_subgroups, draw_training
from eval.scores.subgroups import MACRO
from eval.training_log import TrainingLog
from shards.findings import FINDINGS


def draw_pictures(evaluation: Evaluation, logs: tuple[TrainingLog, ...]) -> dict[str, Picture]:
    """Draw every picture of the report into the evaluation's folder; return them by name.

    These are roc, precision_recall, confusion, reliability, prevalence, where there are groups
    subgroups, and per run with epochs training-1, -2, ... Errors are those of the plots.
    """
    split, folder = evaluation.split, evaluation.folder
    scored = evaluation.predictions[split]
    arrays = scored.labels, scored.probabilities
    title = f"{evaluation.name}, {split} split"
    drawn: dict[str, tuple[Path, str, str]] = {}

    def new(name: str, alt: str, caption: str = "") -> Path:
        path = folder / f"{name}.png"
        drawn[name] = path, alt, caption
        return path

    draw_roc(*arrays, title, new("roc", "ROC curves of all findings"))
    draw_precision_recall(*arrays, title, new("precision_recall", "Precision-recall curves of all findings"))
    draw_confusion(
        evaluation.scores.per_finding,
        f"{title}, thresholds fitted on {FITTED_ON}",
        new("confusion", "Confusion matrices of all findings"),
    )
    curves = evaluation.operating_point.calibration
    calibrated = None if curves is None else curves.apply(scored.probabilities)
    draw_reliability(*arrays, calibrated, title, new("reliability", "Reliability diagrams of all findings"))
    if evaluation.subgroups is not None:
        table = evaluation.subgroups.table
        draw_subgroups(
            table[table["finding"] == MACRO],
            evaluation.scores.macro["auroc"],
            title,
            new("subgroups", "Macro AUROC of each group of patients"),
        )
    splits = evaluation.shards.manifest.splits
    draw_prevalence(
        {name: [record.prevalence[finding] for finding in FINDINGS] for name, record in splits.items()},
        {name: record.images for name, record in splits.items()},
        "Prevalence of the findings in each split",
        new("prevalence", "Prevalence of each finding in each split"),
    )
    for place, log in enumerate(logs, start=1):
        if log.epochs:
            name = f"training-{place}"  # not by the run's name: two averaged runs may share one
            draw_training(log.epochs, log.name, new(name, f"Losses, time and data wait of {log.name}"))
    return {name: read_picture(name, path, alt, caption) for name, (path, alt, caption) in drawn.items()}
