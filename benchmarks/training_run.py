"""A model in training, a few steps at a time, so that several can take turns."""

import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.ablation import Variant
from benchmarks.baselines import report_loader
from loaders import LoaderSpec, make_loader
from models import create_model
from shards.folder import ShardFolder
from shards.processes import available_cores
from trainer.logging.timing import DataWait, StepTimes
from trainer.optim.losses import make_loss
from trainer.optim.optimizers import LearningRate, make_optimizer
from trainer.optim.precision import Precision
from trainer.step import Step, StepStats

_LR = 1e-4


class TrainingRun:
    """An arch trained as one variant describes, on endless epochs of train."""

    def __init__(self, arch: str, variant: Variant, shards: ShardFolder, precision: Precision, batch_size: int) -> None:
        torch.manual_seed(0)
        self._variant = variant
        self._device = precision.device
        self._folder = tempfile.TemporaryDirectory()
        self._open = self._report(shards, batch_size) if variant.loader == "report" else self._own(shards, batch_size)
        self._batches = self._endless()
        model = create_model(arch, size=shards.manifest.size).to(self._device).train()
        if not variant.channels_last:
            model = model.to(memory_format=torch.contiguous_format)
        # The baseline paper's batches are normalised RGB already: they go past GrayInput.
        forward: nn.Module = model.network if variant.loader == "report" else model
        if variant.compiled:
            forward = torch.compile(forward, dynamic=False)  # type: ignore[assignment]
        how = precision if variant.autocast else Precision("fp32", self._device)
        optimizer = (
            make_optimizer("adam", model.parameters(), _LR, 0.0)
            if variant.fused
            else torch.optim.Adam(model.parameters(), lr=_LR, foreach=False, fused=False)
        )
        loss = make_loss("bce", "none", shards.manifest.splits["train"], self._device)
        self._counters = StepStats(self._device)
        self._step = Step(
            forward,
            loss,
            optimizer,
            LearningRate("constant", _LR, 1, 0),
            self._counters,
            how.autocast,
            how.make_scaler(),
        )
        self._steps = 0
        self._step_ms: list[float] = []
        self._waited = self._trained = 0.0
        self._warm = False

    def train(self, steps: int) -> float:
        """Take some steps and return images/s from the first wait for a batch to the last weight changed."""
        images, wait = 0, DataWait()
        taking = iter(wait.over(self._batches))
        start, times = time.perf_counter(), StepTimes(self._device)
        for _ in range(steps):
            pixels, labels = next(taking)
            self._steps += 1
            self._step.backward(pixels, labels, 1.0)
            self._step.optimizer_step(self._steps)
            if self._variant.waits:
                float(self._counters.loss_sum)
            images += len(pixels)
            times.mark()
        self._synchronize()
        seconds = time.perf_counter() - start
        if self._warm:
            self._waited, self._trained = self._waited + wait.waited, self._trained + seconds
            self._step_ms += times.milliseconds()
        self._warm = True  # the first turn starts what starts once
        return images / seconds

    @property
    def data_wait(self) -> float:
        """The share of the time since the first turn that was spent waiting for batches."""
        return self._waited / self._trained

    def step_percentiles(self) -> dict[str, float]:
        """Return how long steps took, from one's end to the next one's, in ms."""
        median, slowest = np.percentile(self._step_ms, [50, 99])
        return {"step_ms_p50": float(median), "step_ms_p99": float(slowest)}

    def close(self) -> None:
        """End the loader and its processes."""
        self._batches.close()
        if hasattr(self._open, "close"):
            self._open.close()
        del self._batches, self._open  # a DataLoader ends its workers when nobody has it any more
        self._folder.cleanup()

    def _own(self, shards: ShardFolder, batch_size: int) -> Any:
        spec = LoaderSpec(shards, "train", batch_size, self._device, training=True, flip="random")
        return make_loader(self._variant.loader, spec)

    def _report(self, shards: ShardFolder, batch_size: int) -> Any:
        return report_loader(shards, Path(self._folder.name) / "png", batch_size, available_cores())

    def _endless(self) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
        layout = torch.channels_last if self._variant.channels_last else torch.contiguous_format
        while True:
            for batch in self._open:
                if self._variant.loader == "report":
                    yield batch[0].to(self._device, memory_format=layout), batch[1].to(self._device)
                else:
                    yield batch.images, batch.labels

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
