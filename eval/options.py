"""Options that `python -m eval` and `python -m eval.score` have alike, and how they are read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from eval.scores.thresholds import RULES, Rule, parse_rule

Option = Callable[[Callable[..., Any]], Callable[..., Any]]


def rule_option() -> Option:
    """--rule, to be read by `read_rule`."""
    return click.option("--rule", default="f1", metavar="RULE", help=f"How thresholds are picked: {RULES}.")


def resamples_option(besides: str = "") -> Option:
    """--resamples; `besides` is put behind its help."""
    help = f"Of the patients, for 95 % intervals; 0: none.{besides}"
    return click.option("--resamples", type=click.IntRange(0), default=1000, metavar="N", help=help)


def seed_option(of: str) -> Option:
    """--seed, of what is drawn with it."""
    return click.option("--seed", type=click.IntRange(0), default=0, metavar="N", help=f"Of {of}.")


def json_option() -> Option:
    """--json, as `json_file`; named for the environment, where click would call it JSON_FILE."""
    return click.option(
        "--json",
        "json_file",
        envvar="CXRAPID_JSON",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Write everything there, too.",
    )


def runs_option() -> Option:
    """--runs."""
    return click.option(
        "--runs",
        type=click.Path(path_type=Path),
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
