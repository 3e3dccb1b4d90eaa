"""Options of `python -m eval` and `python -m eval.score`, and how they are read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pandas as pd

from eval.predict.selection import Selection
from eval.scores.thresholds import RULES, Rule, parse_rule
from shards.console import PATH, SEED

CALIBRATIONS = ("temperature", "platt", "isotonic", "none")
"""Those of `eval.scores.calibration`, which takes a second to import, and none."""


@dataclass(frozen=True)
class EvaluationOptions:
    """What `python -m eval` was asked for, each field as its option."""

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
    """The list's boxes as `shards.boxes.read_box_list` returns them."""
    again: bool
    report: bool
    batch_size: int
    device: str
    shards: Path | None
    other_shards: bool
    json_file: Path | None


Option = Callable[[Callable[..., Any]], Callable[..., Any]]


def rule_option() -> Option:
    """--rule, to be read by `read_rule`."""
    return click.option("--rule", default="f1", metavar="RULE", help=f"How thresholds are picked: {RULES}.")


def resamples_option(besides: str = "") -> Option:
    """--resamples; `besides` is put behind its help."""
    help = f"Of the patients, for 95 % intervals; 0: none.{besides}"
    return click.option("--resamples", type=click.IntRange(0, 100_000), default=1000, metavar="N", help=help)


def seed_option(of: str) -> Option:
    """--seed, of what is drawn with it."""
    return click.option("--seed", type=SEED, default=0, metavar="N", help=f"Of {of}.")


def json_option() -> Option:
    """--json, as `json_file`; named for the environment, where click would call it JSON_FILE."""
    return click.option(
        "--json",
        "json_file",
        envvar="CXRAPID_JSON",
        type=PATH,
        metavar="FILE",
        help="Write everything there, too.",
    )


def batch_size_option() -> Option:
    """--batch-size."""
    return click.option(
        "--batch-size",
        type=click.IntRange(1, 2**20),
        default=64,
        metavar="IMAGES",
        help="Images a step; changes speed and memory only.",
    )


def runs_option() -> Option:
    """--runs."""
    return click.option(
        "--runs",
        type=PATH,
        default="runs",
        metavar="FOLDER",
        help="Folder that holds the runs.",
    )


def read_rule(text: str) -> Rule:
    """Return the threshold rule that --rule names; UsageError says which there are."""
    try:
        return parse_rule(text)
    except ValueError as error:
        raise click.UsageError(f"--rule: {error}") from error
