"""Localization counts hits and overlaps as it says, on maps made by hand and on a shard folder."""

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from eval.heatmaps.localization import (
    CUT,
    OVERLAPS,
    Localization,
    PointingGame,
    localize,
    pointing_game,
    region_box,
    summarize,
)
from eval.predict.images import ImageReader
from models import Classifier, create_model
from scripts.make_shards import main as make_shards
from shards.boxes import by_row, read_box_list
from shards.errors import BadData
from shards.findings import FINDINGS
from shards.folder import ShardFolder, open_shards
from shards.phantoms import make_phantoms
from trainer.__main__ import main as trainer
from trainer.model_file import load_model

HERE = np.array([[0.25, 0.5, 0.25, 0.25]])  # columns 2 and 3, rows 4 and 5 of 8


def heat_at(*pixels: tuple[int, int], size: int = 8) -> np.ndarray:
    heat = np.zeros((size, size), dtype=np.float32)
    for number, pixel in enumerate(pixels):
        heat[pixel] = 1 - 0.01 * number
    return heat


def test_the_hottest_pixel_in_the_box_is_a_hit_and_one_beside_it_is_none() -> None:
    for row in range(8):
        for column in range(8):
            inside = row in (4, 5) and column in (2, 3)
            assert pointing_game(heat_at((row, column)), HERE).hit == inside


def test_any_of_several_boxes_is_good_and_shared_area_counts_once() -> None:
    boxes = np.array([[0, 0, 0.5, 0.5], [0.25, 0, 0.5, 0.5]])
    assert pointing_game(heat_at((0, 5)), boxes).hit
    assert not pointing_game(heat_at((5, 5)), boxes).hit
    assert pointing_game(heat_at((0, 0)), boxes).chance == 0.375


def test_chance_is_the_hit_rate_of_every_pixel_in_turn() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        x, y = generator.uniform(0, 0.7, 2)
        boxes = np.array([[x, y, *generator.uniform(0.05, 0.3, 2)]])
        every = [pointing_game(heat_at((row, column)), boxes).hit for row in range(8) for column in range(8)]
        assert pointing_game(heat_at((0, 0)), boxes).chance == np.mean(every)


def test_a_region_that_is_the_box_overlaps_wholly() -> None:
    found = pointing_game(heat_at((4, 2), (4, 3), (5, 2), (5, 3)), HERE)
    assert (found.iou, found.iobb) == (1, 1)


def test_a_region_within_the_box_has_all_of_itself_in_it() -> None:
    found = pointing_game(heat_at((4, 2)), HERE)
    assert (found.iou, found.iobb) == (0.25, 1)


def test_only_the_region_of_the_hottest_pixel_counts_and_only_what_is_hot_enough() -> None:
    heat = heat_at((1, 1), (1, 2), (6, 6))
    heat[2, 1], heat[1, 3], heat[0, 1] = CUT + 0.01, CUT - 0.01, 0.0
    assert region_box(heat).tolist() == [1 / 8, 1 / 8, 2 / 8, 2 / 8]
    heat[2, 2] = 0.0
    heat[3, 2] = 0.9  # touches at a corner of nothing
    assert region_box(heat).tolist() == [1 / 8, 1 / 8, 2 / 8, 2 / 8]


def test_a_map_that_is_zero_everywhere_points_nowhere() -> None:
    found = pointing_game(np.zeros((8, 8), dtype=np.float32), np.array([[0, 0, 1, 1.0]]))
    assert found == PointingGame(False, 1.0, 0.0, 0.0)


def pointing(hit: bool, iou: float = 0.0) -> PointingGame:
    return PointingGame(hit, 0.1, iou, 2 * iou)


def test_macro_is_the_mean_of_findings_and_micro_pools_their_images() -> None:
    found = [("Mass", row, 1, pointing(row < 3, 0.3)) for row in range(4)]
    found += [("Nodule", 9, 2, pointing(False))]
    table = summarize(found, np.array([1, 1, 2, 3, 1]), FINDINGS).table
    assert table.index.tolist() == ["Mass", "Nodule", "macro", "micro"]
    assert table["hit_rate"].tolist() == [0.75, 0, 0.375, 0.6]
    assert table["images"].tolist() == [4, 1, 5, 5]
    assert table["boxes"].tolist() == [4, 2, 6, 6]
    assert table["ratio"].tolist() == pytest.approx([7.5, 0, 3.75, 6])
    assert [table.at["Mass", f"iou_{overlap}"] for overlap in OVERLAPS] == [1, 1, 0, 0]
    assert [table.at["micro", f"iobb_{overlap}"] for overlap in OVERLAPS] == [0.8, 0.8, 0.8, 0]


def test_intervals_are_of_patients_and_the_same_for_the_same_seed() -> None:
    one_patient = [("Mass", row, 1, pointing(row % 2 == 0)) for row in range(40)]
    table = summarize(one_patient, np.zeros(40, dtype=np.int64), FINDINGS).table
    assert table.loc["Mass", ["hit_rate_low", "hit_rate_high"]].tolist() == [0.5, 0.5]
    first, second = (summarize(one_patient, np.arange(40), FINDINGS, seed=3).table for _ in range(2))
    pd.testing.assert_frame_equal(first, second)
    low, high = first.loc["Mass", ["hit_rate_low", "hit_rate_high"]]
    assert low < 0.5 < high
    assert high - low == pytest.approx(4 * 0.5 / 40**0.5, abs=0.08)  # as the normal approximation has it
    without = summarize(one_patient, np.arange(40), FINDINGS, resamples=0).table
    assert without[["hit_rate_low", "hit_rate_high"]].isna().all(axis=None)


def test_the_findings_without_a_box_are_named() -> None:
    found = summarize([("Mass", 0, 1, pointing(True))], np.array([1]), FINDINGS, resamples=0)
    (warning,) = found.warnings
    assert "Atelectasis, Cardiomegaly" in warning
    assert "Mass" not in warning
    assert found.to_text().endswith(warning)
    assert found.to_csv().startswith("finding,images,boxes,hit_rate,hit_rate_low,hit_rate_high,chance,ratio,iou_0.1")


@pytest.fixture(scope="module")
def model() -> Classifier:
    torch.manual_seed(0)
    return create_model("custom_cnn", size=64).eval()


@pytest.fixture(scope="module")
def found(model: Classifier, phantom_shards: ShardFolder) -> Localization:
    assert phantom_shards.boxes is not None
    return localize(model, phantom_shards, "test", phantom_shards.boxes, resamples=20)


def test_every_image_and_box_of_the_split_is_counted_once(found: Localization, phantom_shards: ShardFolder) -> None:
    boxes = phantom_shards.boxes
    assert found.table.index.tolist() == [*FINDINGS, "macro", "micro"]
    for finding in FINDINGS:
        mine = boxes[boxes["finding"] == finding]
        assert found.table.at[finding, "images"] == mine["row"].nunique()
        assert found.table.at[finding, "boxes"] == len(mine)
        positives = phantom_shards.manifest.splits["test"].positives[finding]
        assert mine["row"].nunique() == positives


def test_chance_is_about_the_area_of_the_boxes(found: Localization, phantom_shards: ShardFolder) -> None:
    boxes = phantom_shards.boxes
    area = (boxes["width"] * boxes["height"]).groupby([boxes["finding"], boxes["row"]]).sum()
    for finding in ("Mass", "Atelectasis", "Edema"):
        assert found.table.at[finding, "chance"] == pytest.approx(area[finding].mean(), rel=0.2)


def test_the_batch_size_changes_nothing_and_rows_may_be_named(
    model: Classifier, found: Localization, phantom_shards: ShardFolder
) -> None:
    rows = phantom_shards.rows("test")
    named = localize(model, phantom_shards, rows, phantom_shards.boxes, batch_size=3, resamples=20)
    pd.testing.assert_frame_equal(named.table, found.table)
    some = localize(model, phantom_shards, rows[:4], phantom_shards.boxes, resamples=0)
    assert some.table.at["micro", "images"] < found.table.at["micro", "images"]


def test_without_a_box_in_the_split_there_is_nothing_to_localize(
    model: Classifier, phantom_shards: ShardFolder
) -> None:
    with pytest.raises(BadData, match="no box is of an image of the split val"):
        localize(model, phantom_shards, "val", phantom_shards.boxes)


def test_an_image_that_is_not_the_packed_one_is_named(phantom_shards: ShardFolder, tmp_path) -> None:
    damaged = tmp_path / "shards"
    damaged.mkdir()
    for path in phantom_shards.path.iterdir():
        content = path.read_bytes()
        (damaged / path.name).write_bytes(content.replace(b"\xff\xd8\xff", b"\xff\xd9\xff"))
    with pytest.raises(BadData, match=r"test-00000\.tar, sample \d{8} does not hold the image that was packed"):
        ImageReader(open_shards(damaged)).read(phantom_shards.rows("test")[:1])


def test_real_boxes_lie_on_real_images(nih_data, tmp_path) -> None:
    done = CliRunner().invoke(make_shards, [str(nih_data / "nih_sample"), str(tmp_path), "--size", "64", "--jobs", "1"])
    assert done.exit_code == 0, done.output
    shards = open_shards(tmp_path)
    listed = by_row(read_box_list(nih_data / "nih_sample" / "BBox_List_2017.csv"), shards.entries["image"], FINDINGS)
    assert shards.boxes is not None
    pd.testing.assert_frame_equal(shards.boxes, listed, atol=1e-6, rtol=0)
    torch.manual_seed(0)
    found = localize(create_model("custom_cnn", size=64), shards, "test", shards.boxes, resamples=0)
    assert found.table.at["micro", "boxes"] == len(listed)
    assert len(found.warnings) == 1


@pytest.mark.full
def test_the_demo_points_at_small_signs_three_times_as_often_as_chance(tmp_path) -> None:
    # The demo of the Makefile, then its maps on other phantoms, where each finding has 36 images or more.
    make_phantoms(tmp_path / "tree", jobs=2)
    make_phantoms(tmp_path / "others", images=2600, seed=9, jobs=2)
    for tree in ("tree", "others"):
        packed = CliRunner().invoke(make_shards, [str(tmp_path / tree), str(tmp_path / f"{tree}-shards")])
        assert packed.exit_code == 0, packed.output
    options = "--arch custom_cnn --name demo --batch-size 32 --lr 1e-3 --epochs 18 --patience 3"
    where = ["--shards", str(tmp_path / "tree-shards"), "--runs", str(tmp_path / "runs")]
    trained = CliRunner().invoke(trainer, [*options.split(), *where])
    assert trained.exit_code == 0, trained.output
    demo, _ = load_model(tmp_path / "runs" / "demo" / "model.safetensors")
    own, others = (open_shards(tmp_path / f"{tree}-shards") for tree in ("tree", "others"))
    table = localize(demo, others, "test", others.boxes).table.drop(index=["macro", "micro"])
    small = table[table["chance"] < 0.05]
    assert len(small) == 8
    assert (small["ratio"] >= 3).all(), small
    table = localize(demo, own, "test", own.boxes).table.loc[small.index]
    assert np.average(table["hit_rate"], weights=table["images"]) >= 3 * table["chance"].max()
