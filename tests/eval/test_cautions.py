"""`python -m eval` on images a model may know: said everywhere, or refused before anything is predicted."""

import json
from pathlib import Path

import pytest

from shards.folder import ShardFolder, open_shards
from shards.packing import pack
from shards.packing.planning import SplitRecipe, make_plan
from shards.pixels import PixelRecipe
from tests.eval.commanding import NUMBERS, expect_refusal, score, succeed
from tests.trainer.running import train


@pytest.fixture(scope="module")
def other_shards(phantom_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images, split at random."""
    folder = tmp_path_factory.mktemp("packed") / "shards"
    pack(make_plan(phantom_tree, SplitRecipe(rule="random", seed=1)), folder, PixelRecipe(size=64))
    return folder


def written(folder: Path) -> list[str]:
    warnings = json.loads((folder / "metrics.json").read_text())["warnings"]
    assert isinstance(warnings, list)
    return warnings


def test_a_run_on_other_shards_is_named_wherever_its_scores_go(runs: Path, other_shards: Path) -> None:
    done = train(open_shards(other_shards), runs, "native", epochs=1, batch_size=16)
    assert done.exit_code == 0, done.output
    options = ("--allow-other-shards", "--resamples", 2, "--heatmaps", 0, "--no-report")
    succeed("native", "small", "--runs", runs, "--shards", other_shards, *options)
    options = (*options, "--average", "--compare")
    shown = succeed("native", "small", "--runs", runs, "--shards", other_shards, *options).stdout
    said = "Trained on other shards than these: small."
    assert shown.count(said) == 2  # of small, and of the average
    (native,) = (runs / "native" / "eval").glob("test*")
    (alone,) = (runs / "small" / "eval").glob("test*")
    (joint,) = (runs / "native+small" / "eval").iterdir()
    (compared,) = (runs / "native-vs-small" / "eval").iterdir()
    assert native.name == "test"
    assert alone.name == joint.name == compared.name == f"test-{open_shards(other_shards).digest[:12]}"
    assert [sum(line.startswith(said) for line in written(folder)) for folder in (native, alone, joint)] == [0, 1, 1]
    record = json.loads((compared / "comparison.json").read_text())
    warned = [line.partition(":")[0] for line in record["warnings"] if said in line]
    assert warned == ["small", "native+small"]
    trained_on = json.loads((joint / "metrics.json").read_text())["trained_on_manifest_sha256"]
    own = open_shards(other_shards).digest
    assert trained_on[0] == own != trained_on[1]


def test_runs_of_other_image_sizes_are_each_on_their_own_shards(runs: Path, phantom_tree: Path, tmp_path: Path) -> None:
    pack(make_plan(phantom_tree, SplitRecipe(val_fraction=0.2)), tmp_path / "32", PixelRecipe(size=32))
    done = train(open_shards(tmp_path / "32"), runs, "coarse", epochs=1, batch_size=16)
    assert done.exit_code == 0, done.output
    done = succeed("small", "coarse", "--runs", runs, "--average", *NUMBERS)
    assert "Trained on other shards" not in done.stdout
    assert (runs / "small+coarse" / "eval" / "test" / "metrics.json").is_file()


@pytest.mark.parametrize("of_test", [0, 5])
def test_images_that_thresholds_were_fitted_on_are_told_of_whatever_the_list_is_called(
    runs: Path, phantom_shards: ShardFolder, tmp_path: Path, of_test: int
) -> None:
    entries = phantom_shards.entries
    of_val = entries["image"][entries["split"] == "val"].tolist()[:10]
    others = entries["image"][entries["split"] == "test"].tolist()[:of_test]
    (tmp_path / "mine.txt").write_text("\n".join(of_val + others))
    done = succeed("small", "--runs", runs, "--split", tmp_path / "mine.txt", *NUMBERS)
    which = "10 of these 15 images" if of_test else "these very images"
    said = f"Thresholds and calibration were fitted on {which}, which are of val: "
    assert said in done.stdout
    assert any(line.startswith(said) for line in written(runs / "small" / "eval" / "mine"))


def test_metrics_json_holds_every_warning(scored: Path) -> None:
    """Also what else than the scores leaves out."""
    warnings = written(scored / "small" / "eval" / "test")
    assert any(
        line.startswith("Scores of findings that are too rare in a group are left out of the subgroups")
        for line in warnings
    )
    assert not any(line.startswith("Thresholds and calibration") for line in warnings)


def nothing_predicted(runs: Path) -> bool:
    return not list(runs.glob("*/eval"))


def test_boxes_that_cannot_be_used_are_refused_before_anything_is_predicted(runs: Path, tmp_path: Path) -> None:
    boxes = tmp_path / "boxes.csv"
    options = ("small", "--runs", runs, "--resamples", 0, "--boxes", boxes)
    expect_refusal(score(*options), 3, "boxes.csv cannot be read")
    boxes.write_text("no,list\n")
    expect_refusal(score(*options), 3, "boxes.csv is no list of boxes")
    header = "Image Index,Finding Label,Bbox [x,y,w,h]\n"
    boxes.write_text(f"{header}elsewhere.png,Mass,1,2,3,4\n")
    expect_refusal(score(*options), 3, "none of the")
    assert nothing_predicted(runs)


@pytest.mark.parametrize("option", ["--average", "--compare"])
def test_runs_of_different_images_are_refused_before_anything_is_predicted(
    runs: Path, other_shards: Path, option: str
) -> None:
    config = runs / "other" / "config.json"
    record = json.loads(config.read_text())
    record["shards"]["value"] = str(other_shards)
    config.write_text(json.dumps(record))
    refused = score("small", "other", "--runs", runs, "--allow-other-shards", option)
    expect_refusal(refused, 3, "small and other cannot be put together on val")
    assert nothing_predicted(runs)


def test_a_list_of_unknown_images_is_refused_before_anything_is_predicted(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("99999999_000.png")
    refused = score("small", "--runs", runs, "--split", tmp_path / "mine.txt")
    expect_refusal(refused, 3, "1 of 1 images on the list mine are not in")
    assert nothing_predicted(runs)
