"""`python -m eval.score` refuses what cannot be scored, in one line that names it."""

import gzip
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from shards.folder import ShardFolder
from tests.eval.submission.scoring import predict, refused, run, score, write


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.assign(image=["x.png", "y.png", *t["image"][2:]]), "2 of 120 images are not in"),
        (lambda t: t.assign(image=["x.png", "y.png", *t["image"][2:]]), "the first are x.png, y.png"),
        (lambda t: t.drop(index=[5]), "no prediction for 1 of the 120 images to score (all), the first is"),
        (lambda t: pd.concat([t, t[3:4]]), "more than one row for 1 images, the first is"),
        (lambda t: t.drop(columns=["prob_Mass", "prob_Edema"]), "no column for Mass, Edema"),
        (lambda t: t.drop(columns="image"), "no column with the image's name"),
        (lambda t: t.assign(Mass=0.5), "more than one column for Mass: Mass, prob_Mass"),
        (lambda t: t.assign(**{"Image Index": t["image"]}), "more than one column for the image's name"),
        (lambda t: t[:0], "a header but no row"),
    ],
)
def test_what_is_missing_unknown_or_twice_is_named(
    change: Callable[[pd.DataFrame], pd.DataFrame],
    said: str,
    predictions: pd.DataFrame,
    score_sample: Callable[[pd.DataFrame], str],
) -> None:
    assert said in score_sample(change(predictions))


@pytest.mark.parametrize(("old", "new"), [("prob_Edema", "prob_Mass"), ("prob_Mass", "image")])
def test_a_column_that_is_there_twice_is_named(
    old: str, new: str, predictions: pd.DataFrame, score_sample: Callable[[pd.DataFrame], str]
) -> None:
    table = predictions.assign(note=predictions[old]).rename(columns={"note": new})
    assert list(table.columns).count(new) == 2
    assert f"more than one column for {new}: 2 have this name" in score_sample(table)


def test_a_row_that_is_wider_than_the_header_is_named(sample: Path, tmp_path: Path) -> None:
    lines = (sample / "predictions.csv").read_text().splitlines()
    image, _, rest = lines[5].partition(",")
    for name, wide in (("a.csv", f"{image},0.5,{rest}"), ("b.csv.gz", f"{lines[5]},0.5")):
        text = "\n".join([*lines[:5], wide, *lines[6:]])
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        line = refused(path, "--entries", sample)
        assert f"{name}, line 6 ({image}) has 16 cells, but the header has 15" in line


def test_empty_cells_at_the_end_of_a_row_change_nothing(sample: Path, tmp_path: Path) -> None:
    header, *lines = (sample / "predictions.csv").read_text().splitlines()
    (tmp_path / "p.csv").write_text("\n".join([header, *(f"{line},, " for line in lines)]))
    records = [score(path, "--entries", sample) for path in (sample / "predictions.csv", tmp_path / "p.csv")]
    assert records[0]["per_finding"] == records[1]["per_finding"]


@pytest.mark.parametrize("value", ["nan", "", "high", "inf", "1.0001", "-0.25", "None"])
def test_what_is_no_probability_is_named_by_image_and_finding(
    value: str, predictions: pd.DataFrame, score_sample: Callable[[pd.DataFrame], str]
) -> None:
    table = predictions.astype({"prob_Edema": object})
    table.loc[[4, 7], "prob_Edema"] = value
    line = score_sample(table)
    assert f"prob_Edema of {table['image'][4]} is {value or 'empty'} (2 such in this column)" in line


def test_a_missing_image_is_named_and_asked_for_by_a_list(
    sample: Path, predictions: pd.DataFrame, tmp_path: Path
) -> None:
    part = write(predictions[:60], tmp_path / "part.csv")
    line = refused(part, "--entries", sample)
    missing = sorted(predictions["image"][60:])[:3]
    assert f"no prediction for 60 of the 120 images to score (all), the first are {', '.join(missing)}" in line
    (tmp_path / "mine.txt").write_text("\n".join(predictions["image"][:60]))
    assert score(part, "--entries", sample, "--split", tmp_path / "mine.txt")["images"] == 60
    (tmp_path / "other.txt").write_text("x.png")
    assert "1 images on the list other are not in" in refused(
        part, "--entries", sample, "--split", tmp_path / "other.txt"
    )
    assert "does not say which images are in test; give a list" in refused(part, "--entries", sample, "--split", "test")


def test_val_of_scored_images_or_of_their_patients_is_refused(
    official: dict[str, pd.DataFrame], metadata: Path, tmp_path: Path
) -> None:
    test = official["test"]
    patient = test["patient"].value_counts().index[0]
    mine = test[test["patient"] == patient]
    others = test[(test["patient"] != patient)][:400]
    (tmp_path / "list.txt").write_text("\n".join([*others["image"], *mine["image"][:1]]))
    scored = write(predict(pd.concat([others, mine[:1]])), tmp_path / "scored.csv")
    options = ("--entries", metadata, "--split", tmp_path / "list.txt", "--val")
    line = refused(scored, *options, write(predict(mine[1:]), tmp_path / "val.csv"))
    assert f"val.csv: 1 patients are among the scored ones, too, the first is {patient}" in line
    line = refused(scored, *options, write(predict(mine), tmp_path / "val.csv"))
    assert f"val.csv: 1 images are among the scored ones, too, the first is {mine['image'].iloc[0]}" in line


def test_entries_that_are_none_are_refused(sample: Path, phantom_shards: ShardFolder, tmp_path: Path) -> None:
    given = sample / "predictions.csv"
    assert "cannot be read as CSV" in refused(given, "--entries", tmp_path / "absent.csv")
    assert "cannot be read as CSV" in refused(tmp_path / "absent.csv", "--entries", sample)
    assert "neither NIH's metadata (no column 'Image Index')" in refused(given, "--entries", given)
    text = (phantom_shards.path / "entries.csv").read_text()
    (tmp_path / "entries.csv").write_text(text)
    table = pd.read_csv(tmp_path / "entries.csv")
    test = write(predict(table[table["split"] == "test"]), tmp_path / "test.csv")
    assert score(test, "--entries", tmp_path / "entries.csv")["split"] == "test"
    write(table.assign(Mass=2), tmp_path / "entries.csv")
    assert "is damaged" in refused(test, "--entries", tmp_path / "entries.csv")
    (tmp_path / "manifest.json").write_bytes((phantom_shards.path / "manifest.json").read_bytes())
    assert "not the file that was packed" in refused(test, "--entries", tmp_path)
    (tmp_path / "binary.csv").write_bytes(gzip.compress(b"image"))
    assert "cannot be read as CSV" in refused(tmp_path / "binary.csv", "--entries", sample)


def test_one_patient_cannot_be_halved(sample: Path, predictions: pd.DataFrame, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(predictions["image"][0])
    line = refused(sample / "predictions.csv", "--entries", sample, "--split", tmp_path / "one.txt")
    assert "one patient cannot be halved" in line


@pytest.mark.parametrize("wrong", [["--threshold-rule", "best"], ["--split", "train"], ["--split", "absent.txt"]])
def test_an_unknown_rule_or_split_is_a_usage_error(wrong: list[str], sample: Path) -> None:
    assert run(sample / "predictions.csv", "--entries", sample, *wrong).exit_code == 2


def test_scoring_imports_neither_torch_nor_what_needs_it(sample: Path) -> None:
    code = (
        "import sys, eval.scores.calibration, eval.scores.subgroups; from eval.score import main\n"
        f"main([{str(sample / 'predictions.csv')!r}, '--entries', {str(sample)!r}], standalone_mode=False)\n"
        "print({'torch', 'trainer', 'loaders', 'models', 'matplotlib'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "set()"
