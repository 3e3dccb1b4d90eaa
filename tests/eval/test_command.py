"""`python -m eval` on runs trained on phantoms: several runs, lists of images, what is kept and reused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from eval.__main__ import main
from eval.ensemble import joint_name
from shards.files import sha256_of
from shards.folder import ShardFolder
from tests.eval.commanding import NUMBERS, contents, expect_refusal, score, succeed
from trainer.model_file import load_model, save_model
from trainer.run_directory import RunDirectory

ROOT = Path(__file__).parents[2]


@pytest.fixture
def changeable(scored: Path, tmp_path: Path) -> Path:
    """A copy of the scored runs that a test may change."""
    return Path(shutil.copytree(scored, tmp_path / "changeable"))


def test_without_a_run_the_runs_are_listed(scored: Path, tmp_path: Path) -> None:
    listed = succeed("--runs", scored)
    small = next(line for line in listed.stdout.splitlines() if line.startswith("small"))
    assert "custom_cnn" in small and "0." in small
    assert "not scored; python -m eval other" in listed.stdout
    assert "python -m trainer" in succeed("--runs", tmp_path).stdout


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"macro": {"auroc": "high"}}'])
@pytest.mark.parametrize("name", ["config.json", "eval/test/metrics.json"])
def test_a_damaged_file_takes_no_other_run_from_the_list(changeable: Path, name: str, text: str) -> None:
    (changeable / "small" / name).write_text(text)
    rows = {line.split()[0]: line for line in succeed("--runs", changeable).stdout.splitlines()}
    assert "damaged" in rows["small"]
    assert "not scored; python -m eval other" in rows["other"]


def test_scoring_again_needs_no_torch_and_gives_the_same_files(changeable: Path) -> None:
    folder = changeable / "small" / "eval" / "test"
    before = contents(folder)
    code = (
        "import sys\n"
        "from eval.__main__ import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "print(sorted({'torch', 'nvidia', 'torchvision'} & set(sys.modules)))"
    )
    options = ["small", "--runs", str(changeable), "--resamples", "20", "--heatmaps", "1"]
    done = subprocess.run([sys.executable, "-c", code, *options], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    after = contents(folder)
    assert {name for name in before if after[name] != before[name]} == set()


def test_predictions_are_made_anew_for_other_weights_and_where_asked_for(changeable: Path) -> None:
    path, model_file = (changeable / "small" / name for name in ("eval/test/predictions.csv", "model.safetensors"))
    before, inode = path.read_bytes(), path.stat().st_ino
    succeed("small", "--runs", changeable, *NUMBERS)
    assert path.stat().st_ino == inode
    succeed("small", "--runs", changeable, "--force", *NUMBERS)
    assert path.stat().st_ino != inode
    assert path.read_bytes() == before
    model, metadata = load_model(model_file)
    state = model.state_dict()
    next(iter(state.values())).mul_(1.01)
    save_model(model_file, state, metadata)
    refused = score("small", "--runs", changeable, *NUMBERS)
    expect_refusal(refused, 3, "decisions.json was fitted for other weights than those of model.safetensors")
    (changeable / "small" / "decisions.json").unlink()
    succeed("small", "--runs", changeable, *NUMBERS)
    assert path.read_bytes() != before


def test_the_mirror_has_a_folder_of_its_own(changeable: Path) -> None:
    before = contents(changeable / "small" / "eval" / "test")
    succeed("small", "--runs", changeable, "--tta", *NUMBERS)
    assert contents(changeable / "small" / "eval" / "test") == before
    mirrored = pd.read_csv(changeable / "small" / "eval" / "test-tta" / "predictions.csv")
    plain = pd.read_csv(changeable / "small" / "eval" / "test" / "predictions.csv")
    assert mirrored["image"].equals(plain["image"])
    assert not np.allclose(mirrored["prob_Mass"], plain["prob_Mass"], atol=1e-6)


def test_nothing_of_an_earlier_evaluation_stands_beside_other_numbers(changeable: Path) -> None:
    folder = changeable / "small" / "eval" / "test"
    assert (folder / "intervals.csv").is_file() and (folder / "report.html").is_file()
    (folder / "calibration.csv").write_text("of another calibration")
    succeed("small", "--runs", changeable, *NUMBERS)
    left = {path.name for path in folder.iterdir() if path.is_file()}
    assert not left & {"intervals.csv", "report.html", "roc.png"}
    assert (folder / "calibration.csv").read_text() != "of another calibration"


def test_a_list_of_images_is_scored_as_a_part_of_its_split(
    changeable: Path, phantom_shards: ShardFolder, tmp_path: Path
) -> None:
    entries = phantom_shards.entries
    chosen = entries["image"][entries["split"] == "test"].tolist()[3:17]
    listed = tmp_path / "reread.txt"
    listed.write_text("\n".join(reversed(chosen)))
    done = succeed("small", "--runs", changeable, "--split", listed, *NUMBERS)
    assert "small on reread: 14 images" in done.stdout
    folder = changeable / "small" / "eval" / "reread"
    part = pd.read_csv(folder / "predictions.csv")
    whole = pd.read_csv(changeable / "small" / "eval" / "test" / "predictions.csv")
    assert part["image"].tolist() == chosen
    assert part.equals(whole.iloc[3:17].reset_index(drop=True))
    thresholds = [folder / "thresholds.json", changeable / "small" / "eval" / "test" / "thresholds.json"]
    assert thresholds[0].read_bytes() == thresholds[1].read_bytes()


@pytest.mark.parametrize(
    ("name", "split", "exit_code", "message"),
    [
        ("list.txt", "train", 3, "are in train, where models are fitted"),
        ("list.txt", None, 3, "1 of 1 images on the list list are not in"),
        ("test.txt", "test", 2, "would pass for that split"),
        ("val-tta.txt", "val", 2, "would pass for that split"),
    ],
)
def test_a_list_that_cannot_be_scored_is_refused(
    scored: Path,
    phantom_shards: ShardFolder,
    tmp_path: Path,
    name: str,
    split: str | None,
    exit_code: int,
    message: str,
) -> None:
    entries = phantom_shards.entries
    image = "99999999_000.png" if split is None else entries["image"][entries["split"] == split].iloc[0]
    (tmp_path / name).write_text(image)
    expect_refusal(score("small", "--runs", scored, "--split", tmp_path / name), exit_code, message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["small", "--split", "train"], "the model was fitted on train"),
        (["small", "--split", "tset"], "there is no such file"),
        (["small", "--threshold-rule", "sensitivity=2"], "--threshold-rule: the target of sensitivity"),
        (["small", "--compare"], "--compare needs two runs or more"),
        (["small", "--average"], "--average needs two runs or more"),
        (["small", "small", "--compare"], "a run is given twice"),
        (["small", "other", "--compare", "--resamples", "0"], "--compare needs --resamples"),
        (["small", "--heatmaps", "0", "--boxes", "boxes.csv"], "--boxes needs heat maps"),
    ],
)
def test_options_that_make_no_sense_are_refused(scored: Path, options: list[str], message: str) -> None:
    expect_refusal(score("--runs", scored, *options), 2, message)


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        (["--rule", "sensitivity=2"], {}, "--threshold-rule: the target of sensitivity"),
        ([], {"CXRAPID_RULE": "sensitivity=2"}, "--threshold-rule: the target of sensitivity"),
        ([], {"CXRAPID_THRESHOLD_RULE": "sensitivity=2"}, "--threshold-rule: the target of sensitivity"),
        (["--again", "other", "--average"], {}, "--force is for a run of its own"),
        (["other", "--average"], {"CXRAPID_AGAIN": "1"}, "--force is for a run of its own"),
        (["--other-shards", "--set-decisions"], {}, "not --allow-other-shards"),
    ],
)
def test_the_old_names_of_options_mean_the_same_and_stand_in_no_help(
    scored: Path, options: list[str], environment: dict[str, str], message: str
) -> None:
    done = CliRunner().invoke(main, ["--runs", str(scored), "small", *options], env=environment)
    expect_refusal(done, 2, message)
    shown = CliRunner().invoke(main, ["--help"]).output
    assert not [old for old in ("--rule", "--again", " --other-shards") if old in shown]


def test_runs_are_compared_and_averaged_on_the_same_images(changeable: Path, tmp_path: Path) -> None:
    succeed("other", "--runs", changeable, *NUMBERS)
    options = ("--average", "--compare", "--resamples", 30, "--no-report", "--heatmaps", 0)
    done = succeed("small", "other", "--runs", changeable, *options, "--json", tmp_path / "all.json")
    assert "other - small" in done.stdout and "small+other - small" in done.stdout
    table = pd.read_csv(changeable / "small-vs-other" / "eval" / "test" / "comparison.csv")
    record = json.loads((changeable / "small-vs-other" / "eval" / "test" / "comparison.json").read_text())
    assert json.loads((tmp_path / "all.json").read_text())["comparison"] == record
    assert table["run"].unique().tolist() == ["small", "other", "small+other"] == list(record["runs"])
    folders = {name: changeable / name / "eval" / "test" for name in record["runs"]}
    for name, folder in folders.items():
        own = pd.read_csv(folder / "metrics.csv", index_col=0)
        mine = table[table["run"] == name]
        for measure in ("auroc", "f1", "ece"):
            values = mine[mine["measure"] == measure].set_index("finding")["value"]
            assert values.to_numpy() == pytest.approx(own[measure].to_numpy(dtype=float), nan_ok=True)
        differs = mine[mine["finding"] == "macro"].set_index("measure")["difference"]
        if name == "small":
            assert mine[["difference", "p"]].isna().all(axis=None)
        else:
            first = pd.read_csv(folders["small"] / "metrics.csv", index_col=0)
            expected = own.at["macro", "auroc"] - first.at["macro", "auroc"]
            assert differs["auroc"] == pytest.approx(expected)
            assert mine["p"].dropna().between(0, 1, inclusive="right").all()
    averaged, one, other = (
        pd.read_csv(folders[name] / "predictions.csv") for name in ("small+other", "small", "other")
    )
    assert np.allclose(averaged["prob_Mass"], (one["prob_Mass"] + other["prob_Mass"]) / 2, atol=1e-7)


def test_results_of_many_runs_get_a_name_that_file_systems_take(tmp_path: Path) -> None:
    runs = [RunDirectory(tmp_path / f"a_rather_long_name_{number}") for number in range(30)]
    assert joint_name(runs[:2], "+") == "a_rather_long_name_0+a_rather_long_name_1"
    assert len(joint_name(runs, "+")) < 100
    assert joint_name(runs, "+") != joint_name(runs[1:], "+")


def test_a_page_of_an_earlier_comparison_does_not_stand_beside_a_new_one(changeable: Path) -> None:
    options = ("small", "other", "--runs", changeable, "--compare", "--resamples", 2, "--heatmaps", 0)
    succeed(*options)
    folder = changeable / "small-vs-other" / "eval" / "test"
    assert len(list(folder.iterdir())) == 4
    succeed(*options, "--no-report")
    assert {path.name for path in folder.iterdir()} == {"comparison.csv", "comparison.json"}


def test_a_comparison_says_what_each_run_cost(changeable: Path) -> None:
    succeed("small", "other", "--runs", changeable, "--compare", "--resamples", 2, *NUMBERS[2:])
    record = json.loads((changeable / "small-vs-other" / "eval" / "test" / "comparison.json").read_text())
    epochs = [
        line
        for line in map(json.loads, (changeable / "small" / "metrics.jsonl").read_text().splitlines())
        if line["kind"] == "epoch"
    ]
    cost = record["runs"]["small"]
    assert cost["parameters"] == sum(
        each.numel() for each in load_model(changeable / "small/model.safetensors")[0].parameters()
    )
    assert cost["epochs"] == len(epochs) == 1
    assert cost["training_seconds"] == pytest.approx(sum(line["seconds"] for line in epochs))
    assert cost["images_per_second"] == pytest.approx(epochs[0]["images_per_second"])


def test_heat_maps_and_localization_are_kept_with_the_scores(scored: Path) -> None:
    folder = scored / "small" / "eval" / "test"
    shown = json.loads((folder / "heatmaps" / "gallery.json").read_text())["maps"]
    assert {path.name for path in (folder / "heatmaps").glob("*.png")} == {each["file"] for each in shown}
    assert shown
    found = pd.read_csv(folder / "localization.csv", index_col="finding")
    assert found.at["micro", "boxes"] > 10
    assert "data:image/png" in (folder / "report.html").read_text()


def test_a_damaged_heat_map_is_drawn_again(changeable: Path) -> None:
    folder = changeable / "small" / "eval" / "test" / "heatmaps"
    picture = min(folder.glob("*.png"))
    before = picture.read_bytes()
    picture.write_bytes(before[:-1])
    (folder / "localization.json").write_text("{}")
    succeed("small", "--runs", changeable, "--heatmaps", 1, *NUMBERS[:3])
    assert picture.read_bytes() == before
    assert json.loads((folder / "localization.json").read_text())["rows_sha256"]


def without_torch(*options: object) -> "subprocess.CompletedProcess[str]":
    """Run the command as on a machine where torch is not installed."""
    code = (
        "import sys\n"
        "class Without:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] == 'torch':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Without())\n"
        "from eval.__main__ import main\n"
        "main(sys.argv[1:])"
    )
    arguments = [sys.executable, "-c", code, *map(str, options)]
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)


def test_without_torch_another_rule_is_scored_and_reported_in_full_but_for_new_heat_maps(changeable: Path) -> None:
    folder = changeable / "small" / "eval" / "test"
    options = ("small", "--runs", changeable, "--threshold-rule", "youden", "--resamples", 0)
    failed = without_torch(*options, "--heatmaps", 1)
    assert failed.returncode == 4, failed.stderr
    (line,) = failed.stderr.splitlines()
    assert line.startswith("Error: drawing heat maps needs torch") and "--heatmaps 0" in line
    assert "macro" in failed.stdout
    what_if = folder.with_name("test-youden")
    assert json.loads((what_if / "thresholds.json").read_text())["rule"] == "youden"
    assert "Threshold rule youden," in (what_if / "report.html").read_text()
    assert not list((what_if / "heatmaps").glob("*.png"))


def test_without_torch_predicting_is_refused_in_one_line(changeable: Path) -> None:
    failed = without_torch("other", "--runs", changeable, *NUMBERS)
    assert failed.returncode == 4, failed.stderr
    assert failed.stderr.startswith("Error: predicting needs torch") and failed.stderr.count("\n") == 1


def test_heat_maps_of_other_decisions_do_not_stand_beside_new_scores(changeable: Path) -> None:
    maps = changeable / "small" / "eval" / "test" / "heatmaps"
    before = contents(maps)
    succeed("small", "--runs", changeable, *NUMBERS)
    assert contents(maps) == before
    record = json.loads((maps / "gallery.json").read_text())
    record["thresholds"]["Mass"] = 0.123
    (maps / "gallery.json").write_text(json.dumps(record))
    succeed("small", "--runs", changeable, *NUMBERS)
    assert before.keys() - contents(maps).keys() == {
        name for name in before if name.endswith(".png") or name == "gallery.json"
    }


def test_predictions_made_anew_replace_all_older_ones(changeable: Path, tmp_path: Path) -> None:
    listed = tmp_path / "a_list.txt"
    val = pd.read_csv(changeable / "small" / "eval" / "test" / "val_predictions.csv")
    listed.write_text("\n".join(val["image"][:20]))
    succeed("small", "--runs", changeable, "--split", listed, *NUMBERS)
    older = changeable / "small" / "eval" / "a_list" / "val_predictions.csv"
    # As if an earlier version, or another device, had given other numbers.
    table = pd.read_csv(older)
    table["prob_Mass"] = table["prob_Mass"] / 2
    table.to_csv(older, index=False, lineterminator="\n")
    note = json.loads(older.with_suffix(".json").read_text())
    older.with_suffix(".json").write_text(json.dumps({**note, "csv_sha256": sha256_of(older)}))
    for path in older.parent.glob("predictions.*"):
        path.unlink()
    succeed("small", "--runs", changeable, "--force", *NUMBERS)
    succeed("small", "--runs", changeable, "--split", "val", *NUMBERS)
    again = pd.read_csv(changeable / "small" / "eval" / "val" / "predictions.csv")
    assert again["prob_Mass"].equals(val["prob_Mass"])


def test_a_folder_that_cannot_be_written_to_is_named(changeable: Path) -> None:
    if os.geteuid() == 0:
        (changeable / "other" / "eval").write_text("a file where a folder is needed")
    else:
        (changeable / "other").chmod(0o500)
    expect_refusal(score("other", "--runs", changeable, *NUMBERS), 4, "cannot write")
