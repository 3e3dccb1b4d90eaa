"""A run that is killed, stopped, damaged or given a full disk, and what it ends with."""

import contextlib
import random
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from shards.folder import ShardFolder
from tests.trainer.running import ROOT, TIMEOUT, command, kill, losses, metrics, stop_at, terminate, train
from trainer.launch import train as run_to_its_end
from trainer.logging.checkpoints import load_checkpoint
from trainer.loop import validate
from trainer.optim.optimizers import LearningRate
from trainer.optim.precision import Precision
from trainer.options import TrainConfig
from trainer.resolve import RunContext
from trainer.run_directory import RunDirectory
from trainer.step import Step
from trainer.stop_signal import StopSignal

# Everything that has a state, at once.
RICH = {
    "augment": "light",
    "accumulate": 2,
    "schedule": "onecycle",
    "ema": 0.9,
    "clip": 1.0,
    "optimizer": "adamw",
    "monitor": "auroc",
    "loss": "asymmetric",
    "label_smoothing": 0.1,
    "pos_weight": "effective",
    "batch_size": 4,
}


@pytest.fixture(scope="module")
def undisturbed(phantom_shards: ShardFolder, runs: Path) -> Path:
    assert train(phantom_shards, runs, "undisturbed").exit_code == 0
    return runs / "undisturbed"


def assert_same_end(run: Path, other: Path) -> None:
    assert losses(run) == losses(other)
    assert (run / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.full)])
def test_kills_at_random_moments_leave_the_weights_of_an_undisturbed_run(
    phantom_shards: ShardFolder, runs: Path, kills: int
) -> None:
    options = {**RICH, "epochs": max(3, kills), "log_every": 1}
    calm, run = f"calm-{kills}", runs / f"killed-{kills}"
    assert train(phantom_shards, runs, calm, **options).exit_code == 0
    steps = metrics(runs / calm, "epoch")[-1]["step"]
    draw = random.Random(kills)
    for number in range(kills):
        aim = 1 + number * (steps - 1) // kills

        def trained(aim: int = aim) -> bool:
            record = run / "metrics.jsonl"
            return record.is_file() and f'"step": {aim},' in record.read_text()

        arguments = command(phantom_shards, runs, run.name, checkpoint_steps=2, **options)
        kill(arguments, trained, draw.uniform(0, 0.3))
    assert train(phantom_shards, runs, run.name, **options).exit_code == 0
    assert_same_end(run, runs / calm)


def half_written(run: Path) -> set[tuple[str, int]]:
    """Return the name of every temporary file of last.pt, and when it was written."""
    found = set()
    for path in (run / "checkpoints").glob(".last.pt*.partial"):
        with contextlib.suppress(FileNotFoundError):  # it got its name
            found.add((path.name, path.stat().st_mtime_ns))
    return found


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.full)])
def test_kills_inside_saving_all_resume(undisturbed: Path, phantom_shards: ShardFolder, runs: Path, kills: int) -> None:
    run = runs / f"saving-{kills}"
    saved = [run / "checkpoints" / name for name in ("last.pt", "previous.pt")]
    draw = random.Random(kills)
    inside = 0
    while inside < kills:
        stale = half_written(run)

        def saves(stale: set[tuple[str, int]] = stale) -> bool:
            return any(path.is_file() for path in saved) and bool(half_written(run) - stale)

        kill(command(phantom_shards, runs, run.name, checkpoint_steps=1), saves, draw.uniform(0, 0.1))
        inside += bool(half_written(run))  # a save that ends takes this file away
    done = train(phantom_shards, runs, run.name)
    assert done.exit_code == 0, done.stderr
    assert "from its last checkpoint" in done.stdout
    assert_same_end(run, undisturbed)


@pytest.mark.parametrize("step", [3, 8, 9])
def test_a_run_with_everything_on_goes_on_from_within_an_epoch(
    phantom_shards: ShardFolder, runs: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (runs / "rich").is_dir():
        assert train(phantom_shards, runs, "rich", **RICH, epochs=2).exit_code == 0
    name = f"rich-{step}"
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        assert train(phantom_shards, runs, name, **RICH, epochs=2).exit_code == 143
    assert train(phantom_shards, runs, name, **RICH, epochs=2).exit_code == 0
    assert_same_end(runs / name, runs / "rich")


def test_a_run_stopped_in_val_goes_on_with_val(
    undisturbed: Path, phantom_shards: ShardFolder, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> Any:
        terminate()
        return validate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("trainer.loop.validate", interrupted)
        stopped = train(phantom_shards, runs, "in-val")
    assert stopped.exit_code == 143
    assert "stopped in epoch 1" in stopped.stdout
    assert train(phantom_shards, runs, "in-val").exit_code == 0
    assert_same_end(runs / "in-val", undisturbed)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_falls_back_aloud_and_two_end_the_run(
    undisturbed: Path, phantom_shards: ShardFolder, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs / "damaged"
    with monkeypatch.context() as patch:
        stop_at(patch, 20)
        assert train(phantom_shards, runs, run.name).exit_code == 143
    shutil.copytree(run, runs / "twice")
    damage(run / "checkpoints" / "last.pt")
    again = train(phantom_shards, runs, run.name)
    assert again.exit_code == 0
    assert "last.pt is damaged" in again.stdout
    assert "previous.pt" in again.stdout
    assert_same_end(run, undisturbed)
    run = runs / "twice"
    for name in ("last.pt", "previous.pt"):
        damage(run / "checkpoints" / name)
    refused = train(phantom_shards, runs, run.name)
    assert refused.exit_code == 5
    assert "last.pt is damaged" in refused.stderr
    assert "previous.pt is damaged" in refused.stderr
    assert not (run / "model.safetensors").exists()


def test_a_disk_that_is_full_when_saving_is_exit_4_and_loses_nothing(
    undisturbed: Path, phantom_shards: ShardFolder, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        assert train(phantom_shards, runs, "full-disk").exit_code == 143
    checkpoints = runs / "full-disk" / "checkpoints"
    # As good as a full disk, also for root: no file may be as large as a checkpoint.
    limit = f'ulimit -f {(checkpoints / "last.pt").stat().st_size // 2**11}; exec "$@"'
    arguments = ["bash", "-c", limit, "bash", *command(phantom_shards, runs, "full-disk")]
    full = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    assert full.returncode == 4, full.stderr
    assert "last.pt: File too large" in full.stderr
    assert load_checkpoint(checkpoints / "last.pt")["progress"]["step"] == 5
    assert train(phantom_shards, runs, "full-disk").exit_code == 0
    assert_same_end(runs / "full-disk", undisturbed)


@pytest.mark.parametrize("looks", [{"log_every": 1}, {"log_every": 1000}, {"checkpoint_steps": 1}])
def test_a_diverging_run_names_its_first_bad_step_and_saves_no_bad_number(
    phantom_shards: ShardFolder, tmp_path: Path, looks: dict[str, int]
) -> None:
    done = train(phantom_shards, tmp_path, "diverged", lr=1e20, **looks)
    assert done.exit_code == 1
    assert "at step 2 (epoch 1)" in done.stderr
    for path in tmp_path.glob("diverged/checkpoints/*.pt"):
        state = load_checkpoint(path)
        assert all(value.isfinite().all() for value in state["model"].values())
        assert all(
            value.isfinite().all() for parameter in state["optimizer"]["state"].values() for value in parameter.values()
        )
        assert torch.equal(state["ranks"][0]["counters"]["first_bad"], torch.tensor(0))


def test_steps_that_overflow_fp16_are_on_record_and_the_scale_found_is_resumed(
    phantom_shards: ShardFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A CPU takes seconds an image in fp16, so the passes run in float32, and the first three overflow that.
    monkeypatch.setattr(Precision, "autocast", lambda _: contextlib.nullcontext())
    add = Step.backward

    def large(self: Step, images: torch.Tensor, labels: torch.Tensor, share: float, **options: bool) -> None:
        add(self, images, labels, share * (2.0**20 if self.stats.skipped < 3 else 1), **options)

    monkeypatch.setattr(Step, "backward", large)
    monkeypatch.setattr(Precision, "make_scaler", lambda _: torch.amp.GradScaler("cpu", 2.0**127, growth_interval=5))
    config = TrainConfig(
        arch="custom_cnn",
        runs=tmp_path,
        batch_size=8,
        epochs=2,
        patience=0,
        schedule="onecycle",
        log_every=1,
        checkpoint_steps=1,
        loader="resident",
        cache="off",
    )

    precision = Precision("fp16", torch.device("cpu"))

    def go_on(run: RunDirectory) -> list[dict[str, Any]]:
        run.path.mkdir(exist_ok=True)
        assert run_to_its_end(RunContext(config, run, phantom_shards, precision, StopSignal()))
        return metrics(run.path, "step")

    calm = go_on(RunDirectory(tmp_path / "calm"))
    skipped = [line["skipped_steps"] for line in calm]
    assert skipped == [*range(1, 4), *[3] * (len(calm) - 3)]
    rates = LearningRate("onecycle", config.lr, len(calm), 0)(torch.arange(len(calm))).tolist()
    for line, sofar in zip(calm, skipped, strict=True):
        assert line["lr"] == rates[max(line["step"] - sofar - 1, 0)]
    scales = [line["grad_scale"] for line in calm]
    assert scales[:4] == [2.0**126, 2.0**125, 2.0**124, 2.0**124]

    run = RunDirectory(tmp_path / "stopped")
    step = 4  # the first that was applied
    with monkeypatch.context() as patch:
        optimizer_step, stop = Step.optimizer_step, StopSignal()

        def interrupted(self: Step, number: int) -> None:
            optimizer_step(self, number)
            if number == step:
                stop.receive(signal.SIGTERM)

        patch.setattr(Step, "optimizer_step", interrupted)
        run.path.mkdir()
        assert not run_to_its_end(RunContext(config, run, phantom_shards, precision, stop))
    assert load_checkpoint(run.last)["scaler"]["scale"] == scales[step - 1]
    resumed = go_on(run)
    for key in ("lr", "grad_scale", "skipped_steps", "train_loss"):
        assert [line[key] for line in resumed] == [line[key] for line in calm], key


def test_checkpoints_can_be_had_by_the_minute(
    phantom_shards: ShardFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 12)
    assert train(phantom_shards, tmp_path, "often", epochs=2, checkpoint_every=1e-9).exit_code == 143
    # The last is of the step in which it was stopped, the one before of the step before.
    last, before = (
        load_checkpoint(tmp_path / "often" / "checkpoints" / f"{name}.pt")["progress"]["step"]
        for name in ("last", "previous")
    )
    assert (before, last) == (11, 12)


def test_an_epoch_on_record_whose_end_no_checkpoint_holds_is_forgotten(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    rest = {"train_loss": 0.5, "val_loss": 0.4, "lr": 0.1, "best": True}
    rates = {"seconds": 1.0, "data_wait": 0.1, "images_per_second": 8.0}
    for kind, epoch, step in (("epoch", 1, 4), ("step", 2, 8), ("epoch", 2, 8), ("step", 3, 10)):
        run.log_metrics(kind=kind, epoch=epoch, step=step, **rest, **rates)
    run.truncate_metrics(2, 8)  # saved after the last step of epoch 2, before its val
    assert [(line["kind"], line["epoch"]) for line in run.read_metrics()] == [("epoch", 1), ("step", 2)]
