"""A signal ends a run after the step in progress, saved; it then goes on to the undisturbed weights."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from loaders.resident import ResidentLoader
from shards.folder import ShardFolder
from shards.processes import graceful_exit
from tests.trainer.running import losses, stop_at, terminate, train
from trainer.distributed import Distributed
from trainer.logging.checkpoints import load_checkpoint
from trainer.step import Step
from trainer.stop_signal import Stopped, StopSignal, handle_signals

# Running statistics, dropout, distorted images, averaged weights; three steps an epoch, the last one short.
OPTIONS = {"batch_size": 4, "accumulate": 7, "epochs": 2, "augment": "light", "ema": 0.9, "loader": "resident"}


@pytest.fixture(scope="module")
def undisturbed(phantom_shards: ShardFolder, runs: Path) -> Path:
    assert train(phantom_shards, runs, "undisturbed", **OPTIONS).exit_code == 0
    return runs / "undisturbed"


def assert_goes_on(folder: ShardFolder, run: Path, undisturbed: Path) -> None:
    resumed = train(folder, run.parent, run.name, **OPTIONS)
    assert resumed.exit_code == 0, resumed.stderr
    assert losses(run) == losses(undisturbed)
    assert (run / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("batch", [1, 7, 10, 15])
def test_a_run_stopped_within_a_step_finishes_it_and_is_saved(
    undisturbed: Path,
    phantom_shards: ShardFolder,
    runs: Path,
    batch: int,
    inside: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = runs / f"step-{batch}-{inside}"
    add, seen = Step.backward, []

    def interrupted(self: Step, *arguments: Any, **options: Any) -> None:
        seen.append(len(seen) + 1)
        if inside and len(seen) == batch:
            hook = self._trained[0].register_hook(lambda _: terminate())
        add(self, *arguments, **options)
        if len(seen) == batch:
            hook.remove() if inside else terminate()

    with monkeypatch.context() as patch:
        patch.setattr(Step, "backward", interrupted)
        stopped = train(phantom_shards, runs, run.name, **OPTIONS)
    assert stopped.exit_code == 143
    assert "stopped in epoch 1, saved" in stopped.stdout
    progress = load_checkpoint(run / "checkpoints" / "last.pt")["progress"]
    assert progress["step"] == -(-batch // 7)
    assert progress["images"] == min(28 * progress["step"], phantom_shards.manifest.splits["train"].images)
    assert len(seen) == -(-progress["images"] // 4)
    assert_goes_on(phantom_shards, run, undisturbed)


def test_a_run_stopped_while_val_is_decoded_is_saved_at_once(
    undisturbed: Path, phantom_shards: ShardFolder, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs / "decoding-val"
    interrupt_decoding(monkeypatch, "val")
    stopped = train(phantom_shards, runs, run.name, **OPTIONS)
    monkeypatch.undo()
    assert stopped.exit_code == 143
    assert load_checkpoint(run / "checkpoints" / "last.pt")["progress"]["trained"]
    assert_goes_on(phantom_shards, run, undisturbed)


def test_a_run_stopped_while_train_is_decoded_has_nothing_to_save(
    undisturbed: Path, phantom_shards: ShardFolder, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs / "decoding-train"
    with monkeypatch.context() as patch:
        interrupt_decoding(patch, "train")
        stopped = train(phantom_shards, runs, run.name, **OPTIONS)
    assert (stopped.exit_code, run.exists()) == (143, False)
    assert "nothing to save" in stopped.stdout
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert train(phantom_shards, runs, run.name, **OPTIONS).exit_code == 143
    before = (run / "checkpoints" / "last.pt").read_bytes()
    with monkeypatch.context() as patch:
        interrupt_decoding(patch, "train")
        stopped = train(phantom_shards, runs, run.name, **OPTIONS)
    assert stopped.exit_code == 143
    assert "resumes from the last checkpoint" in stopped.stdout
    assert (run / "checkpoints" / "last.pt").read_bytes() == before
    assert_goes_on(phantom_shards, run, undisturbed)


def interrupt_decoding(monkeypatch: pytest.MonkeyPatch, split: str) -> None:
    """Have this process get SIGTERM when it decodes a split."""
    decode = ResidentLoader._decode_into

    def interrupted(self: ResidentLoader, images: torch.Tensor) -> None:
        if self._spec.split == split:
            terminate()
            pytest.fail("went on decoding")
        decode(self, images)

    monkeypatch.setattr(ResidentLoader, "_decode_into", interrupted)


@pytest.mark.parametrize("place", ["trainer.setup.load_weights", "trainer.launch.open_shards"])
def test_a_run_stopped_before_its_first_step_leaves_at_once(
    phantom_shards: ShardFolder, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        terminate()
        pytest.fail("went on")

    monkeypatch.setattr(place, interrupted)
    assert train(phantom_shards, tmp_path, "early", **OPTIONS).exit_code == 143
    assert not (tmp_path / "early" / "checkpoints").exists()


def test_a_second_late_signal_ends_the_process_without_saving(
    phantom_shards: ShardFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.stop_signal._SAME_REQUEST", 0)
    add = Step.backward

    def interrupted(self: Step, *arguments: Any, **options: Any) -> None:
        if self.stats.applied == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        add(self, *arguments, **options)

    monkeypatch.setattr(Step, "backward", interrupted)
    stopped = train(phantom_shards, tmp_path, "twice", **OPTIONS, checkpoint_steps=1)
    assert stopped.exit_code == 130
    assert load_checkpoint(tmp_path / "twice" / "checkpoints" / "last.pt")["progress"]["step"] == 2
    assert "saved" not in stopped.stdout


def test_a_second_signal_is_the_same_request_unless_it_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    with handle_signals() as stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert stop.exit_code == 130
        monkeypatch.setattr("trainer.stop_signal._SAME_REQUEST", 0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_that_the_parent_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with handle_signals() as stop, graceful_exit("nothing was begun"):
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_is_held_where_it_must_not_raise_and_raised_where_it_may() -> None:
    stop = StopSignal()
    with stop.interruptible(Distributed(size=2)):
        stop.receive(signal.SIGINT)
    with pytest.raises(Stopped), stop.interruptible():
        pytest.fail("went on")
    assert stop.exit_code == 130
