"""Runs on the cache of a frozen part, and sweeps: they end where runs without end, also when killed."""

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shards.folder import ShardFolder
from tests.trainer.running import command, kill, losses, metrics, stop_at, terminate, train
from trainer.feature_cache import features
from trainer.logging.checkpoints import CheckpointTimer, load_checkpoint
from trainer.model_file import load_model

FROZEN = {"freeze": "backbone", "batch_size": 10, "weights": "none", "precision": "fp32"}
SWEEP = {**FROZEN, "epochs": 2, "sweep": "lr=1e-5,1e-3 weight-decay=0,1e-3"}


@pytest.fixture(scope="module")
def undisturbed(phantom_shards: ShardFolder, runs: Path) -> Path:
    done = train(phantom_shards, runs, "undisturbed", **FROZEN)
    assert done.exit_code == 0, done.stderr
    assert "--cache auto is on: it fits in the memory of cpu" in done.stdout
    return runs / "undisturbed"


def recorded(run: Path) -> dict[str, Any]:
    return {key: option["value"] for key, option in json.loads((run / "config.json").read_text()).items()}


def assert_same_end(run: Path, other: Path) -> None:
    assert losses(run) == losses(other)
    assert (run / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.mark.parametrize("changes", [{}, {"ema": 0.5}, {"freeze": "partial", "flip": "both"}])
def test_a_cached_run_ends_where_the_run_on_images_does(
    phantom_shards: ShardFolder, runs: Path, changes: dict[str, Any]
) -> None:
    ends = []
    for cache in ("on", "off"):
        name = "-".join([cache, *changes])
        # A gradient step is as exact as the losses; Adam's first ones divide by their size.
        options = {**FROZEN, "optimizer": "sgd", "epochs": 2, **changes, "cache": cache}
        done = train(phantom_shards, runs, name, **options)
        assert done.exit_code == 0, done.stderr
        ends.append(load_file(runs / name / "model.safetensors"))
    assert ("cached train" in (runs / "-".join(["on", *changes]) / "log.txt").read_text()) is True
    for name, weights in ends[0].items():
        torch.testing.assert_close(weights, ends[1][name], rtol=1e-5, atol=1e-5)


def test_what_auto_came_to_is_on_record(undisturbed: Path) -> None:
    assert recorded(undisturbed)["cache"] == "on"
    assert recorded(undisturbed)["loader"] == "auto"


@pytest.mark.parametrize("when", ["save", "never"])
def test_a_cached_run_killed_and_resumed_ends_at_the_undisturbed_weights(
    undisturbed: Path, phantom_shards: ShardFolder, runs: Path, when: str
) -> None:
    run = runs / f"killed-{when}"
    often = {"checkpoint_steps": 2} if when == "save" else {}

    def trained() -> bool:
        record = run / "metrics.jsonl"
        return record.is_file() and '"step", "epoch": 2' in record.read_text()

    kill(command(phantom_shards, runs, run.name, **FROZEN, **often), trained, 0)
    resumed = train(phantom_shards, runs, run.name, **FROZEN)
    assert resumed.exit_code == 0, resumed.stderr
    assert_same_end(run, undisturbed)


@pytest.mark.parametrize("step", [3, 7, 8])
def test_a_cached_run_with_an_average_stopped_within_an_epoch_goes_on(
    phantom_shards: ShardFolder, runs: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**FROZEN, "ema": 0.9, "freeze": "partial"}
    if not (runs / "average").is_dir():
        assert train(phantom_shards, runs, "average", **options).exit_code == 0
    name = f"average-{step}"
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        assert train(phantom_shards, runs, name, **options).exit_code == 143
    assert train(phantom_shards, runs, name, **options).exit_code == 0
    assert_same_end(runs / name, runs / "average")


def test_an_epoch_that_was_not_worth_saving_can_still_be_the_one_that_is_kept(
    phantom_shards: ShardFolder, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CheckpointTimer, "is_worthwhile", lambda self, took: False)
    # A rate at which some epoch in the middle is the best.
    done = train(phantom_shards, runs, "short", **FROZEN, epochs=6, lr=3e-3)
    assert done.exit_code == 0, done.stderr
    epochs = metrics(runs / "short", "epoch")
    best = min(epochs, key=lambda line: line["val_loss"])
    assert best["epoch"] < len(epochs) == 6
    last = load_checkpoint(runs / "short" / "checkpoints" / "last.pt")
    assert last["progress"]["epoch"] == 7
    saved, kept = load_model(runs / "short" / "model.safetensors")
    assert (kept["epoch"], kept["val_loss"]) == (best["epoch"], best["val_loss"])
    weights = saved.state_dict()
    assert not all(torch.equal(weights[name], last["model"][name]) for name in weights)


def test_stopping_while_caching_saves_nothing_and_the_run_starts_again(
    undisturbed: Path, phantom_shards: ShardFolder, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_features = features.compute_features

    def interrupted(*arguments: Any, **options: Any) -> Any:
        terminate()
        return compute_features(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("trainer.feature_cache.features.compute_features", interrupted)
        stopped = train(phantom_shards, runs, "caching", **FROZEN, cache="on")
    assert stopped.exit_code == 143
    assert "nothing to save" in stopped.stdout
    assert not (runs / "caching" / "checkpoints").exists()
    assert train(phantom_shards, runs, "caching", **FROZEN, cache="on").exit_code == 0
    assert_same_end(runs / "caching", undisturbed)


@pytest.mark.parametrize(
    ("changes", "exit_code", "message"),
    [
        ({"cache": "on", "freeze": "none"}, 2, "--freeze partial or backbone"),
        ({"cache": "on", "augment": "light"}, 4, "--augment light makes other images in each"),
        ({"sweep": "lr=1e-3", "freeze": "none"}, 2, "--freeze partial or backbone"),
        ({"sweep": "lr=1e-3", "cache": "off"}, 2, "without --cache off"),
        ({"sweep": "lr=1e-3", "augment": "light"}, 2, "without --augment"),
        ({"sweep": "epochs=3"}, 2, "it can vary: lr, weight-decay"),
        ({"sweep": "lr=0"}, 2, "--sweep: lr: 0"),
        ({"sweep": "lr=1e-3 weight-decay=-1"}, 2, "--sweep: weight-decay: -1"),
    ],
)
def test_what_cannot_be_cached_is_refused_aloud(
    phantom_shards: ShardFolder, tmp_path: Path, changes: dict[str, Any], exit_code: int, message: str
) -> None:
    done = train(phantom_shards, tmp_path, "refused", **{**FROZEN, **changes})
    assert done.exit_code == exit_code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_cache_that_does_not_fit_is_streamed_refused_or_ends_a_resumed_run(
    phantom_shards: ShardFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert train(phantom_shards, tmp_path, "begun", **FROZEN).exit_code == 143
    monkeypatch.setattr("trainer.feature_cache.features.SHARE", 1e-9)
    auto = train(phantom_shards, tmp_path, "auto", **FROZEN, epochs=1)
    assert auto.exit_code == 0, auto.stderr
    assert "--cache auto is off: it takes 0.0" in auto.stdout
    assert recorded(tmp_path / "auto")["cache"] == "off"
    for name, changes in (("on", {"cache": "on"}), ("swept", {"sweep": "lr=1e-3"}), ("begun", {})):
        refused = train(phantom_shards, tmp_path, name, **FROZEN, **changes)
        assert refused.exit_code == 4, name
        assert "of what is free on cpu" in refused.stderr


@pytest.fixture(scope="module")
def swept(phantom_shards: ShardFolder, runs: Path) -> Path:
    done = train(phantom_shards, runs, "swept", **SWEEP)
    assert done.exit_code == 0, done.stderr
    assert "best epoch" in done.stdout
    return runs / "swept"


def test_a_sweep_goes_on_with_the_options_of_the_best_head_and_ends_at_its_val_loss(swept: Path) -> None:
    heads = metrics(swept, "sweep")
    assert [(head["lr"], head["weight_decay"]) for head in heads] == list(itertools.product((1e-5, 1e-3), (0, 1e-3)))
    best = min(heads, key=lambda head: head["val_loss"])
    config = json.loads((swept / "config.json").read_text())
    assert config["lr"] == {"value": best["lr"], "from": "sweep"}
    assert config["weight_decay"] == {"value": best["weight_decay"], "from": "sweep"}
    assert min(loss for _, loss in losses(swept)) == best["val_loss"]
    with (swept / "sweep.csv").open() as file:
        table = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert table == [{key: head[key] for key in table[0]} for head in heads]


def test_a_resumed_run_keeps_what_its_sweep_chose(
    swept: Path, phantom_shards: ShardFolder, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained() -> bool:
        record = runs / "swept-killed" / "metrics.jsonl"
        return record.is_file() and '"step", "epoch": 2' in record.read_text()

    kill(command(phantom_shards, runs, "swept-killed", **SWEEP, checkpoint_steps=1), trained, 0)
    resumed = train(phantom_shards, runs, "swept-killed", **SWEEP)
    assert resumed.exit_code == 0, resumed.stderr
    assert len(metrics(runs / "swept-killed", "sweep")) == 4
    assert_same_end(runs / "swept-killed", swept)


def test_a_sweep_of_which_every_head_diverges_says_so(phantom_shards: ShardFolder, tmp_path: Path) -> None:
    done = train(phantom_shards, tmp_path, "diverged", **FROZEN, sweep="lr=1e20,1e25")
    assert done.exit_code == 1
    assert "every head of the sweep diverged" in done.stderr
    assert [line["val_loss"] for line in metrics(tmp_path / "diverged", "sweep")] == [None, None]
