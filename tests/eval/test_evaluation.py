"""The protocol on runs trained on phantoms: what is fitted on val, what is scored, and what is refused."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from eval.evaluation import Evaluation, evaluate
from eval.options import PredictOptions, Protocol
from eval.predict.scored_run import open_run
from eval.predict.selection import Selection
from eval.scores.metrics import score as score_arrays
from eval.scores.thresholds import parse_rule
from shards.files import sha256_of
from shards.findings import FINDINGS
from shards.folder import ShardFolder, open_shards
from shards.manifest import NAME
from shards.packing import pack
from shards.packing.planning import SplitRecipe, make_plan
from shards.pixels import PixelRecipe
from shards.splits import read_list
from tests.eval.commanding import NUMBERS, expect_refusal, score, succeed
from tests.trainer.running import train
from trainer.model_file import load_model, read_header, save_model
from trainer.run_directory import RunDirectory

TEST = Path("small", "eval", "test")


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def decisions(runs: Path) -> dict[str, Any]:
    return dict(json.loads((runs / "small" / "decisions.json").read_text()))


def evaluated(runs: Path, split: str, **changes: Any) -> Evaluation:
    run = open_run(RunDirectory(runs / "small"), PredictOptions(device="cpu"))
    return evaluate(run, Protocol(Selection.parse(split), resamples=0, **changes))


def test_every_file_is_written(scored: Path) -> None:
    names = {path.name for path in (scored / TEST).iterdir()}
    assert names >= {
        "predictions.csv",
        "val_predictions.csv",
        "thresholds.json",
        "metrics.json",
        "metrics.csv",
        "intervals.csv",
        "calibration.json",
        "subgroups.csv",
        "roc.png",
        "report.html",
    }


@pytest.mark.parametrize("split", ["val", "test"])
def test_predictions_name_every_image_of_the_split_once(scored: Path, phantom_shards: ShardFolder, split: str) -> None:
    rows = read_csv(scored / TEST / ("predictions.csv" if split == "test" else "val_predictions.csv"))
    entries = phantom_shards.entries[phantom_shards.entries["split"] == split]
    assert [row["image"] for row in rows] == entries["image"].tolist()
    for row, (number, entry) in zip(rows, entries.iterrows(), strict=True):
        assert int(row["row"]) == number
        assert int(row["patient"]) == entry["patient"]
        assert [int(row[f"label_{finding}"]) for finding in FINDINGS] == entry[list(FINDINGS)].tolist()
        assert all(0 <= float(row[f"prob_{finding}"]) <= 1 for finding in FINDINGS)


def test_stored_predictions_and_thresholds_give_the_stored_counts(scored: Path) -> None:
    metrics = json.loads((scored / TEST / "metrics.json").read_text())
    thresholds = json.loads((scored / TEST / "thresholds.json").read_text())["thresholds"]
    rows = read_csv(scored / TEST / "predictions.csv")
    decided = [finding for finding in FINDINGS if thresholds[finding] is not None]
    assert decided
    for finding in decided:
        alarms = [float(row[f"prob_{finding}"]) >= thresholds[finding] for row in rows]
        labels = [row[f"label_{finding}"] == "1" for row in rows]
        counted = metrics["per_finding"][finding]
        assert counted["tp"] == sum(a and b for a, b in zip(alarms, labels, strict=True))
        assert counted["fp"] == sum(a and not b for a, b in zip(alarms, labels, strict=True))


def test_the_macro_auroc_is_the_mean_of_its_own_table(scored: Path) -> None:
    metrics = json.loads((scored / TEST / "metrics.json").read_text())
    column = [row["auroc"] for row in metrics["per_finding"].values() if row["auroc"] is not None]
    assert metrics["macro"]["auroc"] == pytest.approx(np.mean(column), abs=1e-12)
    assert metrics["thresholds_fitted_on"] == "val"
    assert metrics["split"] == "test"


def test_thresholds_and_calibration_come_from_val_alone(runs: Path) -> None:
    succeed("small", "--runs", runs, *NUMBERS)
    stored = decisions(runs)
    on_test, on_val = evaluated(runs, "test"), evaluated(runs, "val")
    succeed("small", "--runs", runs, "--split", "val", *NUMBERS)
    assert np.array_equal(list(on_test.thresholds.values()), list(on_val.thresholds.values()), equal_nan=True)
    calibration = on_val.operating_point.calibration
    assert on_test.operating_point.calibration == calibration
    assert calibration is not None
    assert decisions(runs) == stored
    assert stored["calibration"] == calibration.to_json()
    assert stored["rule"] == "f1"
    assert stored["thresholds"] == {
        finding: None if np.isnan(cut) else cut for finding, cut in on_val.thresholds.items()
    }


def test_no_test_label_reaches_a_threshold_or_a_calibration(
    trained: Path, phantom_tree: Path, phantom_shards: ShardFolder, tmp_path: Path
) -> None:
    """The same tree with the labels of its test images shuffled is packed, trained on and scored."""
    tree = shutil.copytree(phantom_tree, tmp_path / "tree")
    metadata = tree / "Data_Entry_2017_v2020.csv"
    table = pd.read_csv(metadata, dtype=str)
    test = table["Image Index"].isin(read_list(tree / "test_list.txt"))
    shuffled = np.random.default_rng(0).permutation(table.loc[test, "Finding Labels"].to_numpy(dtype=str))
    assert (shuffled != table.loc[test, "Finding Labels"]).sum() > 10
    table.loc[test, "Finding Labels"] = shuffled
    table.to_csv(metadata, index=False)
    pack(make_plan(tree, SplitRecipe(val_fraction=0.2)), tmp_path / "shards", PixelRecipe(size=64))
    done = train(open_shards(tmp_path / "shards"), tmp_path / "runs", "small", epochs=1, batch_size=16)
    assert done.exit_code == 0, done.output
    shutil.copytree(trained / "small", tmp_path / "true" / "small")
    results = {}
    for runs in (tmp_path / "true", tmp_path / "runs"):
        for rule, method in (("f1", "platt"), ("youden", "isotonic")):
            options = ("--threshold-rule", rule, "--calibration", method)
            done = score("small", "--runs", runs, *options, *NUMBERS)
            assert done.exit_code == 0, done.output
            folder = runs / "small" / "eval" / ("test" if rule == "f1" else f"test-{rule}-calibration={method}")
            fitted = [(folder / f"{name}.json").read_bytes() for name in ("thresholds", "calibration")]
            header = read_header(runs / "small" / "model.safetensors")
            results.setdefault((rule, method), []).append(
                (header.weights_sha256, header.metadata["epoch"], fitted, decisions(runs))
            )
    assert all(true == other for true, other in results.values())
    metrics = [path.read_text() for path in tmp_path.glob("*/small/eval/test/metrics.json")]
    assert len(metrics) == 2 and metrics[0] != metrics[1]


def test_a_rule_and_a_calibration_can_be_chosen(runs: Path) -> None:
    plain, other = (evaluated(runs, "test"), evaluated(runs, "test", rule=parse_rule("youden"), calibration="platt"))
    assert other.operating_point.rule == "youden"
    assert other.thresholds != plain.thresholds
    assert other.scores.macro["auroc"] == plain.scores.macro["auroc"]
    assert other.operating_point.calibration is not None and other.operating_point.calibration.method == "platt"
    bare = evaluated(runs, "test", calibration=None)
    assert bare.operating_point.calibration is None and bare.calibrated is None
    assert len({each.folder for each in (plain, other, bare)}) == 3


def test_half_is_scored_for_comparison(runs: Path) -> None:
    evaluation = evaluated(runs, "test")
    test = evaluation.predictions["test"]
    alarms = (test.probabilities >= 0.5) & (test.labels == 1)
    assert evaluation.at_half.per_finding["tp"].tolist() == alarms.sum(axis=0).tolist()
    whole = score_arrays(test.labels, test.probabilities, np.full(len(FINDINGS), 0.5), FINDINGS)
    pd.testing.assert_frame_equal(evaluation.at_half.to_frame(), whole.to_frame(), check_exact=True)


def test_calibration_changes_brier_and_ece_alone(runs: Path) -> None:
    evaluation = evaluated(runs, "val")
    calibrated = evaluation.calibrated
    assert calibrated is not None
    scores = evaluation.scores.to_frame()
    assert calibrated["brier"].equals(scores["brier"])
    assert calibrated["ece"].equals(scores["ece"])
    # On the split that it was fitted on it helps, by and large.
    assert calibrated.at["macro", "calibrated_brier"] < calibrated.at["macro", "brier"]


def test_an_unknown_run_lists_the_known_ones(trained: Path) -> None:
    expect_refusal(score("large", "--runs", trained), 2, "the runs there: other, small")


def test_a_run_without_finished_weights_is_never_scored(runs: Path) -> None:
    (runs / "small" / "model.safetensors").unlink()
    expect_refusal(score("small", "--runs", runs), 3, "its training has not finished")


def test_shards_with_another_split_are_refused_unless_asked_for(runs: Path, phantom_tree: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    pack(make_plan(phantom_tree, SplitRecipe(rule="random", seed=1)), other, PixelRecipe(size=64))
    assert score("small", "--runs", runs, *NUMBERS).exit_code == 0
    refused = score("small", "--runs", runs, "--shards", other)
    expect_refusal(refused, 3, "is not what small was trained on")
    stamped = decisions(runs)
    metrics = runs / "small" / "eval" / "test" / "metrics.json"
    before = metrics.read_bytes()
    assert score("small", "--runs", runs, "--shards", other, "--allow-other-shards", *NUMBERS).exit_code == 0
    assert metrics.read_bytes() == before
    (foreign,) = (runs / "small" / "eval").glob("test-*/metrics.json")
    assert json.loads(foreign.read_text())["manifest_sha256"] == sha256_of(other / NAME)
    assert decisions(runs) == stamped


def test_shards_of_another_size_are_refused(runs: Path, phantom_tree: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    pack(make_plan(phantom_tree, SplitRecipe(val_fraction=0.2)), other, PixelRecipe(size=32))
    expect_refusal(score("small", "--runs", runs, "--shards", other, "--allow-other-shards"), 3, "takes 64 px")


def test_weights_of_other_findings_or_another_arch_are_refused(runs: Path) -> None:
    run = RunDirectory(runs / "small")
    model, metadata = load_model(run.model)
    save_model(run.model, model.state_dict(), {**metadata, "findings": list(reversed(FINDINGS))})
    expect_refusal(score("small", "--runs", runs), 3, "predicts Hernia, Pleural_Thickening, Fibrosis and 11 more")
    save_model(run.model, model.state_dict(), metadata)
    config = json.loads(run.config.read_text())
    config["arch"]["value"] = "resnet50"
    run.config.write_text(json.dumps(config))
    expect_refusal(score("small", "--runs", runs), 3, "is a custom_cnn, but")


def test_shards_with_findings_in_another_order_are_refused(
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
