"""Rank and world size from torchrun's environment variables, without importing torch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import click

_MOST_RANKS = 2**20


class Rank(NamedTuple):
    """Rank and world size of this process."""

    rank: int = 0
    """0..size - 1."""
    size: int = 1
    local_rank: int = 0
    """Among the ranks of this machine."""

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process writes the run folder and prints."""
        return self.rank == 0


def rank_from_env() -> Rank:
    """Return RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them, rank 0 of 1 without it.

    Raises UsageError naming the variable that is not a whole number in its range.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not all(name in os.environ for name in names):
        return Rank()
    size = _number("WORLD_SIZE", 1, _MOST_RANKS)
    rank = Rank(_number("RANK", 0, size - 1), size, _number("LOCAL_RANK", 0, size - 1))
    return Rank() if size == 1 else rank


def _number(name: str, least: int, most: int) -> int:
    text = os.environ[name]
    if not (text.isdecimal() and len(text) < 19 and least <= int(text) <= most):
        raise click.UsageError(
            f"the environment variable {name}, which torchrun sets, is {text!r}: not a whole number from "
            f"{least} to {most}"
        )
    return int(text)


@contextmanager
def only_rank_zero_complains(rank: Rank) -> Iterator[None]:
    """Let the other ranks exit quietly if all find the same error, before they have joined.

    They exit with code 0: at another one torchrun would end rank 0, maybe before it has printed the error.
    """
    try:
        yield
    except click.ClickException as error:
        if rank.is_rank_zero:
            raise
        raise SystemExit(0) from error
