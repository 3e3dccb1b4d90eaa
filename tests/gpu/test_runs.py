"""Whole runs on a GPU: trained and scored, resumed after signals, out of memory, with a cached backbone."""

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from click.testing import CliRunner

from benchmarks.harness import trainer_log
from eval.__main__ import main as evaluate
from loaders import Batch
from shards.folder import ShardFolder
from tests.gpu.training import fingerprint
from tests.trainer.running import losses, metrics, terminate, train
from trainer.distributed import ShardedLoader
from trainer.step import Step

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("default")]
MIB = 2**20


@pytest.mark.parametrize(("arch", "compiled"), [("custom_cnn", "on"), ("resnet50", "off"), ("vit_b_16", "off")])
def test_smoke_a_run_trains_and_is_scored(
    phantom_shards: ShardFolder, device: torch.device, tmp_path: Path, arch: str, compiled: str
) -> None:
    with trainer_log() as lines:
        options = {"arch": arch, "weights": "none", "compile": compiled, "epochs": 2, "device": device}
        done = train(phantom_shards, tmp_path, "smoke", **options)
    assert done.exit_code == 0, done.stderr
    assert not [line for line in lines if "compile failed" in line]
    run = tmp_path / "smoke"
    assert (run / "model.safetensors").is_file()
    assert metrics(run, "epoch")[-1]["skipped_steps"] < metrics(run, "epoch")[-1]["step"]
    scored = CliRunner().invoke(evaluate, [str(run), "--device", str(device), "--resamples", "0", "--heatmaps", "2"])
    assert scored.exit_code == 0, scored.stderr
    assert (run / "eval" / "test" / "report.html").is_file()


def test_ten_signals_at_random_moments_leave_the_rows_and_pixels_of_an_undisturbed_run(
    phantom_shards: ShardFolder, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"epochs": 4, "device": device, "compile": "off", "loader": "resident"}
    seen: list[torch.Tensor] = []
    moments: set[int] = set()
    taken = 0
    iter_from, backward = ShardedLoader.iter_from, Step.backward

    def recorded(self: ShardedLoader, images: int) -> Iterator[tuple[int, int, Batch]]:
        for count, own, batch in iter_from(self, images):
            seen.append(fingerprint(batch))
            yield count, own, batch

    def interrupted(self: Step, *arguments: Any, **others: Any) -> None:
        nonlocal taken
        taken += 1
        inside = taken in moments and taken % 4
        hook = self._trained[0].register_hook(lambda _: terminate()) if inside else None
        backward(self, *arguments, **others)
        if hook:
            hook.remove()
        elif taken in moments:
            terminate()

    monkeypatch.setattr(ShardedLoader, "iter_from", recorded)
    monkeypatch.setattr(Step, "backward", interrupted)
    assert train(phantom_shards, tmp_path, "calm", **options).exit_code == 0
    calm, seen = [each.cpu() for each in seen], []
    # Never in the first batch of a start, which may compile: that one is not finished but repeated.
    moments, taken = set(random.Random(0).sample(range(2, taken + 1, 2), 10)), 0
    codes = [train(phantom_shards, tmp_path, "stopped", **options).exit_code for _ in range(11)]
    assert codes == [143] * 10 + [0]
    assert len(seen) == len(calm)
    for own, other in zip(seen, calm, strict=True):
        assert torch.equal(own.cpu(), other)
    # On a GPU kernels may add in another order.
    for own, other in zip(losses(tmp_path / "stopped"), losses(tmp_path / "calm"), strict=True):
        assert own == pytest.approx(other, rel=0.05)


@contextlib.contextmanager
def memory_left(device: torch.device, size: int) -> Iterator[None]:
    """Leave this process so many bytes more of the device than it has; of a CPU, nothing from the first step on."""
    if device.type == "cpu":

        def too_much(*_: Any, **__: Any) -> None:
            torch.empty(2**60, dtype=torch.uint8)

        with mock.patch.object(Step, "backward", too_much):
            yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + size) / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def test_a_device_out_of_memory_is_exit_4_with_a_smaller_batch_to_try(
    phantom_shards: ShardFolder, device: torch.device, tmp_path: Path
) -> None:
    # The weights are 94 MB, what a batch leaves for the backward pass is several times that.
    options = {"arch": "resnet50", "weights": "none", "compile": "off", "loader": "resident", "device": device}
    with memory_left(device, 256 * MIB):
        done = train(phantom_shards, tmp_path, "large", **options, batch_size=64)
    assert done.exit_code == 4, done.stderr
    assert "out of memory; try --batch-size 32 --grad-accum-steps 2" in done.stderr
    assert train(phantom_shards, tmp_path, "small", **options, batch_size=8, epochs=1).exit_code == 0


def test_a_head_trained_on_the_cache_of_a_frozen_backbone_ends_as_one_that_streams(
    phantom_shards: ShardFolder, device: torch.device, tmp_path: Path
) -> None:
    options = {"arch": "resnet50", "weights": "none", "freeze": "backbone", "compile": "off", "device": device}
    for cache in ("on", "off"):
        assert train(phantom_shards, tmp_path, cache, **options, cache=cache).exit_code == 0
    for own, other in zip(losses(tmp_path / "on"), losses(tmp_path / "off"), strict=True):
        assert own == pytest.approx(other, rel=5e-3)
    first, *_, last = losses(tmp_path / "on")
    assert last[0] < first[0]
