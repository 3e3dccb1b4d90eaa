"""A phantom tree has the form of the NIH download, and its truth is where it says."""

import csv
import gzip
import io
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from shards.errors import BadData, ResourceMissing
from shards.findings import FINDINGS, to_multi_hot
from shards.phantoms.anatomy import Plane, build_patient, pose
from shards.phantoms.cohort import draw_cohort, finding_sets
from shards.phantoms.signs import draw_sign, reshape
from shards.phantoms.tree import Order, Phantoms, draw_phantom, make_phantoms

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Phantoms]:
    out = tmp_path_factory.mktemp("phantoms")
    return out, make_phantoms(out, images=110, size=96)


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def labels_of(entries: pd.DataFrame) -> npt.NDArray[np.uint8]:
    return np.stack([to_multi_hot(text) for text in entries["findings"]])


def rows(path: Path) -> list[list[str]]:
    return list(csv.reader(io.StringIO(path.read_text())))


def test_the_headers_are_those_of_nih(tree: tuple[Path, Phantoms], nih_data: Path) -> None:
    out, _ = tree
    for name in ("Data_Entry_2017_v2020.csv", "BBox_List_2017.csv"):
        with gzip.open(nih_data / f"nih_metadata/{name}.gz", "rt", newline="") as real:
            assert real.readline() == (out / name).read_text().splitlines(keepends=True)[0]


def test_a_metadata_row_names_its_file_patient_and_follow_up(tree: tuple[Path, Phantoms]) -> None:
    out, _ = tree
    body = rows(out / "Data_Entry_2017_v2020.csv")[1:]
    assert len(body) == 110
    assert [row[0] for row in body] == sorted(row[0] for row in body)
    on_disk = {path.name for path in out.glob("images_0*/images/*.png")}
    assert on_disk == {row[0] for row in body}
    for image, findings, follow_up, patient, age, sex, view, width, height, x, y in body:
        assert image == f"{int(patient):08d}_{int(follow_up):03d}.png"
        to_multi_hot(findings)
        assert 0 < int(age) < 100 and sex in "MF" and view in ("PA", "AP")
        assert 2000 <= int(width) <= 3100 and 2000 <= int(height) <= 3100 and x == y


def test_both_lists_cover_all_images_and_share_no_patient(tree: tuple[Path, Phantoms]) -> None:
    out, _ = tree
    train_val, test = ((out / name).read_text() for name in ("train_val_list.txt", "test_list.txt"))
    assert not train_val.endswith("\n") and not test.endswith("\n")
    images = [row[0] for row in rows(out / "Data_Entry_2017_v2020.csv")[1:]]
    assert sorted(train_val.split("\n") + test.split("\n")) == images
    assert not {name[:8] for name in train_val.split("\n")} & {name[:8] for name in test.split("\n")}
    assert len(test.split("\n")) / len(images) == pytest.approx(25_596 / 112_120, abs=0.01)


def test_images_are_gray_but_for_one_in_a_hundred(tree: tuple[Path, Phantoms]) -> None:
    out, _ = tree
    modes = []
    for path in out.glob("images_0*/images/*.png"):
        with Image.open(path) as image:
            modes.append(image.mode)
            assert image.size == (96, 96)
            if image.mode == "RGBA":
                red, green, blue, alpha = np.asarray(image).transpose(2, 0, 1)
                assert (red == green).all() and (red == blue).all() and (alpha == 255).all()
    assert modes.count("RGBA") == 2 and modes.count("L") == 108


def test_every_sign_in_a_test_image_has_its_box(tree: tuple[Path, Phantoms]) -> None:
    out, made = tree
    body = rows(out / "BBox_List_2017.csv")[1:]
    assert len(body) == len(made.boxes)
    boxed = {(row[0], row[1].replace("Infiltrate", "Infiltration")) for row in body}
    test = made.entries[made.entries["split"] == "test"]
    drawn = {
        (image, finding)
        for image, findings in zip(test["image"], test["findings"], strict=True)
        for finding in findings.split("|")
        if finding != "No Finding"
    }
    assert boxed == drawn
    for _, _, *box in body:
        x, y, width, height = map(float, box)
        assert x >= 0 and y >= 0 and width > 20 and height > 20
        assert x + width <= 1024 and y + height <= 1024


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("images", [60, 1000, 1200])
def test_both_lists_have_enough_positives_of_every_finding(images: int, seed: int) -> None:
    entries = draw_cohort(images, seed)
    test = (entries["split"] == "test").to_numpy()
    labels = labels_of(entries)
    assert (labels.sum(axis=0) >= 0.04 * images).all()
    assert (labels[test].sum(axis=0) >= max(1, 0.04 * test.sum())).all()
    if images >= 1000:
        np.testing.assert_allclose(labels[test].mean(axis=0), labels[~test].mean(axis=0), atol=0.02)


def test_findings_come_together_as_in_nihs_table(nih_data: Path) -> None:
    table = nih_data / "nih_metadata/Data_Entry_2017_v2020.csv.gz"
    text = pd.read_csv(table, header=None, skiprows=1, usecols=[1])[1]
    real = np.stack([to_multi_hot(findings) for findings in text]).astype(float)
    sets, share = finding_sets()
    common = [FINDINGS.index(name) for name in ("Atelectasis", "Effusion", "Infiltration")]
    np.testing.assert_allclose((share @ sets)[common], real.mean(axis=0)[common], rtol=0.15)
    # Which findings go with which: the order of the odds of every pair agrees.
    pairs = list(itertools.combinations(range(14), 2))
    ours, theirs = (
        np.array([both[i, j] / (both[i, i] * both[j, j]) for i, j in pairs])
        for both in ((sets.T * share) @ sets, real.T @ real)
    )
    seen = ours > 0
    rank = [pd.Series(odds[seen]).rank().to_numpy() for odds in (ours, theirs)]
    assert pd.Series(rank[0]).corr(pd.Series(rank[1])) > 0.6


def test_patients_have_follow_ups_with_a_heavy_tail() -> None:
    visits = draw_cohort(4000, 0).groupby("patient").size()
    assert (visits == 1).mean() == pytest.approx(0.57, abs=0.05)
    assert visits.mean() == pytest.approx(3.6, abs=0.6)
    assert visits.max() > 40


def test_the_bytes_do_not_depend_on_jobs_and_a_second_run_repeats_them(tmp_path: Path) -> None:
    make_phantoms(tmp_path / "one", images=24, size=64, seed=5)
    make_phantoms(tmp_path / "two", images=24, size=64, seed=5, jobs=2)
    first = files(tmp_path / "one")
    assert files(tmp_path / "two") == first
    make_phantoms(tmp_path / "one", images=24, size=64, seed=5)
    assert files(tmp_path / "one") == first
    make_phantoms(tmp_path / "one", images=20, size=64, seed=6)
    make_phantoms(tmp_path / "fresh", images=20, size=64, seed=6)
    assert files(tmp_path / "one") == files(tmp_path / "fresh") != first


def planes(findings: list[str]) -> Iterator[tuple[Plane, np.random.Generator]]:
    for seed in range(12):
        rng = np.random.default_rng(seed)
        chest = pose(build_patient("MF"[seed % 2], rng), ("PA", "AP")[seed % 3 == 0], rng)
        yield Plane(reshape(chest, findings, rng), 128), rng


@pytest.mark.parametrize("finding", [name for name in FINDINGS if name != "Cardiomegaly"])
def test_a_sign_lies_in_its_box(finding: str) -> None:
    for plane, rng in planes([finding]):
        sign = draw_sign(finding, plane, rng)
        inside = np.zeros((128, 128), dtype=bool)
        for x, y, width, height in sign.boxes:
            assert min(x, y) >= 0 and x + width <= 1 and y + height <= 1
            inside |= (np.abs(plane.x - x - width / 2) < width / 2) & (np.abs(plane.y - y - height / 2) < height / 2)
        change = np.abs(sign.layer)
        assert change.max() > 0.02
        assert change[inside].sum() > 0.75 * change.sum()
        assert inside.mean() < 0.35


def test_cardiomegaly_is_a_heart_wider_than_half_the_chest() -> None:
    for findings, wide in ((["Cardiomegaly"], True), ([], False)):
        for plane, rng in planes(findings):
            if not plane.chest.portable:
                assert (plane.chest.heart > 0.5) == wide
            if wide:
                ((x, _, width, _),) = draw_sign("Cardiomegaly", plane, rng).boxes
                beats = np.flatnonzero(plane.heart.max(axis=0) > 0.5) / 128
                assert x <= beats.min() + 0.03 and beats.max() - 0.03 <= x + width


def test_ap_images_show_larger_hearts_in_smaller_lungs() -> None:
    for seed in range(8):
        patient = build_patient("M", np.random.default_rng(seed))
        pa, ap = (Plane(pose(patient, view, np.random.default_rng(seed)), 128) for view in ("PA", "AP"))
        assert ap.heart.sum() > pa.heart.sum() and ap.lungs.sum() < pa.lungs.sum()


def drawn(row: int, patient: int, findings: list[str]) -> npt.NDArray[np.floating]:
    image, _ = draw_phantom(Order(row, Path(), patient, "MF"[patient % 2], "PA", findings), 64, 0)
    return image


def test_follow_ups_look_more_alike_than_patients_do() -> None:
    visits = np.stack([[drawn(2 * p + k, p, []).ravel() for k in (0, 1)] for p in range(12)])
    alike = np.corrcoef(visits.reshape(24, -1))
    same = alike[np.arange(0, 24, 2), np.arange(1, 24, 2)]
    assert same.mean() > alike[np.triu_indices(24, 2)].mean()


def test_no_finding_shows_in_the_mean_brightness() -> None:
    plain = [drawn(row, row, []).mean() for row in range(60)]
    for number, finding in enumerate(FINDINGS):
        ill = [drawn(row, row, [finding]).mean() for row in range(1000 + 60 * number, 1060 + 60 * number)]
        score = roc_auc_score([0] * 60 + [1] * 60, plain + ill)
        assert 0.25 < score < 0.75, finding


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(BadData, match="not a phantom tree"):
        make_phantoms(tmp_path, images=20, size=64)
    assert files(tmp_path) == {"thesis.txt": b"mine"}
    with pytest.raises(BadData, match="is a file"):
        make_phantoms(tmp_path / "thesis.txt", images=20, size=64)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceMissing, match="cannot write"):
        make_phantoms(tmp_path / "file/tree", images=20, size=64)


@pytest.mark.parametrize("wrong", [{"images": 19}, {"size": 63}, {"seed": -1}, {"jobs": 0}])
def test_numbers_out_of_range_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected images"):
        make_phantoms(tmp_path, **wrong)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["tree", "--images", "20", "--size", "64", "--jobs", "1"], 0, "20 images"),
        (["tree", "--size", "63"], 2, "--size"),
        ([".", "--images", "20", "--size", "64"], 3, "not a phantom tree"),
    ],
)
def test_the_command_says_what_it_did_in_one_line(tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    (tmp_path / "other.txt").touch()
    command = [sys.executable, str(ROOT / "scripts/make_phantoms.py"), *arguments]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == code
    assert said in ran.stdout + ran.stderr and "Traceback" not in ran.stderr
