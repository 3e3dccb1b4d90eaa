"""Steps on a GPU: every precision, compiled or not, learns the same; an overflow costs one step; nothing waits."""

import contextlib
import functools
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import trainer_log
from shards.folder import ShardFolder, open_shards
from tests.gpu.training import Training, endless, resident
from trainer.logging.timing import DataWait

# What a library warns of on some card is not what these tests are about.
pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("default")]
STEPS, LAST = 100, 20
CYCLES = 1.5e9  # about those of a second
WAYS = [
    *(("custom_cnn", precision, compiled) for precision in ("fp16", "bf16", "fp32") for compiled in (False, True)),
    ("resnet50", "fp16", True),
    ("vit_b_16", "fp16", True),
]


@functools.cache
def learned(folder: Path, device: torch.device, arch: str, precision: str, compiled: bool) -> tuple[float, ...]:
    """Return the mean train loss of the first and of the last LAST of STEPS steps."""
    shards = open_shards(folder)
    training = Training(shards, device, precision, arch=arch, compiled=compiled)
    seen, losses = 0, []
    with resident(shards, device, 8) as loader:
        for number, batch in enumerate(islice(endless(loader), STEPS), 1):
            if number == STEPS - LAST + 1:
                training.stats.loss_sum.zero_()
                seen = 0
            seen += len(batch.images)
            training.take(batch)
            if number in (LAST, STEPS):
                losses.append(float(training.stats.loss_sum) / seen)
    return tuple(losses)


@pytest.mark.parametrize(("arch", "precision", "compiled"), WAYS)
def test_every_precision_compiled_or_not_learns_what_float32_does(
    phantom_shards: ShardFolder, device: torch.device, arch: str, precision: str, compiled: bool
) -> None:
    if precision == "fp16" and device.type == "cpu":
        pytest.skip("fp16 needs a GPU")
    _, end = learned(phantom_shards.path, device, arch, "fp32", False)
    with trainer_log() as lines:
        first, last = learned(phantom_shards.path, device, arch, precision, compiled)
    assert [line for line in lines if "compile" in line] == []  # it did not fall back
    assert last < 0.95 * first
    assert last == pytest.approx(end, rel=0.02)


def test_an_overflow_skips_one_step_halves_the_scale_and_training_goes_on(
    phantom_shards: ShardFolder, device: torch.device
) -> None:
    changes: dict[str, Any] = {}
    if device.type == "cpu":  # which takes seconds an image in fp16: the scaler alone, with numbers for float32
        changes["scaler"] = torch.amp.GradScaler("cpu", 2.0**100)
    training = Training(phantom_shards, device, "fp32" if changes else "fp16", **changes)
    stats, scaler = training.stats, training.step.scaler
    with resident(phantom_shards, device, 8) as loader:
        batches = endless(loader)
        for batch in islice(batches, 20):  # the first scale may be too high, too
            training.take(batch)
        skipped, applied, scale, before = int(stats.skipped), int(stats.applied), scaler.get_scale(), training.weights()
        training.take(next(batches), factor=2.0**40)
        assert (int(stats.skipped), int(stats.applied)) == (skipped + 1, applied)
        assert scaler.get_scale() == scale / 2
        assert torch.equal(training.weights(), before)
        for batch in islice(batches, 10):
            training.take(batch)
    assert (int(stats.skipped), int(stats.applied)) == (skipped + 1, applied + 10)
    assert scaler.get_scale() == scale / 2
    assert int(stats.first_bad) == 0
    after = training.weights()
    assert after.isfinite().all()
    assert not torch.equal(after, before)


@contextlib.contextmanager
def no_waits(device: torch.device) -> Iterator[None]:
    """Have whatever waits for the GPU raise."""
    if device.type == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("fp16", {}),
        ("fp16", {"clip": 1.0, "ema": 0.9}),
        ("bf16", {"clip": 1.0}),
        ("fp32", {"ema": 0.9}),
        ("fp16", {"compiled": True}),
    ],
)
def test_twenty_steps_with_their_batches_wait_for_nothing(
    phantom_shards: ShardFolder, device: torch.device, precision: str, options: dict[str, Any]
) -> None:
    if precision == "fp16" and device.type == "cpu":
        precision = "fp32"
    training = Training(phantom_shards, device, precision, batch_size=2, **options)
    with resident(phantom_shards, device, 2) as loader:
        batches = iter(loader)
        for batch in islice(batches, 3):  # decodes, compiles, measures convolutions
            training.take(batch)
        assert loader.batches >= 3 + 26  # all in one epoch: the next begins with its rows, which are waited for
        with no_waits(device):
            for group in (*[1, 2] * 6, *[1] * 8):
                training.take(*islice(batches, group))
    assert int(training.stats.applied) + int(training.stats.skipped) == 3 + 20


@pytest.mark.parametrize(("loading", "step", "low", "high"), [(0.02, 0.002, 0.7, 1.0), (0.005, 0.025, 0.0, 0.3)])
def test_data_wait_is_the_time_that_the_gpu_waits_not_the_host(
    device: torch.device, loading: float, step: float, low: float, high: float
) -> None:
    def batches() -> Iterator[int]:
        for number in range(1, 21):
            time.sleep(loading)
            yield number

    wait = DataWait(device)
    for _ in wait.over(batches()):
        if device.type == "cuda":  # queued: the host goes on to wait for the next batch
            torch.cuda._sleep(int(step * CYCLES))
        else:
            time.sleep(step)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    assert low < wait.share < high
