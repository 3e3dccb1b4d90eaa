"""The options of `python -m eval` as records, and those that it shares with other commands as click options."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pandas as pd

from eval.predict.selection import Selection
from eval.scores.thresholds import F1, RULES, Rule, parse_rule
from shards.console import PATH, SEED, RenamedOption

if TYPE_CHECKING:  # it takes a second to import
    from eval.scores.calibration import Method

CALIBRATIONS = ("temperature", "platt", "isotonic", "none")
"""The methods of `eval.scores.calibration`, and none."""


@dataclass(frozen=True)
class Protocol:
    """The settings of an evaluation that determine its numbers."""

    selection: Selection
    """--split"""
    rule: Rule = F1
    calibration: "Method | None" = "platt"
    resamples: int = 1000
    """Of the patients, for confidence intervals; 0: no intervals."""
    seed: int = 0
    """Of the resamples; the same for all evaluations that are compared."""

    @property
    def what_if(self) -> str:
        """The suffix of the results folder; empty for the default rule and calibration."""
        rule = "" if self.rule.name == F1.name else f"-{self.rule.name}"
        return rule if self.calibration == "platt" else f"{rule}-calibration={self.calibration or 'none'}"


@dataclass(frozen=True)
class PredictOptions:
    """How to predict where no predictions are stored."""

    device: str = "auto"
    batch_size: int = 64
    """Images a step; affects speed and memory only."""
    tta: bool = False
    """Average the probabilities of each image and its mirror image."""
    force: bool = False
    """Predict even where predictions are stored."""


@dataclass(frozen=True)
class EvaluationOptions:
    """All options of `python -m eval`."""

    protocol: Protocol
    predict: PredictOptions
    set_decisions: bool
    average: bool
    compare: bool
    heatmaps: int
    boxes: pd.DataFrame | None
    """As `shards.boxes.read_box_list` returns them."""
    report: bool
    shards: Path | None
    allow_other_shards: bool
    json_file: Path | None


Option = Callable[[Callable[..., Any]], Callable[..., Any]]


def rule_option() -> Option:
    """--threshold-rule; `read_rule` parses it."""
    return click.option(
        "--threshold-rule",
        "rule",
        cls=RenamedOption,
        formerly="--rule",
        envvar="CXRAPID_THRESHOLD_RULE",
        default="f1",
        metavar="RULE",
        help=f"How to pick each threshold: {RULES}.",
    )


def resamples_option(besides: str = "") -> Option:
    """--resamples; `besides` is appended to its help."""
    help = f"Bootstrap resamples of the patients for 95 % confidence intervals; 0: no intervals.{besides}"
    return click.option("--resamples", type=click.IntRange(0, 100_000), default=1000, metavar="N", help=help)


def seed_option(of: str) -> Option:
    """--seed; `of` names what it seeds."""
    return click.option("--seed", type=SEED, default=0, metavar="N", help=f"Seed of {of}.")


def json_option() -> Option:
    """--json, as `json_file`; named for the environment, where click would call it JSON_FILE."""
    return click.option(
        "--json", "json_file", envvar="CXRAPID_JSON", type=PATH, metavar="FILE", help="Also write all results to FILE."
    )


def runs_option() -> Option:
    """--runs."""
    return click.option("--runs", type=PATH, default="runs", metavar="FOLDER", help="Folder of the runs.")


def read_rule(text: str) -> Rule:
    """Parse --threshold-rule; UsageError lists the rules."""
    try:
        return parse_rule(text)
    except ValueError as error:
        raise click.UsageError(f"--threshold-rule: {error}") from error
