"""A signal is heeded soon, wherever the run is, and the run then goes on to the undisturbed weights."""

import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from loaders.resident import ResidentLoader
from shards.folder import ShardFolder
from shards.signals import graceful_exit
from tests.trainer.running import losses, terminate, train
from trainer.interruption import Interruption, Stopped, let_signals_in, listen
from trainer.records.checkpoints import load_checkpoint
from trainer.step import Step

# Running statistics, dropout, distorted images, averaged weights; three steps an epoch, the last one short.
OPTIONS = {
    "batch_size": 4, "accumulate": 7, "epochs": 2, "augment": "light", "ema": 0.9, "loader": "resident",
}  # fmt: skip


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
def test_a_run_stopped_within_a_step_is_saved_as_of_its_start(
    undisturbed: Path,
    phantom_shards: ShardFolder,
    runs: Path,
    batch: int,
    inside: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = runs / f"step-{batch}-{inside}"
    add, seen = Step.add, []

    def interrupted(self: Step, *arguments: Any, **options: Any) -> None:
        seen.append(len(seen) + 1)
        if inside and len(seen) == batch:
            self._trained[0].register_hook(lambda _: terminate())
        add(self, *arguments, **options)
        if not inside and len(seen) == batch:
            terminate()

    with monkeypatch.context() as patch:
        patch.setattr(Step, "add", interrupted)
        stopped = train(phantom_shards, runs, run.name, **OPTIONS)
    assert stopped.exit_code == 143
    assert "stopped in epoch 1, saved" in stopped.stdout
    assert len(seen) == batch
    progress = load_checkpoint(run / "checkpoints" / "last.pt")["progress"]
    assert progress["images"] == 28 * progress["step"] == 28 * ((batch - 1) // 7)
    assert_goes_on(phantom_shards, run, undisturbed)


@pytest.mark.parametrize(("split", "trained"), [("train", False), ("val", True)])
def test_a_run_stopped_while_images_are_decoded_is_saved_at_once(
    undisturbed: Path,
    phantom_shards: ShardFolder,
    runs: Path,
    split: str,
    trained: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, decode = runs / f"decoding-{split}", ResidentLoader._decode_into

    def interrupted(self: ResidentLoader, images: torch.Tensor) -> None:
        if self._spec.split == split:
            terminate()
            pytest.fail("went on decoding")
        decode(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(ResidentLoader, "_decode_into", interrupted)
        stopped = train(phantom_shards, runs, run.name, **OPTIONS)
    assert stopped.exit_code == 143
    assert load_checkpoint(run / "checkpoints" / "last.pt")["progress"]["trained"] == trained
    assert_goes_on(phantom_shards, run, undisturbed)


@pytest.mark.parametrize("place", ["trainer.preparation.load_weights", "trainer.launch.open_shards"])
def test_a_run_stopped_before_its_first_step_leaves_at_once(
    phantom_shards: ShardFolder, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        terminate()
        pytest.fail("went on")

    monkeypatch.setattr(place, interrupted)
    assert train(phantom_shards, tmp_path, "early", **OPTIONS).exit_code == 143
    assert not (tmp_path / "early" / "checkpoints").exists()


def test_a_signal_in_a_long_backward_pass_on_a_cpu_ends_it() -> None:
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(100)))
    let_signals_in(model)
    asked, begun = Interruption(), threading.Event()

    def send() -> None:
        begun.wait()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda number, _: asked.note(number))
    sender = threading.Thread(target=send)
    sender.start()
    try:
        logits = model(torch.ones(2048, 512))
        logits.register_hook(lambda _: begun.set())
        with pytest.raises(Stopped), asked.at_once():
            logits.sum().backward()
    finally:
        sender.join()
        signal.signal(signal.SIGTERM, before)
    assert model[0].weight.grad is None
    assert asked.exit_code == 143


def test_a_second_signal_is_the_same_request_unless_it_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    with listen() as asked:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert asked.exit_code == 130
        monkeypatch.setattr("trainer.interruption._SAME_REQUEST", 0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_that_the_parent_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with listen() as asked, graceful_exit("nothing was begun"):
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert asked.signal is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_is_held_where_it_must_not_raise_and_raised_where_it_may() -> None:
    asked = Interruption()
    with asked.at_once(False):
        asked.note(signal.SIGINT)
    with pytest.raises(Stopped), asked.at_once():
        pytest.fail("went on")
    assert asked.exit_code == 130
