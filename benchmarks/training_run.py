"""Models in training to be measured: variants of a run in turns, their peak memory, and a frozen backbone.

Every model here runs with the trainer's fast math on a GPU (Precision.allow_fast_math) and is compiled by the trainer's
CompiledModel, so that what is measured is what the trainer does.
"""

import copy
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.contenders import report_loader
from benchmarks.harness import memory_of, peak_memory_of_this_process, usage_of
from loaders import Batch, LoaderSpec, make_loader
from models import Classifier, create_model, freeze
from shards.folder import ShardFolder, open_shards
from shards.processes import available_cores
from trainer.devices import use_device
from trainer.feature_cache.features import cache_features
from trainer.logging.timing import DataWait, StepTimes
from trainer.optim.compilation import CompiledModel
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
    by_hand: bool = False
    """Whether a PlainLoop takes the steps, not the trainer's Step."""
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


class PlainLoop:
    """What a good engineer writes by hand around a model, for batches from any loader.

    Autocast, gradient scaling where the precision needs it, fused Adam, and a running loss that stays on the device.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], model: nn.Module, precision: Precision) -> None:
        self._forward = forward
        self._autocast = precision.autocast
        self._scaler = precision.make_scaler()
        self._optimizer = torch.optim.Adam(model.parameters(), lr=_LR, fused=True)
        self._loss = nn.BCEWithLogitsLoss()
        self.loss_sum = torch.zeros((), device=precision.device)

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """Take a step."""
        self._optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            logits = self._forward(images)
        loss = self._loss(logits.float(), labels.float())
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self.loss_sum += loss.detach()


class TrainingRun:
    """An arch trained as one variant describes, on endless epochs of train, a few steps at a time.

    Args:
        arch: by name.
        variant: how it is trained.
        shards: train is read.
        precision: of the passes, unless the variant has no autocast.
        batch_size: images a step.
        model_of: another run whose model this one goes on training, so that it is built and compiled once.
    """

    def __init__(
        self,
        arch: str,
        variant: Variant,
        shards: ShardFolder,
        precision: Precision,
        batch_size: int,
        *,
        model_of: "TrainingRun | None" = None,
    ) -> None:
        torch.manual_seed(0)
        self._variant = variant
        self._device = precision.device
        self._peak = self._held = 0
        self._turns = 0
        self._step_ms: list[float] = []
        self._waited = self._trained = 0.0
        with self._counting_memory():
            self._folder = tempfile.TemporaryDirectory()
            self._loader = self._open(shards, batch_size)
            self._batches = self._endless()
            self._take: Callable[[Tensor, Tensor], object] = (
                self._made(arch, shards, precision, batch_size) if model_of is None else model_of._take
            )

    def _made(
        self, arch: str, shards: ShardFolder, precision: Precision, batch_size: int
    ) -> Callable[[Tensor, Tensor], object]:
        # What takes a step.
        variant = self._variant
        precision.allow_fast_math()
        model = (
            create_model(arch, findings=len(shards.manifest.findings), size=shards.manifest.size)
            .to(self._device)
            .train()
        )
        if not variant.channels_last:
            model = model.to(memory_format=torch.contiguous_format)
        # The baseline paper's batches are normalised RGB already: they go past GrayInput.
        network: nn.Module = model.network if variant.loader == "report" else model
        forward = CompiledModel(network, batch_size, compiled=variant.compiled)
        how = precision if variant.autocast else Precision("fp32", self._device)
        if variant.by_hand:
            return PlainLoop(forward, model, how)
        optimizer = (
            make_optimizer("adam", model.parameters(), _LR, 0.0)
            if variant.fused
            else torch.optim.Adam(model.parameters(), lr=_LR, foreach=False, fused=False)
        )
        loss = make_loss("bce", "none", shards.manifest.splits["train"], self._device)
        stats = StepStats(self._device)
        step, numbers = make_step(forward, loss, optimizer, _LR, stats, how), itertools.count(1)

        def take(images: Tensor, labels: Tensor) -> None:
            step.backward(images, labels, 1.0)
            step.optimizer_step(next(numbers))
            if variant.waits:
                float(stats.loss_sum)

        return take

    def train(self, steps: int) -> float:
        """Take some steps and return images/s from the first wait for a batch to the last weight changed."""
        images, wait = 0, DataWait(self._device)
        with self._counting_memory():
            start, times = time.perf_counter(), StepTimes(self._device)
            for pixels, labels in itertools.islice(wait.over(self._batches), steps):
                self._take(pixels, labels)
                images += len(pixels)
                times.mark()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            seconds = time.perf_counter() - start
        self._turns += 1
        if self._turns > 1:  # the first starts what starts once
            self._waited, self._trained = self._waited + wait.waited, self._trained + seconds
            self._step_ms += times.milliseconds()
        return images / seconds

    def figures(self) -> dict[str, float]:
        """Return, of all turns but the first, the share of the time spent waiting for batches, 0..1, and
        percentiles of how long steps took, from one's end to the next one's, in ms.
        """
        median, slowest = np.percentile(self._step_ms, [50, 99])
        return {"data_wait": self._waited / self._trained, "step_ms_p50": float(median), "step_ms_p99": float(slowest)}

    @property
    def peak_bytes(self) -> int:
        """Of a GPU: what torch had allocated for this run at most, whatever else the process holds there."""
        return self._peak

    @contextmanager
    def _counting_memory(self) -> Iterator[None]:
        # What is allocated and still there afterwards is this run's, for others wait meanwhile.
        if self._device.type != "cuda":
            yield
            return
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        yield
        self._peak = max(self._peak, self._held + torch.cuda.max_memory_allocated(self._device) - before)
        self._held += torch.cuda.memory_allocated(self._device) - before

    def close(self) -> None:
        """End the loader and its processes."""
        self._batches.close()
        if hasattr(self._loader, "close"):
            self._loader.close()
        # A DataLoader ends its workers when nobody has it any more, and a GPU has room for the next model.
        del self._batches, self._loader, self._take
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


def fresh_compiler() -> None:
    """Forget what torch.compile made, and have a model that is compiled too often end the benchmark with an error."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.reset()


def peak_memory(arch: str, variant: Variant, shards: Path, precision: Precision, batch_size: int) -> int:
    """Return the bytes that the process of a training on a CPU holds at most.

    That includes the interpreter, the libraries and a resident split; worker processes count with what
    they hold at the end. Of a GPU, TrainingRun.peak_bytes is the figure.
    """
    # A new process: nothing that was measured before is in its memory. Not a daemon, so that it may have
    # workers of its own.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_memory_here, arch, variant, shards, precision, batch_size).result()


def _peak_memory_here(arch: str, variant: Variant, shards: Path, precision: Precision, batch_size: int) -> int:
    use_device(str(precision.device))
    training = TrainingRun(arch, variant, open_shards(shards), precision, batch_size)
    training.train(_MEMORY_STEPS)
    peak = peak_memory_of_this_process() + usage_of(os.getpid()).memory - memory_of(os.getpid())
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
    precision.allow_fast_math()
    model = create_model(arch, findings=len(shards.manifest.findings), size=shards.manifest.size).to(precision.device)
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
    step = make_step(submodule, loss, optimizer, _FROZEN_LR, StepStats(precision.device), precision)
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


def make_step(
    forward: Callable[[Tensor], Tensor],
    loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    rate: float,
    stats: StepStats,
    precision: Precision,
) -> Step:
    """Return the trainer's Step at a constant rate."""
    constant = LearningRate("constant", rate, 1, 0)
    return Step(forward, loss, optimizer, constant, stats, precision.autocast, precision.make_scaler())
