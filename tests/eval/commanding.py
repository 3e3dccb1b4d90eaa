"""`python -m eval` as the tests call it."""

from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from eval.__main__ import main

NUMBERS = ("--resamples", 0, "--no-report", "--heatmaps", 0)
"""Scores alone, which is quick."""


def score(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def succeed(*arguments: Any) -> Result:
    done = score(*arguments)
    assert done.exit_code == 0, done.output
    return done


def expect_refusal(result: Result, exit_code: int, message: str) -> None:
    assert result.exit_code == exit_code, result.output
    assert message in result.stderr
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.splitlines()[-1].startswith("Error: ")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
