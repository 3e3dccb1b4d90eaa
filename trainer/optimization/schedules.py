"""The learning rate of every step, as a pure function of the step: resuming needs no state of it."""

import math
from collections.abc import Callable

# What torch's OneCycleLR takes by default, after Smith and Topin (2018).
_RISE, _START, _END = 0.3, 1 / 25, 1 / 25e4


def constant(step: int, steps: int, warmup: int) -> float:
    """Return 1, after a linear rise: (step + 1) / warmup while step < warmup."""
    return (step + 1) / warmup if step < warmup else 1.0


def cosine(step: int, steps: int, warmup: int) -> float:
    """Return (1 + cos(pi t)) / 2 with t = (step - warmup) / (steps - warmup), after constant()'s rise.

    Loshchilov and Hutter, SGDR, arXiv:1608.03983, equation 5, without restarts.
    """
    if step < warmup:
        return constant(step, steps, warmup)
    return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def onecycle(step: int, steps: int, warmup: int) -> float:
    """Rise from 1/25 to 1 in `warmup` steps (0: 30 % of them), then fall to 1/250,000, both as a half cosine.

    Smith and Topin, Super-Convergence, arXiv:1708.07120; the numbers are those of torch's OneCycleLR.
    """
    top = (warmup or _RISE * steps) - 1
    if step <= top:
        return _between(_START, 1.0, step / top if top > 0 else 1.0)
    return _between(1.0, _END, (step - top) / max(steps - 1 - top, 1))


def _between(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


SCHEDULES: dict[str, Callable[[int, int, int], float]] = {
    "constant": constant,
    "cosine": cosine,
    "onecycle": onecycle,
}
"""Name -> (step from 0, steps in all, steps of warm-up) -> the share of the highest rate, 0..1."""


def learning_rates(schedule: str, lr: float, steps: int, warmup: int) -> list[float]:
    """Return the rate of each of `steps` steps; the highest is `lr`."""
    share = SCHEDULES[schedule]
    return [lr * share(step, steps, warmup) for step in range(steps)]
