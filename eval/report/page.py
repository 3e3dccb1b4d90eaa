"""report.html: an evaluation as one self-contained page; template.html holds its sentences."""

from collections.abc import Mapping
from typing import Any

from eval.evaluation import FITTED_ON, Evaluation
from eval.heatmaps.gallery import KINDS
from eval.heatmaps.localization import CUT
from eval.report.html import Cell, Picture, fill, number, number_of
from eval.report.published import published_table, why_not_comparable
from eval.report.tables import (
    calibration_table,
    decisions_table,
    epochs_table,
    gaps_table,
    groups_table,
    localization_table,
    prevalence_table,
    scores_table,
    view_baseline_table,
)
from eval.scores.metrics import ECE_BINS
from eval.scores.subgroups import MACRO
from eval.scores.thresholds import parse_rule
from eval.training_log import TrainingLog, duration
from shards.splits import SPLITS


def render(evaluation: Evaluation, logs: tuple[TrainingLog, ...], pictures: Mapping[str, Picture]) -> str:
    """Return the text of report.html.

    `logs` are those of the evaluation's runs, `pictures` the plots by name. Parts that the evaluation
    does not have (intervals, calibration, subgroups, localization, gallery, epochs) leave no empty
    section. Styles, script and pictures stand in the page, and its content security policy forbids any
    request. All text from files is escaped.
    """
    scores, shown = evaluation.scores, evaluation.explanation.gallery
    images = len(evaluation.predictions[evaluation.split].rows)
    not_published = why_not_comparable(
        evaluation.shards, evaluation.split, images, on_training_shards=not evaluation.on_other_shards
    )
    tables = _tables(evaluation)
    tables["published"] = published_table(evaluation) if not_published is None else None
    of_groups = () if evaluation.subgroups is None else evaluation.subgroups.warnings
    return fill(
        "template.html",
        evaluation=evaluation,
        archs=dict.fromkeys(str(log.config.get("arch", "unknown arch")) for log in logs),
        recipe=evaluation.shards.manifest.recipe,
        images=images,
        macro_auroc=number_of("auroc")(_mean(evaluation, "macro")),
        cards=_cards(evaluation),
        warnings=list(dict.fromkeys((*evaluation.warnings, *of_groups))),
        fitted_on=FITTED_ON,
        rule=parse_rule(evaluation.operating_point.rule),
        left_out=[*scores.skipped, *(f"{name} (no threshold)" for name in scores.without_threshold)],
        splits=[(split, evaluation.shards.manifest.splits[split]) for split in SPLITS],
        ece_bins=ECE_BINS,
        box_cut=CUT,
        not_published=not_published,
        tables=tables,
        pictures=pictures,
        gallery={kind: maps for kind in KINDS if (maps := [each for each in shown if each.kind == kind])},
        runs=[
            (log, run_facts(log), epochs_table(log, number) if log.epochs else None)
            for number, log in enumerate(logs, start=1)
        ],
    )


def run_facts(log: TrainingLog) -> list[tuple[str, str]]:
    """Return what is recorded of a run's training and machine, title and text."""
    config, machine = log.config, log.environment
    facts: list[tuple[str, Any]] = [("Arch", config.get("arch")), ("Initial weights", config.get("weights"))]
    if log.epochs:
        seconds = [line["seconds"] for line in log.epochs]
        best = f", the best on val was {log.best_epoch}" if log.best_epoch else ""
        facts += [
            ("Epochs", f"{len(seconds)}{best}"),
            (
                "Epoch time",
                f"{duration(log.seconds / len(seconds))} on average, {duration(min(seconds))} to "
                f"{duration(max(seconds))}; {duration(log.seconds)} in total, without validation",
            ),
            ("Throughput", f"{log.images_per_second:,.1f} images/s"),
            ("Data wait", f"{100 * log.data_wait:.1f} % of the training time"),
        ]
    versions = machine.get("versions", {})
    facts += [
        ("Device", log.device),
        ("Ranks", machine["world_size"] if machine.get("world_size", 1) != 1 else None),
        ("Precision", machine.get("precision")),
        ("CUDA", machine.get("cuda")),
        ("Python", machine.get("python")),
        ("Packages", ", ".join(f"{name} {version}" for name, version in versions.items() if version)),
        ("Platform", machine.get("platform")),
        ("Commit", machine.get("commit")),
        ("Trained on manifest", machine.get("manifest_sha256")),
    ]
    return [(title, str(text)) for title, text in facts if text not in (None, "")]


def _mean(evaluation: Evaluation, name: str) -> dict[str, Any]:
    """Return the scores of macro or micro, with their intervals and calibrated errors where there are any."""
    frames = evaluation.scores.to_frame(), evaluation.intervals, evaluation.calibrated
    return {str(key): value for frame in frames if frame is not None for key, value in frame.loc[name].items()}


def _cards(evaluation: Evaluation) -> list[tuple[str, Cell, str]]:
    """Return the numbers that stand beside the headline: title, value and note."""
    macro, micro = _mean(evaluation, "macro"), _mean(evaluation, "micro")
    chance = f"chance: {number(macro['prevalence']).text}, the prevalence"
    at = f"thresholds from {FITTED_ON}"
    cards = [
        ("Micro AUROC", number_of("auroc")(micro), "all findings pooled"),
        ("Macro AUPRC", number_of("average_precision")(macro), chance),
        ("Macro F1", number_of("f1")(macro), at),
        ("Micro F1", number_of("f1")(micro), at),
        ("Macro recall", number_of("recall")(macro), at),
        ("Macro precision", number_of("precision")(macro), at),
        ("Macro ECE", number_of("ece")(macro), f"as predicted, {ECE_BINS} bins"),
    ]
    if evaluation.operating_point.calibration is not None:
        note = f"by {evaluation.operating_point.calibration.method}, fitted on {FITTED_ON}"
        cards.append(("Macro ECE, calibrated", number_of("calibrated_ece")(macro), note))
    return cards


def _tables(evaluation: Evaluation) -> dict[str, Any]:
    scores, intervals, groups = evaluation.scores, evaluation.intervals, evaluation.subgroups
    calibrated, localization = evaluation.calibrated, evaluation.explanation.localization
    tables: dict[str, Any] = {
        "scores": scores_table(scores, intervals),
        "at_half": decisions_table(evaluation.at_half, intervals),
        "calibration": None if calibrated is None else calibration_table(calibrated, intervals),
        "prevalence": prevalence_table(evaluation.shards.manifest, evaluation.split),
        "localization": None if localization is None else localization_table(localization),
        **dict.fromkeys(("groups", "gaps", "view_baseline")),
    }
    if groups is not None:
        tables["groups"] = groups_table(groups.table[groups.table["finding"] == MACRO])
        tables["gaps"] = gaps_table(groups.gaps)
        tables["view_baseline"] = view_baseline_table(groups.view_baseline, scores, intervals)
    return tables
