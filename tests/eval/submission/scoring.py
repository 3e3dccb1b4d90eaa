"""What the tests of `python -m eval.score` run and write."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from click.testing import CliRunner, Result

from eval.score import main
from shards.findings import FINDINGS

OUR_COLUMNS = ["image", *(f"prob_{finding}" for finding in FINDINGS)]


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def score(*arguments: Any) -> dict[str, Any]:
    """Run it, without intervals unless asked for; return what --json has."""
    options = [] if "--resamples" in arguments else ["--resamples", 0]
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "scores.json"
        done = run(*arguments, *options, "--json", written)
        assert done.exit_code == 0, done.output
        return dict(json.loads(written.read_text()))


def refused(*arguments: Any) -> str:
    """Run it; return the one line with which it ends, exit code 3."""
    done = run(*arguments)
    assert done.exit_code == 3, done.output
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    return done.stderr


def predict(entries: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """A model that knows something, as float32 that many images share."""
    labels = entries[list(FINDINGS)].to_numpy()
    noise = np.random.default_rng(seed).random(labels.shape)
    probabilities = ((0.6 * noise + 0.3 * labels) ** 2).round(3).astype(np.float32)
    table = pd.DataFrame(probabilities.astype(np.float64), columns=OUR_COLUMNS[1:], index=entries.index)
    table.insert(0, "image", entries["image"])
    return table


def write(table: pd.DataFrame, path: Path) -> Path:
    table.to_csv(path, index=False)
    return path
