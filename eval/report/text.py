"""The sentences of report.html."""

from typing import Any

from eval.evaluation import FITTED_ON, Evaluation
from eval.report.published import why_not_comparable
from eval.scores.metrics import ECE_BINS
from eval.scores.thresholds import parse_rule
from eval.training_log import TrainingLog, duration
from shards.splits import SPLITS

_LEVEL = "95\N{NO-BREAK SPACE}%"


def subtitle(evaluation: Evaluation, logs: tuple[TrainingLog, ...]) -> str:
    """Return one line: arch, the split's rule, mirror averaging, the shards."""
    archs = list(dict.fromkeys(str(log.config.get("arch", "unknown arch")) for log in logs))
    recipe = evaluation.shards.manifest.recipe
    parts = [", ".join(archs), f"split by the rule {recipe['split']}", f"{recipe['size']} px"]
    if evaluation.operating_point.tta:
        parts.append("each image averaged with its mirror")
    parts.append(f"manifest {evaluation.shards.digest[:12]}")
    return " · ".join(parts)


def warnings(evaluation: Evaluation) -> list[str]:
    """Return the evaluation's, and what its subgroups leave out, each once."""
    groups = () if evaluation.subgroups is None else evaluation.subgroups.warnings
    return list(dict.fromkeys((*evaluation.warnings, *groups)))


def notes(evaluation: Evaluation) -> dict[str, str | None]:
    """Return the sentence under each heading of the page."""
    return {
        "thresholds": f"Thresholds by the rule {evaluation.operating_point.rule}, fitted on {FITTED_ON}: "
        f"{parse_rule(evaluation.operating_point.rule).meaning}.",
        "intervals": _intervals(evaluation),
        "means": _means(evaluation),
        "calibration": _calibration(evaluation),
        "subgroups": _subgroups(evaluation),
        "localization": None
        if evaluation.explanation.localization is None
        else evaluation.explanation.localization.method,
        "data": _data(evaluation),
        "not_published": not_published(evaluation),
    }


def not_published(evaluation: Evaluation) -> str | None:
    """Return why no published results stand beside these, None where they do."""
    return why_not_comparable(
        evaluation.shards,
        evaluation.split,
        len(evaluation.predictions[evaluation.split].rows),
        on_training_shards=not evaluation.on_other_shards,
    )


def run_facts(log: TrainingLog) -> list[tuple[str, str]]:
    """Return what is known of a run's training and machine, title and text; nothing that is not recorded."""
    config, machine = log.config, log.environment
    facts: list[tuple[str, Any]] = [("Arch", config.get("arch")), ("Weights at the start", config.get("weights"))]
    if log.epochs:
        seconds = [line["seconds"] for line in log.epochs]
        best = log.best_epoch
        facts += [
            ("Epochs", f"{len(seconds)}" + (f", the best on val was {best}" if best else "")),
            (
                "Epoch time",
                f"{duration(log.seconds / len(seconds))} on average, {duration(min(seconds))} to "
                f"{duration(max(seconds))}; {duration(log.seconds)} in all, without validation",
            ),
            ("Throughput", f"{log.images_per_second:,.1f} images/s"),
            ("Data wait", f"{100 * log.data_wait:.1f} % of the training time"),
        ]
    facts += [
        ("Device", log.device),
        ("Ranks", machine["world_size"] if machine.get("world_size", 1) != 1 else None),
        ("Precision", machine.get("precision")),
        ("CUDA", machine.get("cuda")),
        ("Python", machine.get("python")),
        ("Packages", ", ".join(f"{name} {version}" for name, version in _versions(machine) if version)),
        ("Platform", machine.get("platform")),
        ("Commit", machine.get("commit")),
        ("Trained on manifest", machine.get("manifest_sha256")),
    ]
    return [(title, str(text)) for title, text in facts if text not in (None, "")]


def definitions(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Return how each kind of number is made, title and text."""
    found = [
        ("Macro", "Unweighted mean over the findings that can be scored."),
        ("Micro", "All findings pooled into one list of decisions and probabilities."),
        (
            "AUROC, AUPRC",
            "Areas under the ROC and the precision-recall curve, the latter as average precision (steps, "
            "not trapezoids). The chance level of AUPRC is the prevalence.",
        ),
        (
            "Decisions",
            "Positive where the raw probability is at or above the threshold. "
            "A measure that would divide by zero is 0.",
        ),
        (
            "Brier, ECE",
            "Mean squared error of the probability, and the gap between mean probability and share of "
            f"positives over {ECE_BINS} bins of equal width (Guo et al., ICML 2017, in its binary form).",
        ),
    ]
    resampled = evaluation.resampled
    if resampled is not None:
        found.append(
            (
                "Intervals",
                f"{_LEVEL} confidence intervals: bootstrap percentiles of {resampled.resamples:,} "
                f"resamples of the patients, seed {resampled.seed}, with fixed thresholds and calibration. "
                "Patients are resampled, not images, because images of one patient resemble each other. The "
                "intervals of the ECE are corrected "
                "for its upward bias, so they can lie below the ECE itself.",
            )
        )
    found.append(("Manifest", evaluation.shards.digest))
    return found


def _intervals(evaluation: Evaluation) -> str:
    if evaluation.resampled is None:
        return "Without confidence intervals."
    count = evaluation.resampled.resamples
    return f"The small numbers are {_LEVEL} confidence intervals from {count:,} bootstrap resamples of the patients."


def _means(evaluation: Evaluation) -> str:
    scores = evaluation.scores
    scored = int(scores.macro["scored"])
    if not scores.skipped and not scores.without_threshold:
        return f"Macro and micro are over all {scored} findings."
    left_out = list(scores.skipped) + [f"{name} (no threshold)" for name in scores.without_threshold]
    return (
        f"Macro and micro are over {scored} of {len(scores.per_finding)} findings; left out, wholly or "
        f"partly: {', '.join(left_out)}."
    )


def _calibration(evaluation: Evaluation) -> str:
    calibration = evaluation.operating_point.calibration
    if calibration is None:
        return "Probabilities as predicted; not calibrated."
    return (
        f"One curve per finding by the method {calibration.method}, fitted on {FITTED_ON} and "
        f"applied to {evaluation.split}. It changes the probabilities shown, not the decisions or the "
        "ranking."
    )


def _subgroups(evaluation: Evaluation) -> str:
    between = f" Bars are {_LEVEL} confidence intervals." if evaluation.resampled is not None else ""
    return (
        "The same thresholds decide in every group. The macro means of one attribute are over the findings "
        f"that can be scored in all of its groups, so they can differ from the mean of all images.{between}"
    )


def _data(evaluation: Evaluation) -> str:
    manifest = evaluation.shards.manifest
    sizes = "; ".join(
        f"{split}: {manifest.splits[split].images:,} images of {manifest.splits[split].patients:,} patients"
        for split in SPLITS
    )
    return f"{sizes}. No patient is in two splits: this was verified when the shards were packed."


def _versions(machine: Any) -> list[tuple[str, Any]]:
    versions = machine.get("versions")
    return list(versions.items()) if isinstance(versions, dict) else []
