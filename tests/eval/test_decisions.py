"""What a run decides by: set by a plain evaluation alone, bound to its weights, and told of by prediction."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from scripts.predict import main as predict_command
from tests.eval.commanding import NUMBERS, contents, expect_refusal, score, succeed
from trainer.model_file import load_model, save_model

BY_DEFAULT = "small decides by rule f1, mirror off, calibration platt"


@pytest.fixture
def changeable(scored: Path, tmp_path: Path) -> Path:
    """A copy of the scored runs that a test may change."""
    return Path(shutil.copytree(scored, tmp_path / "changeable"))


@pytest.fixture(scope="module")
def image(phantom_tree: Path) -> Path:
    return min(phantom_tree.rglob("*.png"))


def predict(*arguments: object) -> Result:
    return CliRunner().invoke(predict_command, [str(argument) for argument in arguments])


def decided_by(run: Path, image: Path) -> str:
    done = predict(run, image)
    assert done.exit_code == 0, done.output
    return str(done.stdout.splitlines()[0])


def told(done: Result) -> list[str]:
    return [line for line in done.stdout.splitlines() if "decide" in line or "decisions" in line]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--threshold-rule", "sensitivity=0.9"], "test-sensitivity=0.9"),
        (["--calibration", "none"], "test-calibration=none"),
        (["--tta"], "test-tta"),
        (["--tta", "--threshold-rule", "youden", "--calibration", "isotonic"], "test-tta-youden-calibration=isotonic"),
    ],
)
def test_a_what_if_changes_nothing_of_the_run_and_says_by_what_it_still_decides(
    changeable: Path, image: Path, options: list[str], name: str
) -> None:
    run = changeable / "small"
    before = contents(run)
    done = succeed("small", "--runs", changeable, *options, *NUMBERS)
    after = contents(run)
    assert {path for path in after if after[path] != before.get(path)} == {
        path for path in after if path.startswith((f"eval/{name}/", "eval/test-tta/"))
    }
    assert before.keys() <= after.keys() and f"eval/{name}/thresholds.json" in after
    assert told(done) == [
        "small still decides by rule f1, mirror off, calibration platt; this was a what-if, and "
        "--set-decisions makes this one count"
    ]
    assert decided_by(run, image) == BY_DEFAULT


def test_a_list_of_images_and_other_shards_set_nothing_either(runs: Path, phantom_shards: Any, tmp_path: Path) -> None:
    entries = phantom_shards.entries
    (tmp_path / "some.txt").write_text("\n".join(entries["image"][entries["split"] == "test"][:20]))
    done = succeed("small", "--runs", runs, "--split", tmp_path / "some.txt", *NUMBERS)
    assert told(done) == [
        "small has no decisions yet; a plain evaluation sets them, and --set-decisions makes this one count"
    ]
    assert not (runs / "small" / "decisions.json").exists()
    Image.new("L", (64, 64)).save(tmp_path / "any.png")
    refused = predict(runs / "small", tmp_path / "any.png")
    assert refused.exit_code == 3 and "score it first with: python -m eval" in refused.stderr


def test_a_what_if_counts_where_it_is_asked_to_and_a_plain_evaluation_says_what_it_takes_back(
    changeable: Path, image: Path, tmp_path: Path
) -> None:
    run, what_if = (changeable / "small", ("--tta", "--threshold-rule", "sensitivity=0.9", "--calibration", "none"))
    done = succeed("small", "--runs", changeable, *what_if, "--set-decisions", *NUMBERS)
    now = "rule sensitivity=0.9, mirror on, calibration none"
    assert told(done) == [f"small now decides by {now}; before by rule f1, mirror off, calibration platt"]
    done = predict(run, image, "--json", tmp_path / "said.json")
    assert done.stdout.splitlines()[0] == f"small decides by {now}"
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["decisions"] == {"rule": "sensitivity=0.9", "mirror": True, "calibration": None}
    assert "Mass" in said[str(image)]
    assert told(succeed("small", "--runs", changeable, *what_if, *NUMBERS)) == []
    (line,) = told(succeed("small", "--runs", changeable, *NUMBERS))
    assert line == f"small now decides by rule f1, mirror off, calibration platt; before by {now}"
    assert told(succeed("small", "--runs", changeable, *NUMBERS)) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set-decisions", "--average"], "--set-decisions is for a run of its own"),
        (["--set-decisions", "--compare"], "--set-decisions is for a run of its own"),
        (["--force", "--average"], "--force is for a run of its own"),
        (["--boxes", "boxes.csv", "--compare"], "--boxes is for a run of its own"),
        (["--set-decisions", "--allow-other-shards"], "not --allow-other-shards"),
    ],
)
def test_options_that_would_change_runs_that_are_only_read_are_refused(
    scored: Path, options: list[str], message: str
) -> None:
    expect_refusal(score("small", "other", "--runs", scored, *options), 2, message)


def test_an_evaluation_never_writes_the_weights_and_its_decisions_name_them(trained: Path, runs: Path) -> None:
    succeed("small", "--runs", runs, *NUMBERS)
    for name in ("model.safetensors", "model.safetensors.sha256"):
        assert (runs / "small" / name).read_bytes() == (trained / "small" / name).read_bytes()
    (note,) = (runs / "small" / "eval" / "test").glob("predictions.json")
    decisions = json.loads((runs / "small" / "decisions.json").read_text())
    assert decisions["weights_sha256"] == json.loads(note.read_text())["weights_sha256"]
    assert decisions["fitted_on"] == "val"


def test_decisions_inside_an_old_model_file_still_count(changeable: Path, image: Path) -> None:
    """As evaluations wrote them before decisions.json existed; that wins where both are there."""
    run = changeable / "small"
    decisions = json.loads((run / "decisions.json").read_text())
    expected = predict(run, image).stdout
    model, metadata = load_model(run / "model.safetensors")
    old = {key: decisions[key] for key in ("fitted_on", "rule", "thresholds", "calibration", "tta")}
    save_model(run / "model.safetensors", model.state_dict(), {**metadata, **old, "rule": "youden"})
    (run / "model.safetensors.sha256").unlink()  # which old runs have not
    assert predict(run, image).stdout == expected
    (run / "decisions.json").unlink()
    assert predict(run, image).stdout == expected.replace("rule f1", "rule youden")
    done = succeed("small", "--runs", changeable, "--threshold-rule", "precision=0.5", *NUMBERS)
    assert "small still decides by rule youden" in done.stdout


@pytest.mark.parametrize("option", ["--average", "--compare"])
def test_members_of_an_average_or_a_comparison_are_only_read(changeable: Path, option: str) -> None:
    before = {name: contents(changeable / name) for name in ("small", "other")}
    assert "eval/test/report.html" in before["small"]
    rule = ("--threshold-rule", "youden", "--heatmaps", 0, "--resamples", 2)
    succeed("small", "other", "--runs", changeable, option, "--no-report", *rule)
    succeed("small", "other", "--runs", changeable, option, "--no-report", *rule[2:])
    assert contents(changeable / "small") == before["small"]
    after = contents(changeable / "other")
    stored = {f"eval/test/{name}.{kind}" for name in ("predictions", "val_predictions") for kind in ("csv", "json")}
    assert after.keys() - before["other"].keys() == stored
    assert {name: after[name] for name in before["other"]} == before["other"]


def test_weights_that_are_not_those_of_their_hash_are_refused(changeable: Path, image: Path) -> None:
    path = changeable / "small" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    for done in (predict(path.parent, image), score("small", "--runs", changeable, *NUMBERS)):
        expect_refusal(done, 3, "model.safetensors is damaged: its SHA-256 is not in model.safetensors.sha256")
        assert done.stderr.count("\n") == 1


def test_decisions_of_other_weights_are_refused(changeable: Path, image: Path) -> None:
    other = changeable / "other"
    shutil.copy(changeable / "small" / "decisions.json", other)
    for done in (predict(other, image), score("other", "--runs", changeable, *NUMBERS)):
        expect_refusal(done, 3, "decisions.json was fitted for other weights than those of model.safetensors")
