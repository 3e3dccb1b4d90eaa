"""report.html: an evaluation as one self-contained page."""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from eval.evaluation import FITTED_ON, Evaluation
from eval.report.canvas import readable
from eval.report.html import Picture, data_uri, fill, interval, number
from eval.report.tables import (
    calibration_table,
    decisions_table,
    epochs_table,
    gaps_table,
    groups_table,
    localization_table,
    prevalence_table,
    published_table,
    scores_table,
    view_baseline_table,
)
from eval.report.text import definitions, not_published, notes, run_facts, subtitle, warnings
from eval.scores.metrics import ECE_BINS
from eval.scores.subgroups import MACRO
from eval.training_log import TrainingLog

_SECTIONS = (
    ("findings", "Per finding"),
    ("curves", "Curves"),
    ("confusion-matrices", "Confusion matrices"),
    ("calibration", "Calibration"),
    ("subgroups", "Groups of patients"),
    ("localization", "Localization"),
    ("heat-maps", "Heat maps"),
    ("published", "Published results"),
    ("data", "Data"),
    ("training", "Training"),
    ("definitions", "Definitions"),
)


def render(evaluation: Evaluation, logs: tuple[TrainingLog, ...], pictures: Mapping[str, Picture]) -> str:
    """Return the text of report.html.

    `logs` are those of the evaluation's runs, `pictures` what `draw_pictures` drew. Parts that the
    evaluation does not have (intervals, calibration, subgroups, localization, gallery, epochs) leave
    no empty section. Styles, script and pictures stand in the page, and its content security policy
    forbids any request. All text from files is escaped.
    """
    tables = _tables(evaluation)
    absent = {
        name
        for name, part in (
            ("subgroups", tables["groups"]),
            ("localization", tables["localization"]),
            ("heat-maps", evaluation.explanation.gallery),
            ("published", tables["published"]),
        )
        if not part
    }
    scores = evaluation.scores
    return fill(
        "template.html",
        name=evaluation.name,
        split=evaluation.split,
        subtitle=subtitle(evaluation, logs),
        contents=[(key, title) for key, title in _SECTIONS if key not in absent],
        images=f"{len(evaluation.predictions[evaluation.split].rows):,}",
        patients=f"{evaluation.patients:,}",
        macro={
            "auroc": number(scores.macro["auroc"], small=_interval(evaluation, "macro", "auroc")),
            "scored": int(scores.macro["scored"]),
            "findings": len(scores.per_finding),
        },
        cards=_cards(evaluation),
        warnings=warnings(evaluation),
        notes=notes(evaluation),
        tables=tables,
        pictures=pictures,
        gallery=_gallery(evaluation),
        runs=[_run(place, each, pictures) for place, each in enumerate(logs, start=1)],
        definitions=definitions(evaluation),
    )


def _interval(evaluation: Evaluation, row: str, measure: str) -> str:
    if evaluation.intervals is None:
        return ""
    return interval(*evaluation.intervals.loc[row, [f"{measure}_low", f"{measure}_high"]])


def _cards(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return the numbers that stand beside the headline."""
    scores = evaluation.scores

    def card(what: str, row: str, measure: str, note: str) -> dict[str, Any]:
        values = {"macro": scores.macro, "micro": scores.micro}[row]
        return {"what": what, "cell": number(values[measure], small=_interval(evaluation, row, measure)), "note": note}

    prevalence = number(scores.macro["prevalence"]).text
    at = f"thresholds from {FITTED_ON}"
    cards = [
        card("Micro AUROC", "micro", "auroc", "all findings pooled"),
        card("Macro AUPRC", "macro", "average_precision", f"chance: {prevalence}, the prevalence"),
        card("Macro F1", "macro", "f1", at),
        card("Micro F1", "micro", "f1", at),
        card("Macro recall", "macro", "recall", at),
        card("Macro precision", "macro", "precision", at),
        card("Macro ECE", "macro", "ece", f"as predicted, {ECE_BINS} bins"),
    ]
    if evaluation.calibrated is not None and evaluation.operating_point.calibration is not None:
        after = evaluation.calibrated.at["macro", "calibrated_ece"]
        note = f"by {evaluation.operating_point.calibration.method}, fitted on {FITTED_ON}"
        cell = number(after, small=_interval(evaluation, "macro", "calibrated_ece"))
        cards.append({"what": "Macro ECE, calibrated", "cell": cell, "note": note})
    return cards


def _tables(evaluation: Evaluation) -> dict[str, Any]:
    scores, groups = evaluation.scores, evaluation.subgroups
    tables: dict[str, Any] = {
        "scores": scores_table(scores, evaluation.intervals),
        "at_half": decisions_table(evaluation.at_half, 0.5, evaluation.intervals),
        "calibration": None
        if evaluation.calibrated is None
        else calibration_table(evaluation.calibrated, evaluation.intervals),
        "prevalence": prevalence_table(evaluation.shards.manifest, evaluation.split),
        "localization": None,
        "published": None,
        "groups": None,
        "gaps": None,
        "view_baseline": None,
    }
    if groups is not None:
        tables["groups"] = groups_table(groups.table[groups.table["finding"] == MACRO])
        tables["gaps"] = gaps_table(groups.gaps)
        tables["view_baseline"] = view_baseline_table(groups.view_baseline, scores, evaluation.intervals)
    if evaluation.explanation.localization is not None:
        tables["localization"] = localization_table(evaluation.explanation.localization)
    if not_published(evaluation) is None:
        tables["published"] = published_table(
            evaluation.name,
            scores.macro["auroc"],
            _interval(evaluation, "macro", "auroc"),
            scores.macro["f1"],
            scores.micro["f1"],
        )
    return tables


def _gallery(evaluation: Evaluation) -> list[tuple[str, list[dict[str, str]]]]:
    """Return the heat maps by kind, in the order they come."""
    kinds = list(dict.fromkeys(each.kind for each in evaluation.explanation.gallery))
    ordered = sorted(evaluation.explanation.gallery, key=lambda each: kinds.index(each.kind))
    return [
        (
            kind,
            [
                {
                    "source": data_uri(each.png),
                    "finding": readable(each.finding),
                    "image": each.image,
                    "probability": f"{each.probability:.3f}",
                    "threshold": f"{each.threshold:.3f}",
                }
                for each in maps
            ],
        )
        for kind, maps in groupby(ordered, key=lambda each: each.kind)
    ]


def _run(place: int, log: TrainingLog, pictures: Mapping[str, Picture]) -> dict[str, Any]:
    return {
        "name": log.name,
        "facts": run_facts(log),
        "command": log.environment.get("command"),
        "picture": pictures.get(f"training-{place}"),
        "epochs": epochs_table(log.epochs, log.name, place) if log.epochs else None,
    }
