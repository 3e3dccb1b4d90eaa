"""The combinations of option values that `--sweep` names."""

import itertools
import math
from collections.abc import Sequence

SWEPT = ("lr", "weight-decay")
"""The options that a sweep can vary."""
MOST_POINTS = 10_000
"""Heads of one sweep: at a second each, hours."""


def parse_sweep(text: str, known: Sequence[str]) -> list[dict[str, float]]:
    """Return every combination of `"lr=1e-4,1e-3 weight-decay=0,1e-4"`, the last name varying fastest.

    Raises:
        ValueError: a name that is not known or comes twice, a value that is no finite number, too
            many combinations, or nothing.
    """
    axes: dict[str, list[float]] = {}
    for axis in text.split():
        name, _, values = axis.partition("=")
        if name not in known:
            raise ValueError(f"a sweep cannot vary {name!r}; it can vary: {', '.join(known)}")
        if name in axes:
            raise ValueError(f"a sweep names {name} twice")
        axes[name] = [_number(name, value) for value in values.split(",")]
    if not axes:
        raise ValueError('an empty sweep; one looks like "lr=1e-4,1e-3 weight-decay=0,1e-4"')
    points = math.prod(map(len, axes.values()))
    if points > MOST_POINTS:
        raise ValueError(f"a sweep of {points:,} combinations; at most {MOST_POINTS:,} are trained")
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"a sweep gives {name} the value {text!r}, which is no finite number")
    return value
