"""Predictions: their CSV, the key that lets them be reused, and the mirror."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from eval.predict.inference import predict
from eval.predict.predictions import Predictions, find_stored
from eval.result_files import CacheKey, write_csv
from loaders import LoaderSpec, streaming_loader
from models import create_model
from shards.errors import BadData
from shards.findings import FINDINGS
from shards.folder import ShardFolder

KEY = CacheKey("a", "b", {"split": "test", "tta": False})
CPU = torch.device("cpu")


@pytest.fixture
def predictions(phantom_shards: ShardFolder) -> Predictions:
    """Of the test split, with the probabilities that are hardest to write down."""
    rows = phantom_shards.rows("test")
    entries = phantom_shards.entries.loc[rows]
    rng = np.random.default_rng(0)
    probabilities = rng.random((len(rows), len(FINDINGS)), dtype=np.float32)
    probabilities[0, :6] = 0, 1, 1e-45, np.nextafter(np.float32(1), np.float32(0)), 0.1, 1e-7
    return Predictions(
        rows,
        entries[list(FINDINGS)].to_numpy(dtype=np.uint8),
        probabilities,
        entries["patient"].to_numpy(dtype=np.int64),
    )


def expect_equal(one: Predictions, other: Predictions) -> None:
    for field in dataclasses.fields(Predictions):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)


def test_a_csv_gives_the_predictions_back_to_the_last_bit(
    predictions: Predictions, phantom_shards: ShardFolder, tmp_path: Path
) -> None:
    (tmp_path / "p.csv").write_text(predictions.to_csv(phantom_shards))
    read = Predictions.from_csv(tmp_path / "p.csv", phantom_shards)
    expect_equal(read, predictions)
    (tmp_path / "again.csv").write_text(read.to_csv(phantom_shards))
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "p.csv").read_bytes()


def test_a_csv_of_other_images_or_without_a_column_is_refused(
    predictions: Predictions, phantom_shards: ShardFolder, tmp_path: Path
) -> None:
    path = tmp_path / "p.csv"
    path.write_text(predictions.to_csv(phantom_shards))
    table = pd.read_csv(path)
    table.assign(image="00000000_000.png").to_csv(path, index=False)
    with pytest.raises(BadData, match=r"row \d+ is 00000000_000\.png, in the shards"):
        Predictions.from_csv(path, phantom_shards)
    table.drop(columns="prob_Hernia").to_csv(path, index=False)
    with pytest.raises(BadData, match="prob_Hernia"):
        Predictions.from_csv(path, phantom_shards)
    table.assign(row=10**6).to_csv(path, index=False)
    with pytest.raises(BadData, match="damaged"):
        Predictions.from_csv(path, phantom_shards)


def test_stored_predictions_are_found_by_their_key_alone(
    predictions: Predictions, phantom_shards: ShardFolder, tmp_path: Path
) -> None:
    write_csv(tmp_path / "anywhere" / "val_predictions.csv", predictions.to_csv(phantom_shards), KEY)
    found = find_stored(tmp_path, KEY, phantom_shards)
    assert found is not None
    path, stored = found
    assert path == tmp_path / "anywhere" / "val_predictions.csv"
    expect_equal(stored, predictions)
    others = [{"weights_sha256": "c"}, {"manifest_sha256": "c"}]
    others += [{"options": {**KEY.options, **option}} for option in ({"split": "val"}, {"tta": True})]
    for changes in others:
        other = dataclasses.replace(KEY, **changes)
        assert find_stored(tmp_path, other, phantom_shards) is None


def test_changed_predictions_are_not_taken_for_those_that_were_stored(
    predictions: Predictions, phantom_shards: ShardFolder, tmp_path: Path
) -> None:
    path = tmp_path / "test" / "predictions.csv"
    write_csv(path, predictions.to_csv(phantom_shards), KEY)
    whole = path.read_text()
    path.write_text(whole.replace("0.1", "0.2", 1))
    assert find_stored(tmp_path, KEY, phantom_shards) is None
    path.write_text(whole)
    assert find_stored(tmp_path, KEY, phantom_shards) is not None
    note = path.with_suffix(".json")
    for text in ("", "{", "[]", json.dumps({**json.loads(note.read_text()), "csv_sha256": None})):
        note.write_text(text)
        assert find_stored(tmp_path, KEY, phantom_shards) is None


def test_a_selection_keeps_row_order_and_passes_over_what_is_not_there(predictions: Predictions) -> None:
    wanted = predictions.rows[[5, 2]]
    chosen = predictions.select(np.append(wanted, np.int32(10**6)))
    assert chosen.rows.tolist() == sorted(wanted.tolist())
    assert np.array_equal(chosen.probabilities, predictions.probabilities[[2, 5]])


def test_with_the_mirror_a_probability_is_the_mean_of_both(phantom_shards: ShardFolder) -> None:
    torch.manual_seed(0)
    model = create_model("custom_cnn", size=64).eval()
    plain = predict(model, phantom_shards, "test", CPU, 7)
    averaged = predict(model, phantom_shards, "test", CPU, 7, tta=True)
    spec = LoaderSpec(phantom_shards, "test", 7, CPU, training=False)
    with streaming_loader(spec) as loader, torch.inference_mode():
        mirrored = torch.cat([model(batch.images.flip(-1)).sigmoid() for batch in loader]).numpy()
    assert np.array_equal(averaged.rows, plain.rows)
    assert not np.allclose(mirrored, plain.probabilities, atol=1e-4)
    assert np.allclose(averaged.probabilities, (plain.probabilities + mirrored) / 2, atol=1e-6)


def test_predictions_know_the_patient_of_every_image(phantom_shards: ShardFolder) -> None:
    predictions = predict(create_model("custom_cnn", size=64), phantom_shards, "val", CPU, 16)
    patients = phantom_shards.entries["patient"].loc[predictions.rows]
    assert np.array_equal(predictions.patients, patients)
    assert predictions.patients.dtype == np.int64
