"""`python -m eval.score` on NIH's own metadata: the same protocol for any model, and what is refused."""

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from eval.predict.predictions import Predictions
from eval.scores import metrics
from eval.scores.thresholds import parse_rule, pick_thresholds
from eval.submission import read_labels
from shards.entries import read_entries
from shards.findings import FINDINGS
from shards.folder import ShardFolder
from tests.eval.submission.scoring import OUR_COLUMNS, predict, run, score, write


def test_the_official_test_list_scores_as_scikit_learn_says_at_thresholds_from_val(
    official: dict[str, pd.DataFrame], metadata: Path, nih_data: Path, tmp_path: Path
) -> None:
    test, val = predict(official["test"]), predict(official["val"], seed=1)
    record = score(
        write(test, tmp_path / "test.csv"),
        *("--entries", metadata),
        *("--val", write(val, tmp_path / "val.csv")),
        *("--split", nih_data / "nih_metadata" / "test_list.txt"),
        *("--threshold-rule", "youden"),
    )
    assert (record["images"], record["patients"]) == (25596, 2797)
    assert record["fitted"]["images"] == 11212
    assert record["decided"] == {"images": 25596, "patients": 2797}
    labels = official["val"][list(FINDINGS)].to_numpy()
    thresholds = pick_thresholds(labels, val[OUR_COLUMNS[1:]].to_numpy(), parse_rule("youden"))
    for column, finding in enumerate(FINDINGS):
        truth, said = official["test"][finding], test[f"prob_{finding}"]
        row = record["per_finding"][finding]
        assert row["auroc"] == pytest.approx(roc_auc_score(truth, said), abs=1e-12)
        assert row["average_precision"] == pytest.approx(average_precision_score(truth, said), abs=1e-12)
        assert row["brier"] == pytest.approx(brier_score_loss(truth, said), abs=1e-12)
        assert row["threshold"] == thresholds[column]
        assert row["tp"] == ((said >= thresholds[column]) & (truth == 1)).sum()
    assert record["macro"]["auroc"] == pytest.approx(np.mean([row["auroc"] for row in record["per_finding"].values()]))


def test_without_val_one_half_of_the_patients_decides_on_the_other(sample: Path, entries: pd.DataFrame) -> None:
    options = ("--entries", sample / "Data_Entry_2017_v2020.csv")
    record = score(sample / "predictions.csv", *options)
    assert record["thresholds_fitted_on"] == "half of the patients"
    assert record["fitted"]["images"] + record["decided"]["images"] == record["images"] == 120
    assert abs(record["fitted"]["patients"] - record["decided"]["patients"]) <= 1
    assert record["fitted"]["patients"] + record["decided"]["patients"] == record["patients"]
    for row in record["per_finding"].values():
        if row["threshold"] is not None:
            assert row["tp"] + row["fp"] + row["fn"] + row["tn"] == record["decided"]["images"]
            assert row["tp"] + row["fn"] <= row["positives"]
    assert record == score(sample / "predictions.csv", *options)
    other = score(sample / "predictions.csv", *options, "--seed", 1)
    assert other["per_finding"]["Infiltration"]["auroc"] == record["per_finding"]["Infiltration"]["auroc"]
    assert {name: row["threshold"] for name, row in other["per_finding"].items()} != {
        name: row["threshold"] for name, row in record["per_finding"].items()
    }


def test_a_finding_that_only_one_half_has_is_warned_of(sample: Path, predictions: pd.DataFrame, tmp_path: Path) -> None:
    table = read_entries(sample / "Data_Entry_2017_v2020.csv").table
    ill = table[table["Hernia"] == 1]
    others = table[(table["Hernia"] == 1) & (table["patient"] != ill["patient"].iloc[0])]
    (tmp_path / "list.txt").write_text("\n".join(set(table["image"]) - set(others["image"])))
    seen = set()
    for seed in range(6):
        options = ("--entries", sample, "--split", tmp_path / "list.txt", "--seed", seed)
        record = score(sample / "predictions.csv", *options)
        row = record["per_finding"]["Hernia"]
        warnings = "\n".join(line for line in record["warnings"] if line.startswith("Hernia"))
        assert row["auroc"] is not None
        assert row["precision"] is None
        picked = row["threshold"] is not None
        assert ("Hernia has no threshold" in warnings) == (not picked)
        assert ("Hernia has one class only in the half that is decided on" in warnings) == picked
        seen.add(picked)
    assert seen == {True, False}


def test_the_halves_and_the_interval_of_the_headline_are_said(sample: Path) -> None:
    done = run(sample / "predictions.csv", "--entries", sample / "Data_Entry_2017_v2020.csv", "--resamples", 50)
    assert done.exit_code == 0, done.output
    assert "thresholds (f1) from one half of the patients, drawn with seed 0: " in done.output
    assert "precision, recall, specificity, NPV, F1 and the counts are of the other half: " in done.output
    assert "macro AUROC 0." in done.output
    assert "95 % confidence interval over patients 0." in done.output


def test_a_shard_folder_s_entries_are_scored_on_their_test_split(phantom_shards: ShardFolder, tmp_path: Path) -> None:
    table = phantom_shards.entries
    both = write(predict(table[table["split"] != "train"]), tmp_path / "both.csv")
    val = write(predict(table[table["split"] == "val"]), tmp_path / "val.csv")
    for entries in (phantom_shards.path / "entries.csv", phantom_shards.path):
        done = run(both, "--entries", entries, "--val", val, "--resamples", 0)
        assert done.exit_code == 0, done.output
        scored = phantom_shards.manifest.splits["test"]
        assert f"both.csv on test: {scored.images} images of {scored.patients} patients" in done.output
        assert f"ignored: predictions on {(table['split'] == 'val').sum()} images" in done.output
    only_val = score(val, "--entries", phantom_shards.path, "--split", "val")
    assert only_val["images"] == phantom_shards.manifest.splits["val"].images


def test_the_predictions_that_a_run_leaves_are_read_to_the_last_bit(
    phantom_shards: ShardFolder, tmp_path: Path
) -> None:
    random = np.random.default_rng(2)
    stored = {}
    for split in ("val", "test"):
        rows = phantom_shards.rows(split)
        entries = phantom_shards.entries.loc[rows]
        labels = entries[list(FINDINGS)].to_numpy(dtype=np.uint8)
        probabilities = random.random(labels.shape, dtype=np.float32)
        stored[split] = Predictions(rows, labels, probabilities, entries["patient"].to_numpy(dtype=np.int64))
        (tmp_path / f"{split}.csv").write_text(stored[split].to_csv(phantom_shards))
    record = score(tmp_path / "test.csv", "--entries", phantom_shards.path, "--val", tmp_path / "val.csv")
    val, test = stored["val"], stored["test"]
    thresholds = pick_thresholds(val.labels, val.probabilities)
    expected = metrics.score(test.labels, test.probabilities, thresholds, FINDINGS).to_json()
    assert {key: record[key] for key in expected} == expected


def test_no_test_label_reaches_a_threshold_picked_on_val(phantom_shards: ShardFolder, tmp_path: Path) -> None:
    table = phantom_shards.entries.copy()
    in_test = table["split"] == "test"
    test, val = (
        write(predict(table[mask]), tmp_path / f"{name}.csv")
        for name, mask in (("test", in_test), ("val", table["split"] == "val"))
    )
    before = score(test, "--entries", phantom_shards.path, "--val", val)
    columns = list(FINDINGS)
    table.loc[in_test, columns] = table.loc[in_test, columns].sample(frac=1, random_state=3).to_numpy()
    table.to_csv(tmp_path / "shuffled.csv")
    after = score(test, "--entries", tmp_path / "shuffled.csv", "--val", val)
    cuts = [{name: row["threshold"] for name, row in r["per_finding"].items()} for r in (before, after)]
    assert cuts[0] == cuts[1]
    assert before["macro"]["auroc"] != after["macro"]["auroc"]


def test_names_spelling_and_order_of_rows_and_columns_change_nothing(
    sample: Path, predictions: pd.DataFrame, tmp_path: Path
) -> None:
    expected = score(sample / "predictions.csv", "--entries", sample / "Data_Entry_2017_v2020.csv")
    renamed = predictions.rename(columns=lambda name: name.removeprefix("prob_")).rename(
        columns={"image": "Image Index", "Pleural_Thickening": "Pleural Thickening"}
    )
    shuffled = renamed[renamed.columns[::-1]].sample(frac=1, random_state=0).assign(label_Mass=7, note="x")
    nih = (sample / "Data_Entry_2017_v2020.csv").read_text()
    assert "Patient Gender" in nih
    (tmp_path / "nih.csv").write_text(nih.replace("Patient Gender", "Patient Sex"))
    with gzip.open(tmp_path / "nih.csv.gz", "wb") as file:
        file.write((tmp_path / "nih.csv").read_bytes())
    for name, table, entries in (
        ("a.csv", renamed, tmp_path / "nih.csv"),
        ("b.csv.gz", shuffled, tmp_path / "nih.csv.gz"),
        ("c.csv", shuffled, sample),
    ):
        record = score(write(table, tmp_path / name), "--entries", entries)
        differing = {key for key in record if record[key] != expected[key]}
        assert differing <= {"predictions_sha256", "entries_sha256"}
    text = (sample / "predictions.csv").read_text()
    (tmp_path / "d.csv").write_bytes(("\ufeff" + text.replace("\n", "\r\n")).encode())
    record = score(tmp_path / "d.csv", "--entries", sample)
    assert record["per_finding"] == expected["per_finding"]


def test_intervals_enclose_the_values_and_every_file_is_written(sample: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--entries", sample, "--seed", 3)
    record = score(sample / "predictions.csv", *options, "--resamples", 200, "--out", out)
    assert {path.name for path in out.iterdir()} == {
        *("metrics.json", "metrics.csv", "thresholds.json", "intervals.csv")
    }
    assert json.loads((out / "metrics.json").read_text()) == record
    intervals = record["intervals"]
    assert list(intervals) == [*FINDINGS, "macro", "micro"]
    for measure in ("auroc", "average_precision", "recall", "brier"):
        low, high = (intervals["micro"][f"{measure}_{end}"] for end in ("low", "high"))
        assert low < record["micro"][measure] < high
    thresholds = json.loads((out / "thresholds.json").read_text())
    assert thresholds["threshold_rule"] == "f1"
    assert thresholds["thresholds"]["Mass"] == record["per_finding"]["Mass"]["threshold"]
    assert score(sample / "predictions.csv", *options)["intervals"] is None


@pytest.mark.parametrize("halved", [True, False])
def test_decisions_at_one_half_are_of_the_same_images_and_have_intervals(
    halved: bool, sample: Path, predictions: pd.DataFrame, tmp_path: Path
) -> None:
    table = read_labels(sample).table
    val = table["patient"].isin(table["patient"].unique()[::2])
    (tmp_path / "list.txt").write_text("\n".join(table["image"][~val]))
    options = ["--entries", sample, "--resamples", 200]
    if not halved:
        given = write(predictions[predictions["image"].isin(table["image"][val])], tmp_path / "val.csv")
        options += ["--split", tmp_path / "list.txt", "--val", given]
    record = score(sample / "predictions.csv", *options)
    assert (record["decided"]["images"] < record["images"]) == halved
    half = record["at_half"]
    for finding, row in half["per_finding"].items():
        counted = [row[count] for count in ("tp", "fp", "fn", "tn")]
        assert sum(counted) == record["decided"]["images"]
        assert row["tp"] + row["fn"] == sum(record["per_finding"][finding][count] for count in ("tp", "fn"))
        assert row["auroc"] == record["per_finding"][finding]["auroc"]
    for measure in ("precision", "recall", "specificity", "npv", "f1"):
        row = record["intervals"]["micro"]
        assert row[f"at_half_{measure}_low"] <= half["micro"][measure] <= row[f"at_half_{measure}_high"]
    assert row["at_half_recall_low"] < row["at_half_recall_high"]


def test_a_finding_of_one_class_is_left_out_aloud(predictions: pd.DataFrame, sample: Path, tmp_path: Path) -> None:
    nih = (sample / "Data_Entry_2017_v2020.csv").read_text()
    (tmp_path / "nih.csv").write_text(nih.replace("Hernia", "Mass").replace("Mass|Mass", "Mass"))
    done = run(sample / "predictions.csv", "--entries", tmp_path / "nih.csv", "--resamples", 20)
    assert done.exit_code == 0, done.output
    assert "Hernia has no positives in this split: it scores NaN and is left out of" in done.output
    record = score(sample / "predictions.csv", "--entries", tmp_path / "nih.csv")
    assert record["per_finding"]["Hernia"]["auroc"] is None
    assert record["macro"]["scored"] == 13
    assert any(line.startswith("Hernia has no positives") for line in record["warnings"])
