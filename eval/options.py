"""Options that `python -m eval` and `python -m eval.score` share."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pandas as pd

from eval.predict.selection import Selection
from eval.scores.thresholds import RULES, Rule, parse_rule
from shards.console import PATH, SEED, RenamedOption

CALIBRATIONS = ("temperature", "platt", "isotonic", "none")
"""Those of `eval.scores.calibration`, which takes a second to import, and none."""


@dataclass(frozen=True)
class EvaluationOptions:
    """The options of `python -m eval`, by their names."""

    selection: Selection
    """--split"""
    rule: Rule
    calibration: str
    resamples: int
    seed: int
    tta: bool
    set_decisions: bool
    average: bool
    compare: bool
    heatmaps: int
    boxes: pd.DataFrame | None
    """As `shards.boxes.read_box_list` returns them."""
    force: bool
    report: bool
    batch_size: int
    device: str
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


def batch_size_option() -> Option:
    """--batch-size."""
    return click.option(
        "--batch-size",
        type=click.IntRange(1, 2**20),
        default=64,
        metavar="IMAGES",
        help="Images a step; affects speed and memory only.",
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
