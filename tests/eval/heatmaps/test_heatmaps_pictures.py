"""Pictures of heat maps show image, map and boxes; the gallery chooses by its stated rule."""

import io
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from eval.heatmaps.drawing import SIDE, draw_heat_map
from eval.heatmaps.gallery import KINDS, HeatMap, gallery
from eval.predict.predictions import Predictions
from models import create_model
from shards.findings import FINDINGS
from shards.folder import ShardFolder

GRAY = np.tile(np.linspace(0, 255, 224, dtype=np.uint8), (224, 1))
COLD = np.zeros((224, 224), dtype=np.float32)


def draw(image: np.ndarray = GRAY, heat: np.ndarray = COLD, **options) -> np.ndarray:
    said = {"finding": "Mass", "probability": 0.9, "threshold": 0.5} | options
    with Image.open(io.BytesIO(draw_heat_map(image, heat, **said))) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture).astype(int)


def test_where_the_map_is_zero_the_gray_image_is_untouched() -> None:
    picture = draw()
    assert picture.shape[1] == SIDE
    assert picture.shape[0] > SIDE
    expected = np.asarray(Image.fromarray(GRAY).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    assert np.array_equal(picture[:SIDE], np.repeat(expected[:, :, None], 3, axis=2))


def test_hot_places_are_coloured_and_the_image_shows_through() -> None:
    heat = COLD.copy()
    heat[50:100, 50:100] = 1
    picture = draw(heat=heat)
    coloured = np.ptp(picture[:SIDE], axis=2) > 20
    assert coloured[120:180, 120:180].all()
    assert not coloured[:, 230:].any()
    assert picture[150, 180].sum() > picture[150, 120].sum()


def test_every_box_is_outlined_where_it_lies() -> None:
    picture = draw(boxes=[(0.25, 0.5, 0.25, 0.125), (0.9, 0.9, 0.1, 0.1)])
    green = (picture[:SIDE, :, 1] > 200) & (picture[:SIDE, :, 0] < 120)
    assert green[SIDE // 2, SIDE // 4 : SIDE // 2].all()
    assert green[-1, -40:].all()
    rows, columns = np.nonzero(green[:300])
    assert (rows.min(), columns.min()) == (SIDE // 2, SIDE // 4)
    assert (rows.max(), columns.max()) == (SIDE * 5 // 8 - 1, SIDE // 2 - 1)


def test_the_caption_says_finding_probability_and_threshold() -> None:
    captions = [
        draw(finding=finding, probability=probability, threshold=threshold, note=note)[SIDE:].tobytes()
        for finding, probability, threshold, note in (
            ("Mass", 0.9, 0.5, ""),
            ("Nodule", 0.9, 0.5, ""),
            ("Mass", 0.8, 0.5, ""),
            ("Mass", 0.9, float("nan"), ""),
            ("Mass", 0.9, 0.5, "00000001_000.png"),
        )
    ]
    assert len(set(captions)) == 5


def test_a_large_image_is_not_made_smaller() -> None:
    assert draw(np.zeros((512, 512), dtype=np.uint8), np.zeros((512, 512), dtype=np.float32)).shape[1] == 512


@pytest.fixture(scope="module")
def predictions(phantom_shards: ShardFolder) -> Predictions:
    entries = phantom_shards.entries[phantom_shards.entries["split"] == "test"]
    generator = np.random.default_rng(0)
    return Predictions(
        entries.index.to_numpy(dtype=np.int32),
        # Not the shards' own: so few images have few positives.
        generator.integers(0, 2, (len(entries), len(FINDINGS)), dtype=np.uint8),
        generator.random((len(entries), len(FINDINGS)), dtype=np.float32),
        entries["patient"].to_numpy(dtype=np.int64),
    )


THRESHOLDS = dict.fromkeys(FINDINGS, 0.5) | {"Hernia": float("nan")}


def show(
    shards: ShardFolder, predictions: Predictions, per_kind: int, thresholds=THRESHOLDS, **options
) -> tuple[HeatMap, ...]:
    torch.manual_seed(0)
    return gallery(create_model("custom_cnn", size=64), shards, predictions, thresholds, per_kind, **options)


def test_the_gallery_shows_as_many_of_each_kind_and_each_is_of_its_kind(
    phantom_shards: ShardFolder, predictions: Predictions
) -> None:
    shown = show(phantom_shards, predictions, 6, boxes=phantom_shards.boxes)
    row_of = {image: row for row, image in phantom_shards.entries["image"].items()}
    assert [each.kind for each in shown] == [kind for kind in KINDS for each in shown if each.kind == kind]
    for kind in KINDS:
        mine = [each for each in shown if each.kind == kind]
        assert len(mine) == len({(each.image, each.finding) for each in mine}) == 6
        assert len({each.finding for each in mine} - {"Hernia"}) == 6  # which has no threshold
    for each in shown:
        place = int(np.flatnonzero(predictions.rows == row_of[each.image])[0])
        column = FINDINGS.index(each.finding)
        truth, alarm = predictions.labels[place, column], each.probability >= each.threshold
        assert each.probability == predictions.probabilities[place, column]
        assert (bool(truth), alarm) == {
            "true positive": (True, True),
            "false positive": (False, True),
            "false negative": (True, False),
        }[each.kind]
        assert each.png.startswith(b"\x89PNG")


def test_the_gallery_is_drawn_by_lot_and_the_same_lot_draws_the_same(
    phantom_shards: ShardFolder, predictions: Predictions
) -> None:
    first, again, other = (show(phantom_shards, predictions, 2, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert [(each.image, each.finding) for each in first] != [(each.image, each.finding) for each in other]


def test_images_with_a_box_come_first(phantom_shards: ShardFolder, predictions: Predictions) -> None:
    alarms = predictions.probabilities[:, FINDINGS.index("Effusion")] >= 0.5
    right = predictions.rows[alarms & (predictions.labels[:, FINDINGS.index("Effusion")] == 1)]
    assert len(right) > 1
    one = pd.DataFrame(
        [(right[-1], "Effusion", 0.1, 0.1, 0.2, 0.2)], columns=["row", "finding", "x", "y", "width", "height"]
    )
    alone = dict.fromkeys(FINDINGS, float("nan")) | {"Effusion": 0.5}
    for seed in range(3):
        chosen, *_ = show(phantom_shards, predictions, 1, alone, boxes=one, seed=seed)
        assert (chosen.kind, chosen.finding) == ("true positive", "Effusion")
        assert chosen.image == phantom_shards.entries["image"][right[-1]]


def test_a_gallery_of_none_is_empty(phantom_shards: ShardFolder, predictions: Predictions) -> None:
    assert show(phantom_shards, predictions, 0) == ()


def test_the_records_of_heat_maps_are_imported_without_torch() -> None:
    modules = "eval.heatmaps.gallery, eval.heatmaps.localization"
    code = f"import sys, {modules}; print({{'torch', 'matplotlib.pyplot'}} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
