"""`python scripts/predict.py` on files that are in no shard folder."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from eval.__main__ import main as evaluation
from eval.scores.calibration import Calibration
from scripts.predict import main
from shards.findings import FINDINGS
from shards.folder import ShardFolder
from tests.trainer.running import train


def predict(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(phantom_shards: ShardFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained and scored."""
    runs = tmp_path_factory.mktemp("runs")
    assert train(phantom_shards, runs, "small", epochs=1, batch_size=16).exit_code == 0
    options = ["small", "--runs", str(runs), "--resamples", "0", "--heatmaps", "0", "--no-report"]
    done = CliRunner().invoke(evaluation, options)
    assert done.exit_code == 0, done.output
    return runs / "small"


def test_a_file_is_given_the_probability_and_the_decision_of_the_evaluation(
    run: Path, phantom_tree: Path, tmp_path: Path
) -> None:
    scored = pd.read_csv(run / "eval" / "test" / "predictions.csv").iloc[:3]
    files = [next(phantom_tree.rglob(name)) for name in scored["image"]]
    done = predict(run, *files, "--json", tmp_path / "said.json", "--heatmaps", tmp_path / "maps")
    assert done.exit_code == 0, done.output
    raw = scored[[f"prob_{finding}" for finding in FINDINGS]].to_numpy()
    calibration = Calibration.from_json(json.loads((run / "eval" / "test" / "calibration.json").read_text()))
    cuts = json.loads((run / "eval" / "test" / "thresholds.json").read_text())["thresholds"]
    said = json.loads((tmp_path / "said.json").read_text())
    drawn = 0
    for file, expected, row in zip(files, calibration.apply(raw), raw, strict=True):
        one = said[str(file)]
        assert [one[finding]["probability"] for finding in FINDINGS] == pytest.approx(expected, abs=1e-4)
        for finding, probability in zip(FINDINGS, row, strict=True):
            if cuts[finding] is None or abs(probability - cuts[finding]) > 1e-4:
                assert one[finding]["positive"] == (cuts[finding] is not None and probability >= cuts[finding])
            if one[finding]["positive"]:
                drawn += 1
                with Image.open(tmp_path / "maps" / f"{file.stem}-{finding}.png") as picture:
                    assert min(picture.size) >= 224
    assert drawn == len(list((tmp_path / "maps").iterdir())) > 0


def test_a_jpeg_is_taken_as_well_and_what_is_no_image_is_named(run: Path, tmp_path: Path) -> None:
    gray = np.random.default_rng(0).integers(0, 256, (90, 80), dtype=np.uint8)
    Image.fromarray(gray).save(tmp_path / "one.jpg")
    assert predict(run, tmp_path / "one.jpg").exit_code == 0
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "one.jpg").read_bytes()[:300])
    for name in ("text.png", "cut.jpg", "absent.png"):
        done = predict(run, tmp_path / "one.jpg", tmp_path / name)
        assert done.exit_code == 3 and name in done.stderr and done.stdout == ""
        assert done.stderr.count("\n") == 1


def test_a_run_that_was_not_scored_is_refused(phantom_shards: ShardFolder, tmp_path: Path) -> None:
    assert train(phantom_shards, tmp_path, "new", epochs=1, batch_size=16).exit_code == 0
    Image.new("L", (64, 64)).save(tmp_path / "any.png")
    done = predict(tmp_path / "new", tmp_path / "any.png")
    assert done.exit_code == 3 and "python -m eval" in done.stderr
