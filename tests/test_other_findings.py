"""A set labelled with other findings than NIH's, through every command that reads it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
import pandas as pd
import pytest
from click.testing import CliRunner
from sklearn.metrics import roc_auc_score

from eval.__main__ import main as evaluation
from eval.score import main as scoring
from scripts.predict import main as predicting
from shards.findings import FINDINGS, check_findings
from shards.folder import ShardFolder, open_shards
from shards.packing import pack
from shards.packing.planning import SplitRecipe, make_plan
from shards.pixels import PixelRecipe
from shards.verification import verify_shards
from tests.trainer.running import metrics, train
from trainer.model_file import load_model

# Some of NIH's, renamed: with a slash, blanks, and letters outside ASCII, in another order.
RENAMED = {
    "Mass": "Nodule/Mass",
    "Edema": "Edema",
    "Cardiomegaly": "Aortic enlargement, grade 2",
    "Infiltration": "Trübung",
    "Effusion": "effusion",
}
FIVE = tuple(RENAMED.values())


def command(main: click.Command, *arguments: object) -> str:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def five(phantom_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardFolder:
    """Phantoms with the labels and boxes of FIVE alone."""
    out = tmp_path_factory.mktemp("five")
    plan = make_plan(phantom_tree, SplitRecipe(val_fraction=0.2))
    assert plan.boxes is not None
    others = [finding for finding in FINDINGS if finding not in RENAMED]
    boxes = plan.boxes[plan.boxes["finding"].isin(RENAMED)]
    pack(
        dataclasses.replace(
            plan,
            findings=FIVE,
            table=plan.table.drop(columns=others).rename(columns=RENAMED),
            boxes=boxes.assign(finding=boxes["finding"].map(RENAMED)),
        ),
        out,
        PixelRecipe(size=64),
        shard_size=20,
    )
    return open_shards(out)


@pytest.fixture(scope="module")
def run(five: ShardFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on them and evaluated, with everything a report has."""
    runs = tmp_path_factory.mktemp("runs")
    done = train(five, runs, "five", epochs=2, batch_size=16, pos_weight="log", monitor="auroc")
    assert done.exit_code == 0, done.output
    command(evaluation, "five", "--runs", runs, "--resamples", 50, "--heatmaps", 1)
    return runs / "five"


def test_shards_hold_a_byte_for_each_finding_and_verify(five: ShardFolder) -> None:
    assert five.manifest.findings == FIVE
    assert verify_shards(five.path).faults == ()
    assert five.labels("train").shape == (five.manifest.splits["train"].images, 5)
    header = (five.path / "entries.csv").read_text().splitlines()[0]
    assert 'split,Nodule/Mass,Edema,"Aortic enlargement, grade 2",Trübung,effusion,age' in header
    assert five.boxes is not None and set(five.boxes["finding"]) <= set(FIVE)


@pytest.mark.parametrize("loader", ["dataloader", "webdataset", "resident"])
def test_every_loader_trains_on_them(five: ShardFolder, tmp_path: Path, loader: str) -> None:
    options: dict[str, Any] = {"freeze": "backbone"} if loader == "resident" else {}
    assert train(five, tmp_path, "run", epochs=1, batch_size=16, loader=loader, **options).exit_code == 0
    assert len(metrics(tmp_path / "run", "epoch")) == 1


def test_a_model_names_them_and_is_scored_by_them(run: Path, five: ShardFolder) -> None:
    model, metadata = load_model(run / "model.safetensors")
    assert metadata["findings"] == list(FIVE)
    assert model.network.head.output.out_features == 5
    scores = json.loads((run / "eval" / "test" / "metrics.json").read_text())["per_finding"]
    assert list(scores) == list(FIVE)
    predicted = pd.read_csv(run / "eval" / "test" / "predictions.csv")
    for column, finding in enumerate(FIVE):
        truth = five.labels("test")[:, column]
        if 0 < truth.sum() < len(truth):
            expected = roc_auc_score(truth, predicted[f"prob_{finding}"])
            assert scores[finding]["auroc"] == pytest.approx(expected, abs=1e-12)
    page = (run / "eval" / "test" / "report.html").read_text()
    assert "Aortic enlargement, grade 2" in page and "Trübung" in page and "Hernia" not in page


def test_predictions_are_scored_again_from_a_table_and_by_file(
    run: Path, five: ShardFolder, phantom_tree: Path, tmp_path: Path
) -> None:
    own = run / "eval" / "test"
    for entries in (five.path / "entries.csv", tmp_path / "entries.csv"):  # with its manifest, and alone
        entries.write_bytes((five.path / "entries.csv").read_bytes())
        options = ["--entries", entries, "--val", own / "val_predictions.csv", "--json", tmp_path / "s.json"]
        command(scoring, own / "predictions.csv", *options)
        again = json.loads((tmp_path / "s.json").read_text())
        assert again["macro"]["auroc"] == json.loads((own / "metrics.json").read_text())["macro"]["auroc"]
    image = next(phantom_tree.rglob("00000001_000.png"))
    decisions = json.loads((run / "decisions.json").read_text())
    decisions["thresholds"] = dict.fromkeys(FIVE, 0.0)
    (run / "decisions.json").write_text(json.dumps(decisions))
    said = command(predicting, run, image, "--heatmaps", tmp_path / "maps")
    assert all(finding in said for finding in FIVE)
    assert (tmp_path / "maps" / "00000001_000-Nodule-Mass.png").is_file()


def test_a_run_is_not_scored_on_shards_of_other_findings(run: Path, phantom_shards: ShardFolder) -> None:
    options = ["--runs", str(run.parent), "--shards", str(phantom_shards.path), "--allow-other-shards"]
    refused = CliRunner().invoke(evaluation, ["five", *options])
    assert refused.exit_code == 3
    assert "is labelled with Atelectasis, Cardiomegaly, Effusion and 11 more" in refused.output


@pytest.mark.parametrize(
    "name",
    ["", " Mass", "Mass ", "a|b", "a\nb", "a\x1bb", "=A1", "+1", "-1", "@x", "x" * 65, "a\u2028b", "a\u202eb", "macro"],
)
def test_names_that_break_a_table_or_a_terminal_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is no name of a finding"):
        check_findings(["Mass", name])


def test_1_to_500_findings_are_taken() -> None:
    check_findings([f"finding {number}" for number in range(500)])
    for wrong in (0, 501):
        with pytest.raises(ValueError, match=f"{wrong} findings, where 1 to 500 are possible"):
            check_findings([str(number) for number in range(wrong)])
