"""Runs trained on phantoms, shared by the tests of scoring."""

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from eval.__main__ import main as evaluation
from shards.folder import ShardFolder
from tests.trainer.running import train


@pytest.fixture(scope="session")
def trained(phantom_shards: ShardFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `small` and `other`, trained and not yet scored; not to be changed."""
    runs = tmp_path_factory.mktemp("trained")
    for seed, name in enumerate(("small", "other")):
        done = train(phantom_shards, runs, name, seed=seed, epochs=1, batch_size=16)
        assert done.exit_code == 0, done.output
    return runs


@pytest.fixture(scope="session")
def scored(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs, with `small` scored on test in full; not to be changed."""
    runs = Path(shutil.copytree(trained, tmp_path_factory.mktemp("scored") / "runs"))
    options = ["small", "--runs", str(runs), "--resamples", "20", "--heatmaps", "1"]
    done = CliRunner().invoke(evaluation, options)
    assert done.exit_code == 0, done.output
    return runs


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "runs"))
