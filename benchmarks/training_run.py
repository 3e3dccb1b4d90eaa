"""Models in training to be measured: variants of a run in turns, their peak memory, and a frozen backbone."""

import copy
import itertools
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.contenders import report_loader
from benchmarks.harness import memory_of, usage_of
from loaders import Batch, LoaderSpec, make_loader
from models import Classifier, create_model, freeze
from shards.folder import ShardFolder, open_shards
from shards.processes import available_cores
from trainer.feature_cache.features import cache_features
from trainer.logging.timing import DataWait, StepTimes
from trainer.optim.losses import make_loss
from trainer.optim.optimizers import LearningRate, make_optimizer
from trainer.optim.precision import Precision
from trainer.step import Step, StepStats
from trainer.validation import validate

_LR = 1e-4
_FROZEN_LR = 1e-3
_MEMORY_STEPS = 2  # an optimizer has its state from the first on


@dataclass(frozen=True)
class Variant:
    """One way to train."""

    name: str
    loader: str
    """`report`: the baseline paper's own DataLoader; else a loader of this project."""
    waits: bool = False
    """Whether the loss is read after every step, as the baseline paper's loop does, which waits for the device."""
    channels_last: bool = False
    autocast: bool = False
    compiled: bool = False
    fused: bool = False


def _ablation() -> Iterator[Variant]:
    yield (variant := Variant("the baseline paper's way, float32", "report", waits=True))
    for change in (
        {"name": "no wait for the loss", "waits": False},
        {"name": "channels-last", "channels_last": True},
        {"name": "autocast", "autocast": True},
        {"name": "fused optimizer", "fused": True},
        {"name": "gray bytes by dali", "loader": "dali"},
        {"name": "resident", "loader": "resident"},
        # Last, since --compile auto leaves it out on a CPU.
        {"name": "compiled", "compiled": True},
    ):
        yield (variant := replace(variant, **change))


VARIANTS = tuple(_ablation())
"""From the baseline paper's way of training to this project's, one change a variant."""


class TrainingRun:
    """An arch trained as one variant describes, on endless epochs of train, a few steps at a time."""

    def __init__(self, arch: str, variant: Variant, shards: ShardFolder, precision: Precision, batch_size: int) -> None:
        torch.manual_seed(0)
        self._variant = variant
        self._device = precision.device
        self._folder = tempfile.TemporaryDirectory()
        self._loader = self._open(shards, batch_size)
        self._batches = self._endless()
        model = create_model(arch, size=shards.manifest.size).to(self._device).train()
        if not variant.channels_last:
            model = model.to(memory_format=torch.contiguous_format)
        # The baseline paper's batches are normalised RGB already: they go past GrayInput.
        forward: nn.Module = model.network if variant.loader == "report" else model
        if variant.compiled:
            forward = torch.compile(forward, dynamic=False)  # type: ignore[assignment]
        optimizer = (
            make_optimizer("adam", model.parameters(), _LR, 0.0)
            if variant.fused
            else torch.optim.Adam(model.parameters(), lr=_LR, foreach=False, fused=False)
        )
        loss = make_loss("bce", "none", shards.manifest.splits["train"], self._device)
        how = precision if variant.autocast else Precision("fp32", self._device)
        self._stats = StepStats(self._device)
        self._step = _make_step(forward, loss, optimizer, _LR, self._stats, how)
        self._steps = 0
        self._step_ms: list[float] = []
        self._waited = self._trained = 0.0

    def train(self, steps: int) -> float:
        """Take some steps and return images/s from the first wait for a batch to the last weight changed."""
        first_turn = self._steps == 0
        images, wait = 0, DataWait(self._device)
        start, times = time.perf_counter(), StepTimes(self._device)
        for pixels, labels in itertools.islice(wait.over(self._batches), steps):
            self._steps += 1
            self._step.backward(pixels, labels, 1.0)
            self._step.optimizer_step(self._steps)
            if self._variant.waits:
                float(self._stats.loss_sum)
            images += len(pixels)
            times.mark()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - start
        if not first_turn:  # it starts what starts once
            self._waited, self._trained = self._waited + wait.waited, self._trained + seconds
            self._step_ms += times.milliseconds()
        return images / seconds

    def figures(self) -> dict[str, float]:
        """Return, of all turns but the first, the share of the time spent waiting for batches, 0..1, and
        percentiles of how long steps took, from one's end to the next one's, in ms.
        """
        median, slowest = np.percentile(self._step_ms, [50, 99])
        return {"data_wait": self._waited / self._trained, "step_ms_p50": float(median), "step_ms_p99": float(slowest)}

    def close(self) -> None:
        """End the loader and its processes."""
        self._batches.close()
        if hasattr(self._loader, "close"):
            self._loader.close()
        del self._batches, self._loader  # a DataLoader ends its workers when nobody has it any more
        self._folder.cleanup()

    def _open(self, shards: ShardFolder, batch_size: int) -> Any:
        if self._variant.loader == "report":
            return report_loader(shards, Path(self._folder.name) / "png", batch_size, available_cores())
        spec = LoaderSpec(shards, "train", batch_size, self._device, training=True, flip="random")
        return make_loader(self._variant.loader, spec)

    def _endless(self) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
        layout = torch.channels_last if self._variant.channels_last else torch.contiguous_format
        while True:
            for batch in self._loader:
                if self._variant.loader == "report":
                    yield batch[0].to(self._device, memory_format=layout), batch[1].to(self._device)
                else:
                    yield batch.images, batch.labels


def peak_memory(arch: str, variant: Variant, shards: Path, precision: Precision, batch_size: int) -> int:
    """Return bytes: of the GPU what torch had allocated at most, and on a CPU what the process held at most.

    That includes the interpreter, the libraries and a resident split; worker processes count with what
    they hold at the end.
    """
    # A new process: nothing that was measured before is in its memory. Not a daemon, so that it may have
    # workers of its own.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_memory_here, arch, variant, shards, precision, batch_size).result()


def _peak_memory_here(arch: str, variant: Variant, shards: Path, precision: Precision, batch_size: int) -> int:
    training = TrainingRun(arch, variant, open_shards(shards), precision, batch_size)
    training.train(_MEMORY_STEPS)
    if precision.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(precision.device)
    else:
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = own + usage_of(os.getpid()).memory - memory_of(os.getpid())
    training.close()
    return peak


def frozen_against_cached(
    arch: str, how: str, shards: ShardFolder, precision: Precision, epochs: int, batch_size: int
) -> dict[str, Any]:
    """Train the same head twice and compare time and val loss: the frozen network run in every epoch, and
    its output cached once.

    Both start from the same weights and take the same order. An epoch is one pass over train and one over
    val; the figures are medians of as many epochs.
    """
    torch.manual_seed(0)
    model = create_model(arch, size=shards.manifest.size).to(precision.device)
    freeze(model, how)
    train = LoaderSpec(shards, "train", batch_size, precision.device, training=True, flip="random")
    val = LoaderSpec(shards, "val", batch_size, precision.device, training=False)
    twin = copy.deepcopy(model)

    start = time.perf_counter()
    cached = cache_features(model, how, train, val, precision)
    caching = time.perf_counter() - start
    with cached.train, cached.val:
        fast, fast_loss = _train_head(model, cached.trainable, cached.train, cached.val, shards, precision, epochs)
    with make_loader("auto", train) as images, make_loader("auto", val) as val_images:
        slow, slow_loss = _train_head(twin, twin, images, val_images, shards, precision, epochs)
    return {
        "arch": arch,
        "freeze": how,
        "epochs": epochs,
        "images": shards.manifest.splits["train"].images,
        "val_images": shards.manifest.splits["val"].images,
        "caching_seconds": caching,
        "cached_seconds": fast,
        "streamed_seconds": slow,
        "speedup": slow / fast,
        "cached_val_loss": fast_loss,
        "streamed_val_loss": slow_loss,
    }


def _train_head(
    model: Classifier,
    submodule: nn.Module,
    batches: Iterable[Batch],
    val_batches: Iterable[Batch],
    shards: ShardFolder,
    precision: Precision,
    epochs: int,
) -> tuple[float, float]:
    # The median seconds of an epoch, and the last val loss.
    torch.manual_seed(1)  # of dropout in the head
    loss = make_loss("bce", "none", shards.manifest.splits["train"], precision.device)
    optimizer = make_optimizer("adam", model.parameters(), _FROZEN_LR, 0.0)
    step = _make_step(submodule, loss, optimizer, _FROZEN_LR, StepStats(precision.device), precision)
    seconds, steps, val_loss = [], 0, 0.0
    for _ in range(epochs):
        start = time.perf_counter()
        submodule.train()
        for batch in batches:
            steps += 1
            step.backward(batch.images, batch.labels, 1.0)
            step.optimizer_step(steps)
        submodule.eval()
        score = validate(val_batches, submodule, loss, precision.autocast, auroc=False, stop=lambda: False)
        assert score is not None
        seconds.append(time.perf_counter() - start)
        val_loss = score.loss
    return statistics.median_high(seconds), val_loss


def _make_step(
    forward: nn.Module,
    loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    rate: float,
    stats: StepStats,
    precision: Precision,
) -> Step:
    constant = LearningRate("constant", rate, 1, 0)
    return Step(forward, loss, optimizer, constant, stats, precision.autocast, precision.make_scaler())
