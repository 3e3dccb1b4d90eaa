"""What a cell of `benchmarks.gpu` measures: one function a kind, run in a process of its own.

The process is given a kind, the shards, the device and the options as JSON, and prints its figures as one line of JSON.
"""

import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity

from benchmarks import loader as loader_benchmark
from benchmarks.epoch import EPOCHS
from benchmarks.harness import interleave, summary, trainer_log, utilisation
from benchmarks.training_run import TrainingRun, Variant, fresh_compiler, make_step
from loaders import LoaderSpec, make_loader
from models import create_model, freeze, trainable_head
from shards.folder import ShardFolder, open_shards
from trainer.__main__ import main as trainer
from trainer.devices import use_device
from trainer.feature_cache.features import FeatureLoader, Features
from trainer.optim.losses import make_loss
from trainer.optim.optimizers import make_optimizer
from trainer.optim.precision import choose_precision
from trainer.state import TrainState
from trainer.step import StepStats

Figures = dict[str, Any]
PAPER = EPOCHS["the report's doubled set"]
"""Images of the baseline paper's epoch."""
_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LONGEST_NAME = 100  # characters of a kernel's


def copy(shards: ShardFolder, device: torch.device, *, mib: int, repeats: int) -> Figures:
    """Return the bandwidth of copying within the device's memory, read and written bytes counted."""
    source = torch.ones(mib * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {"gb_per_second": 2 * source.nbytes / _seconds(lambda: target.copy_(source), device, repeats) / 1e9}


def matmul(shards: ShardFolder, device: torch.device, *, dtype: str, side: int, repeats: int) -> Figures:
    """Return the TFLOP/s of a product of two square matrices."""
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    one, other = (torch.randn(side, side, device=device, dtype=_DTYPES[dtype]) for _ in range(2))
    return {"tflop_per_second": 2 * side**3 / _seconds(lambda: one @ other, device, repeats) / 1e12}


def _seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    # Of one call, once it has run warm.
    for _ in range(3):
        work()
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    _wait(device)
    return (time.perf_counter() - start) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train(
    shards: ShardFolder,
    device: torch.device,
    *,
    arch: str,
    precision: str,
    compiled: bool,
    batch_size: int,
    loader: str,
    rounds: int,
    steps: int = 0,
) -> Figures:
    """Train end to end and on one fixed batch, in turns, with the same model; 0 steps: an epoch a turn."""
    fresh_compiler()
    steps = steps or -(-shards.manifest.splits["train"].images // batch_size)
    how = choose_precision(precision, device)
    variant = _variant(loader, compiled)
    with trainer_log() as lines:
        start = time.perf_counter()
        real = TrainingRun(arch, variant, shards, how, batch_size)
        real.train(1)
        started = time.perf_counter() - start
        ceiling = TrainingRun(arch, replace(variant, loader="synthetic"), shards, how, batch_size, model_of=real)
        rates = interleave({"real": partial(real.train, steps), "synthetic": partial(ceiling.train, steps)}, rounds)
    rate = summary(rates["real"])
    figures = {
        "images_per_second": rate["median"],
        "synthetic_images_per_second": statistics.median(rates["synthetic"]),
        "utilisation": utilisation(rates["real"], rates["synthetic"]),
        **real.figures(),
        "memory_mib": real.peak_bytes / 2**20,
        "start_seconds": started,
        "paper_epoch_seconds": PAPER / rate["median"],
        "interval95": rate["interval95"],
        "runs": rate["runs"],
        "log": lines,
    }
    real.close()
    ceiling.close()
    return figures


def _variant(loader: str, compiled: bool) -> Variant:
    return Variant(loader, loader, channels_last=True, autocast=True, compiled=compiled, fused=True)


def head(
    shards: ShardFolder, device: torch.device, *, arch: str, precision: str, batch_size: int, images: int, epochs: int
) -> Figures:
    """Train a head on cached features of so many images and their mirrors; the first epoch is not counted."""
    how = choose_precision(precision, device)
    how.allow_fast_math()
    model = create_model(arch, findings=len(shards.manifest.findings), size=shards.manifest.size).to(device)
    freeze(model, "backbone")
    submodule = trainable_head(model, "backbone").train()
    inputs = next(module.in_features for module in submodule.modules() if isinstance(module, nn.Linear))
    with how.autocast():
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
    features = Features(
        torch.randn(2, images, inputs, dtype=dtype, device=device),
        torch.zeros(images, len(shards.manifest.findings), dtype=torch.uint8, device=device),
        torch.arange(images, dtype=torch.int32, device=device),
    )
    batches = FeatureLoader(features, LoaderSpec(shards, "train", batch_size, device, training=True, flip="both"))
    loss = make_loss("bce", "none", shards.manifest.splits["train"], device)
    optimizer = make_optimizer("adam", submodule.parameters(), 1e-3, 0.0)
    step, numbers = make_step(submodule, loss, optimizer, 1e-3, StepStats(device), how), itertools.count(1)
    seconds = []
    for _ in range(epochs + 1):
        start = time.perf_counter()
        for batch in batches:
            step.backward(batch.images, batch.labels, 1.0)
            step.optimizer_step(next(numbers))
        _wait(device)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[1:])
    return {"epoch_seconds": median, "features": batches.samples, "step_ms": 1e3 * median / batches.batches}


def loaders(shards: ShardFolder, device: torch.device, *, names: str, batch_size: int, runs: int) -> Figures:
    """Run `benchmarks.loader` on some loaders; return its table by name."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "loader.json"
        options = {
            "--shards": shards.path,
            "--device": device,
            "--loaders": names,
            "--batch-size": batch_size,
            "--runs": runs,
            "--json": out,
        }
        arguments = [str(text) for pair in options.items() for text in pair]
        loader_benchmark.main.main([*arguments, "--no-cold", "--no-scaling"], standalone_mode=False)
        record = json.loads(out.read_text(encoding="utf-8"))
    rates = {name: one["images_per_second"]["median"] for name, one in record["loaders"].items()}
    return {**rates, "limit_decoder": record.get("limit_decoder"), "details": record["loaders"]}


def decoder(
    shards: ShardFolder,
    device: torch.device,
    *,
    decode_on: str,
    threads: int,
    hardware_share: float,
    batch_size: int,
    epochs: int,
) -> Figures:
    """Load epochs by DALI with this decoder instead of its own choice; the first is not counted."""
    from loaders.decoder import Decoder

    spec = LoaderSpec(shards, "train", batch_size, device, training=True, flip="random")
    chosen = Decoder(decode_on, threads, hardware_share)
    rates = []
    with mock.patch("loaders.dali.choose_decoder", return_value=chosen), make_loader("dali", spec) as batches:
        for _ in range(epochs + 1):
            start = time.perf_counter()
            for _ in batches:
                pass
            _wait(device)
            rates.append(batches.samples / (time.perf_counter() - start))
    return {"images_per_second": statistics.median(rates[1:])}


def profile(
    shards: ShardFolder,
    device: torch.device,
    *,
    arch: str,
    precision: str,
    compiled: bool,
    batch_size: int,
    steps: int,
    rows: int,
) -> Figures:
    """Return the slowest kernels of a GPU, or operators of a CPU, over some steps on one fixed batch."""
    fresh_compiler()
    how = choose_precision(precision, device)
    with trainer_log() as lines:
        run = TrainingRun(arch, _variant("synthetic", compiled), shards, how, batch_size)
        run.train(3)
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with torch.profiler.profile(activities=activities) as recorded:
        run.train(steps)
    run.close()
    kind, clock = (DeviceType.CUDA, "self_device_time_total") if gpu else (DeviceType.CPU, "self_cpu_time_total")
    events = [one for one in recorded.key_averages() if one.device_type == kind and not one.is_user_annotation]
    total = sum(getattr(one, clock) for one in events)
    events.sort(key=lambda one: -float(getattr(one, clock)))
    table = [
        {
            "name": one.key[:_LONGEST_NAME],
            "calls_per_step": one.count / steps,
            "ms_per_step": getattr(one, clock) / steps / 1e3,
            "share": getattr(one, clock) / total,
        }
        for one in events[:rows]
    ]
    slowest = table[0]
    return {"ms_per_step": total / steps / 1e3, "slowest": slowest["name"], "table": table, "log": lines}


def save(shards: ShardFolder, device: torch.device, *, arch: str, batch_size: int, every: int) -> Figures:
    """Train an epoch by `python -m trainer` and time how long each checkpoint keeps the loop from its next step."""
    blocked, saving = [], TrainState.save

    def timed(state: TrainState) -> None:
        _wait(device)  # for the steps queued: they are not the checkpoint's time
        start = time.perf_counter()
        saving(state)
        blocked.append(time.perf_counter() - start)

    with tempfile.TemporaryDirectory() as runs, mock.patch.object(TrainState, "save", timed):
        options = {
            "--arch": arch,
            "--shards": shards.path,
            "--runs": runs,
            "--name": "saving",
            "--device": device,
            "--batch-size": batch_size,
            "--checkpoint-steps": every,
            "--epochs": 1,
            "--weights": "none",
            "--compile": "off",
        }
        trainer.main([str(text) for pair in options.items() for text in pair], standalone_mode=False)
        size = (Path(runs) / "saving" / "checkpoints" / "last.pt").stat().st_size
    return {
        "blocked_seconds": statistics.median(blocked),
        "longest_blocked_seconds": max(blocked),
        "checkpoints": len(blocked),
        "checkpoint_mib": size / 2**20,
    }


KINDS: dict[str, Callable[..., Figures]] = {
    each.__name__: each for each in (copy, matmul, train, head, loaders, decoder, profile, save)
}
"""By name; what is keyword-only are the cell's options."""


def measure(kind: str, shards: Path, device: str, options: dict[str, Any]) -> Figures:
    """Return the figures of a cell, from this process."""
    return KINDS[kind](open_shards(shards), use_device(device), **options)


def main(text: str) -> None:
    """Measure the cell given as JSON; standard output gets its figures alone."""
    task = json.loads(text)
    with open(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # whatever else is printed, by libraries, too
        figures = measure(task["kind"], Path(task["shards"]), task["device"], task["options"])
        print(json.dumps(figures), file=answers)


if __name__ == "__main__":
    main(sys.argv[1])
