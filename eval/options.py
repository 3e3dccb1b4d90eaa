"""Options that `python -m eval` and `python -m eval.score` read alike."""

import click

from eval.scores.thresholds import Rule, parse_rule


def read_rule(text: str) -> Rule:
    """Return the threshold rule that --rule names; UsageError says which there are."""
    try:
        return parse_rule(text)
    except ValueError as error:
        raise click.UsageError(f"--rule: {error}") from error
