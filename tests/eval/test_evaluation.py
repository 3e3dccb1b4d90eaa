"""`python -m eval` on a run trained on phantoms: the protocol, the files, and what is refused."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from eval.__main__ import main
from eval.evaluation import evaluate
from shards.findings import FINDINGS
from shards.folder import ShardFolder
from shards.packing import pack
from shards.packing.planning import SplitRecipe, make_plan
from shards.pixels import PixelRecipe
from trainer.__main__ import main as trainer
from trainer.model_file import load_model, save_model
from trainer.run_directory import RunDirectory

Score = Callable[..., Result]


def score(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(phantom_shards: ShardFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `small`, trained and scored."""
    runs = tmp_path_factory.mktemp("runs")
    options = ["--arch", "custom_cnn", "--shards", phantom_shards.path, "--runs", runs, "--name", "small"]
    done = CliRunner().invoke(trainer, [str(text) for text in (*options, "--epochs", 2, "--batch-size", 16)])
    assert done.exit_code == 0, done.output
    done = score("small", "--runs", runs)
    assert done.exit_code == 0, done.output
    return runs


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "runs"))


def test_every_file_of_the_report_is_written(trained: Path) -> None:
    folder = trained / "small" / "eval" / "test"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"predictions.csv", "thresholds.json", "metrics.json", "metrics.csv"}
    for name in ("roc.png", "precision_recall.png"):
        with Image.open(folder / name) as image:
            assert min(image.size) > 300


@pytest.mark.parametrize("split", ["val", "test"])
def test_predictions_name_every_image_of_the_split_once(
    trained: Path, phantom_shards: ShardFolder, split: str
) -> None:
    name = "predictions.csv" if split == "test" else "val_predictions.csv"
    with (trained / "small" / "eval" / "test" / name).open() as file:
        rows = list(csv.DictReader(file))
    entries = phantom_shards.entries[phantom_shards.entries["split"] == split]
    assert [row["image"] for row in rows] == entries["image"].tolist()
    for row, (number, entry) in zip(rows, entries.iterrows(), strict=True):
        assert int(row["row"]) == number
        assert [int(row[f"label_{finding}"]) for finding in FINDINGS] == entry[list(FINDINGS)].tolist()
        assert all(0 <= float(row[f"prob_{finding}"]) <= 1 for finding in FINDINGS)


def test_stored_predictions_and_thresholds_give_the_stored_counts(trained: Path) -> None:
    folder = trained / "small" / "eval" / "test"
    metrics = json.loads((folder / "metrics.json").read_text())
    thresholds = json.loads((folder / "thresholds.json").read_text())["thresholds"]
    with (folder / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    decided = [finding for finding in FINDINGS if thresholds[finding] is not None]
    assert decided
    for finding in decided:
        alarms = [float(row[f"prob_{finding}"]) >= thresholds[finding] for row in rows]
        labels = [row[f"label_{finding}"] == "1" for row in rows]
        counted = metrics["per_finding"][finding]
        assert counted["tp"] == sum(a and b for a, b in zip(alarms, labels, strict=True))
        assert counted["fp"] == sum(a and not b for a, b in zip(alarms, labels, strict=True))


def test_the_macro_auroc_is_the_mean_of_its_own_table(trained: Path) -> None:
    metrics = json.loads((trained / "small" / "eval" / "test" / "metrics.json").read_text())
    column = [row["auroc"] for row in metrics["per_finding"].values() if row["auroc"] is not None]
    assert metrics["macro"]["auroc"] == pytest.approx(np.mean(column), abs=1e-12)
    assert metrics["thresholds_fitted_on"] == "val"
    assert metrics["split"] == "test"


def test_thresholds_come_from_val_alone(trained: Path) -> None:
    run = RunDirectory(trained / "small")
    cpu = torch.device("cpu")
    on_test, on_val = evaluate(run, "test", cpu), evaluate(run, "val", cpu)
    assert np.array_equal(list(on_test.thresholds.values()), list(on_val.thresholds.values()), equal_nan=True)
    assert load_model(run.model)[1]["thresholds"] == {
        finding: None if np.isnan(cut) else cut for finding, cut in on_val.thresholds.items()
    }


def test_scoring_again_gives_the_same_files(runs: Path) -> None:
    folder = runs / "small" / "eval" / "test"
    before = {path.name: path.read_bytes() for path in folder.glob("*.[cj]s*")}
    assert score(runs / "small").exit_code == 0
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_without_a_run_the_runs_are_listed(trained: Path, tmp_path: Path) -> None:
    listed = score("--runs", trained)
    assert listed.exit_code == 0
    assert "small" in listed.stdout
    assert "custom_cnn" in listed.stdout
    empty = score("--runs", tmp_path)
    assert "python -m trainer" in empty.stdout


def expect_refusal(result: Result, exit_code: int, message: str) -> None:
    assert result.exit_code == exit_code
    assert message in result.stderr
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.splitlines()[-1].startswith("Error: ")


def test_an_unknown_run_lists_the_known_ones(trained: Path) -> None:
    expect_refusal(score("large", "--runs", trained), 2, "the runs there: small")


def test_a_run_without_finished_weights_is_never_scored(runs: Path) -> None:
    (runs / "small" / "model.safetensors").unlink()
    expect_refusal(score("small", "--runs", runs), 3, "its training has not finished")


def test_shards_with_another_split_are_refused_unless_asked_for(
    runs: Path, phantom_tree: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    pack(make_plan(phantom_tree, SplitRecipe(rule="random", seed=1)), other, PixelRecipe(size=64))
    expect_refusal(score("small", "--runs", runs, "--shards", other), 3, "is not what small was trained on")
    stamped = load_model(runs / "small" / "model.safetensors")[1]
    metrics = runs / "small" / "eval" / "test" / "metrics.json"
    before = metrics.read_bytes()
    assert score("small", "--runs", runs, "--shards", other, "--other-shards").exit_code == 0
    assert metrics.read_bytes() == before
    (foreign,) = (runs / "small" / "eval").glob("test-*/metrics.json")
    record = json.loads(foreign.read_text())
    assert record["manifest_sha256"] != record["trained_on_manifest_sha256"] == stamped["manifest_sha256"]
    assert load_model(runs / "small" / "model.safetensors")[1] == stamped


def test_shards_of_another_size_are_expect_refusal(runs: Path, phantom_tree: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    pack(make_plan(phantom_tree, SplitRecipe(val_fraction=0.2)), other, PixelRecipe(size=32))
    expect_refusal(score("small", "--runs", runs, "--shards", other, "--other-shards"), 3, "takes 64 px")


def test_weights_of_other_findings_or_another_arch_are_expect_refusal(runs: Path) -> None:
    run = RunDirectory(runs / "small")
    model, metadata = load_model(run.model)
    save_model(run.model, model.state_dict(), {**metadata, "findings": list(reversed(FINDINGS))})
    expect_refusal(score("small", "--runs", runs), 3, "other findings")
    save_model(run.model, model.state_dict(), metadata)
    config = json.loads(run.config.read_text())
    config["arch"]["value"] = "resnet50"
    run.config.write_text(json.dumps(config))
    expect_refusal(score("small", "--runs", runs), 3, "is a custom_cnn, but")


def test_shards_with_findings_in_another_order_are_expect_refusal(
    runs: Path, phantom_shards: ShardFolder, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(phantom_shards.path, tmp_path / "other"))
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["findings"].reverse()
    (other / "manifest.json").write_text(json.dumps(manifest))
    expect_refusal(score("small", "--runs", runs, "--shards", other), 3, "other findings")


def test_weights_that_give_no_numbers_are_not_scored(runs: Path) -> None:
    run = RunDirectory(runs / "small")
    model, metadata = load_model(run.model)
    state = {name: tensor * float("nan") for name, tensor in model.state_dict().items()}
    save_model(run.model, state, metadata)
    expect_refusal(score("small", "--runs", runs), 3, "not all numbers")


def test_a_damaged_metrics_file_is_named_in_the_list_of_runs(runs: Path) -> None:
    (runs / "small" / "eval" / "test" / "metrics.json").write_text("{")
    expect_refusal(score("--runs", runs), 3, "metrics.json is damaged")
