"""Caching that is interrupted goes on with what was computed, and ends at the bits of one that was not."""

import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from benchmarks.harness import trainer_log
from loaders import LoaderSpec
from shards.folder import ShardFolder
from tests.trainer.running import ROOT, TIMEOUT, command, losses, terminate, train
from trainer.feature_cache import chunks
from trainer.feature_cache.chunks import FeatureChunks, digest_of_frozen
from trainer.feature_cache.features import cache_features
from trainer.optim.precision import Precision

FROZEN = {"freeze": "backbone", "batch_size": 10, "weights": "none", "precision": "fp32", "cache": "on", "epochs": 1}
CPU = torch.device("cpu")


@pytest.fixture
def save_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every batch count as a minute."""
    monkeypatch.setattr(chunks, "SAVE_EVERY", 0.0)


@pytest.fixture(scope="module")
def undisturbed(phantom_shards: ShardFolder, runs: Path) -> Path:
    done = train(phantom_shards, runs, "undisturbed", **FROZEN)
    assert done.exit_code == 0, done.stderr
    assert "earlier start" not in done.stdout
    assert not (runs / "undisturbed" / "features").exists()
    return runs / "undisturbed"


def assert_same_end(run: Path, other: Path) -> None:
    assert losses(run) == losses(other)
    assert (run / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert not (run / "features").exists()


def counted(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[int]:
    """Return a list that gets the images of every batch the frozen part runs; send SIGTERM after so many."""
    sizes: list[int] = []
    feature_extractor = models.feature_extractor

    def counting(*arguments: Any) -> Any:
        run = feature_extractor(*arguments)

        def one(images: Tensor) -> Tensor:
            if len(images) > 1:  # one black image is how the shape is found
                sizes.append(len(images))
                if len(sizes) == stop_after:
                    terminate()
            return run(images)

        return one

    monkeypatch.setattr("trainer.feature_cache.features.feature_extractor", counting)
    return sizes


@pytest.mark.usefixtures("save_always")
def test_caching_stopped_by_a_signal_computes_only_the_rest_afterwards(
    undisturbed: Path, phantom_shards: ShardFolder, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs / "stopped"
    with monkeypatch.context() as patch:
        counted(patch, stop_after=7)  # before the mirrors of the fourth batch are done
        stopped = train(phantom_shards, runs, run.name, **FROZEN)
    assert stopped.exit_code == 143
    assert "resumes with the saved features" in stopped.stdout
    assert not (run / "config.json").exists()
    with monkeypatch.context() as patch:
        computed = counted(patch)
        done = train(phantom_shards, runs, run.name, **FROZEN)
    assert done.exit_code == 0, done.stderr
    assert "30 of them were computed by an earlier start" in done.stdout
    splits = phantom_shards.manifest.splits
    assert sum(computed) == 2 * (splits["train"].images - 30) + splits["val"].images
    assert_same_end(run, undisturbed)


PROGRAM = """
import os, sys, trainer.feature_cache.chunks
from trainer.__main__ import main
trainer.feature_cache.chunks.SAVE_EVERY = 0.0
main(sys.argv[1:])
"""


def test_caching_that_was_killed_goes_on_with_what_was_saved(
    undisturbed: Path, phantom_shards: ShardFolder, runs: Path
) -> None:
    run = runs / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *command(phantom_shards, runs, "killed", **FROZEN)[3:]],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + TIMEOUT
    while not (run / "features" / "train-0-of-1-00000010.pt").is_file():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    done = train(phantom_shards, runs, "killed", **FROZEN)
    assert done.exit_code == 0, done.stderr
    assert "of them were computed by an earlier start" in done.stdout
    assert_same_end(run, undisturbed)


@pytest.mark.usefixtures("save_always")
def test_a_run_stopped_after_caching_computes_nothing_again(
    undisturbed: Path, phantom_shards: ShardFolder, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("trainer.loop.validate", lambda *_, **__: terminate())
        assert train(phantom_shards, runs, "later", **FROZEN).exit_code == 143
    with monkeypatch.context() as patch:
        computed = counted(patch)
        done = train(phantom_shards, runs, "later", **FROZEN)
    assert done.exit_code == 0, done.stderr
    assert computed == []
    assert_same_end(runs / "later", undisturbed)


def test_caching_that_takes_less_than_a_minute_is_not_saved(
    phantom_shards: ShardFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted(monkeypatch, stop_after=7)
    stopped = train(phantom_shards, tmp_path, "short", **FROZEN)
    assert stopped.exit_code == 143
    assert "nothing to save" in stopped.stdout
    assert not (tmp_path / "short").exists()


def cache(folder: ShardFolder, save_in: Path, **changes: Any) -> list[str]:
    """Return what caching both splits says, in batches of ten with the options given."""
    told = {"seed": 0, "batch_size": 10, "flip": "random", "loader": "auto", **changes}
    torch.manual_seed(told["seed"])
    model = models.create_model("custom_cnn", size=64)
    models.freeze(model, "backbone")
    specs = (
        LoaderSpec(folder, "train", told["batch_size"], CPU, training=True, flip=told["flip"]),
        LoaderSpec(folder, "val", told["batch_size"], CPU, training=False),
    )
    precision = Precision("fp32", CPU)
    with trainer_log() as lines:
        cache_features(model, "backbone", *specs, precision, loader=told["loader"], save_in=save_in / "features")
    return lines


@pytest.fixture(scope="module")
def saved(phantom_shards: ShardFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "SAVE_EVERY", 0.0)
        cache(phantom_shards, folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "are_taken"),
    [
        ({}, True),
        ({"seed": 1}, False),
        ({"batch_size": 12}, False),
        ({"flip": "none"}, False),
        ({"loader": "resident"}, False),
    ],
)
def test_only_features_of_the_same_weights_and_options_are_taken_up(
    saved: Path, phantom_shards: ShardFolder, tmp_path: Path, changes: dict[str, Any], are_taken: bool
) -> None:
    shutil.copytree(saved / "features", tmp_path / "features")
    said = cache(phantom_shards, tmp_path, **changes)
    for split in ("train", "val"):
        images = phantom_shards.manifest.splits[split].images
        (line,) = (line for line in said if line.startswith(f"cached {split}"))
        if split == "train" or changes != {"flip": "none"}:
            assert (f"{images} of them were computed by an earlier start" in line) is are_taken
            assert are_taken or "earlier" not in line


@pytest.mark.usefixtures("save_always")
def test_features_for_which_the_disk_has_no_room_are_not_saved_and_that_is_said(
    phantom_shards: ShardFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "SHARE_OF_DISK", 0.0)
    counted(monkeypatch, stop_after=7)
    stopped = train(phantom_shards, tmp_path, "run", **FROZEN)
    assert stopped.exit_code == 143
    assert stopped.stdout.count("features are not saved while they are computed") == 1
    assert not (tmp_path / "run").exists()


def features_of(images: int) -> dict[str, Tensor]:
    return {
        "values": torch.randn(images, 2, 5, dtype=torch.float32).to(torch.bfloat16),
        "labels": torch.randint(2, (images, 14), dtype=torch.uint8),
        "rows": torch.arange(images, dtype=torch.int32),
    }


def save(folder: Path, features: dict[str, Tensor], identity: str = "these") -> None:
    """Save in three files, of 4, 4 and 2 images."""
    saved = FeatureChunks(folder, "train", identity)
    assert saved.load(features) == 0
    for images in (4, 8, 10):
        saved.save_if_due(features, images)
    assert len(list(folder.glob("*.pt"))) == 3


@pytest.mark.usefixtures("save_always")
@pytest.mark.parametrize(
    ("number", "damage", "left"),
    [(0, "", 10), (1, "byte", 4), (0, "byte", 0), (1, "missing", 4), (2, "no hash", 8), (2, "shorter", 8)],
)
def test_what_is_loaded_are_the_bits_that_were_saved_up_to_the_first_damage(
    tmp_path: Path, number: int, damage: str, left: int
) -> None:
    folder, features = tmp_path / "features", features_of(10)
    save(folder, features)
    path = sorted(folder.glob("*.pt"))[number]
    content = path.read_bytes()
    match damage:
        case "byte":
            path.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
        case "missing":
            path.unlink()
        case "no hash":
            path.with_name(f"{path.name}.sha256").unlink()
        case "shorter":
            path.write_bytes(content[:-10])
    found = {name: torch.zeros_like(part) for name, part in features.items()}
    again = FeatureChunks(folder, "train", "these")
    assert again.load(found) == again.loaded == left
    for name, part in features.items():
        assert torch.equal(found[name][:left], part[:left])
    again.save_if_due(features, 10)
    assert FeatureChunks(folder, "train", "these").load(found) == 10
    assert torch.equal(found["values"], features["values"])


@pytest.mark.usefixtures("save_always")
@pytest.mark.parametrize("other", ["identity", "images", "shape", "type"])
def test_files_that_do_not_fit_are_removed(tmp_path: Path, other: str) -> None:
    folder, features = tmp_path / "features", features_of(10)
    save(folder, features, "those" if other == "identity" else "these")
    if other == "images":
        features = features_of(3)
    elif other == "shape":
        features["values"] = features["values"][:, :1]
    elif other == "type":
        features["values"] = features["values"].float()
    assert FeatureChunks(folder, "train", "these").load(features) == 0
    assert not list(folder.iterdir())


@pytest.mark.usefixtures("save_always")
def test_a_disk_that_fills_up_ends_the_saving_and_not_the_run(tmp_path: Path) -> None:
    features = features_of(10)
    saved = FeatureChunks(tmp_path / "features", "train", "these")
    saved.save_if_due(features, 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with trainer_log() as lines:
            for images in (6, 8, 10):
                saved.save_if_due(features, images)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (line,) = lines
    assert "features are not saved any more" in line
    assert FeatureChunks(tmp_path / "features", "train", "these").load(features_of(10)) == 4


@pytest.mark.usefixtures("save_always")
def test_a_view_is_saved_without_the_rest_of_its_memory(tmp_path: Path) -> None:
    values = torch.zeros(2, 100_000, 10)
    whole = {"values": values.swapaxes(0, 1), "rows": torch.arange(100_000, dtype=torch.int32)}
    saved = FeatureChunks(tmp_path / "features", "train", "")
    saved.save_if_due({name: part[1::1000] for name, part in whole.items()}, 100)
    (path,) = (tmp_path / "features").glob("*.pt")
    assert path.stat().st_size < 2 * 100 * 2 * 10 * 4


def test_the_digest_is_of_the_frozen_part_alone() -> None:
    def digest(**changes: int) -> str:
        torch.manual_seed(changes.get("seed", 0))
        model = models.create_model("custom_cnn", size=64)
        models.freeze(model, "backbone")
        trained = models.trainable_head(model, "backbone")
        if changes.get("head"):
            torch.nn.init.ones_(next(trained.parameters()))
        if changes.get("statistics"):
            next(value for name, value in model.named_buffers() if name.endswith("running_mean")).add_(1)
        return digest_of_frozen(model, trained)

    assert digest() == digest(head=1)
    assert len({digest(), digest(seed=1), digest(statistics=1)}) == 3
