"""Several runs' predictions as one."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from eval.ensemble import average
from eval.predict.predictions import Predictions
from shards.errors import BadData
from shards.findings import FINDINGS
from shards.folder import ShardFolder, open_shards
from shards.packing import pack
from shards.packing.planning import SplitRecipe, make_plan
from shards.pixels import PixelRecipe


def of_test(shards: ShardFolder, seed: int) -> Predictions:
    rows = shards.rows("test")
    entries = shards.entries.loc[rows]
    return Predictions(
        rows,
        entries[list(FINDINGS)].to_numpy(dtype=np.uint8),
        np.random.default_rng(seed).random((len(rows), len(FINDINGS)), dtype=np.float32),
        entries["patient"].to_numpy(dtype=np.int64),
    )


def test_the_average_is_the_mean_of_the_probabilities(phantom_shards: ShardFolder) -> None:
    members = [of_test(phantom_shards, seed) for seed in range(3)]
    mean = average([(str(seed), phantom_shards, each) for seed, each in enumerate(members)], "test")
    exact = np.mean([each.probabilities.astype(np.float64) for each in members], axis=0)
    assert np.array_equal(mean.probabilities, exact.astype(np.float32))
    assert np.array_equal(mean.labels, members[0].labels)
    alone = average([("a", phantom_shards, members[0])], "test")
    assert np.array_equal(alone.probabilities, members[0].probabilities)


def test_runs_of_other_image_sizes_can_be_averaged(
    phantom_shards: ShardFolder, phantom_tree: Path, tmp_path: Path
) -> None:
    pack(make_plan(phantom_tree, SplitRecipe(val_fraction=0.2)), tmp_path / "small", PixelRecipe(size=32))
    small = open_shards(tmp_path / "small")
    assert small.digest != phantom_shards.digest
    one, other = of_test(phantom_shards, 0), of_test(small, 1)
    mean = average([("a", phantom_shards, one), ("b", small, other)], "test")
    assert np.allclose(mean.probabilities, (one.probabilities + other.probabilities) / 2)


def test_other_images_or_labels_are_refused_by_name(phantom_shards: ShardFolder) -> None:
    whole = of_test(phantom_shards, 0)
    images = phantom_shards.entries["image"].loc[whole.rows].tolist()

    def expect_refusal(other: Predictions, message: str) -> None:
        with pytest.raises(BadData, match=message):
            average([("one", phantom_shards, whole), ("two", phantom_shards, other)], "test")

    expect_refusal(whole.select(whole.rows[1:]), f"{images[0]}, of one")
    labels = whole.labels.copy()
    labels[3, 5] ^= 1
    expect_refusal(dataclasses.replace(whole, labels=labels), f"{images[3]} differ")
    backwards = Predictions(*(getattr(whole, field.name)[::-1] for field in dataclasses.fields(whole)))
    expect_refusal(backwards, "another order")
