"""A model in training on a device, step by step, for the tests beside this file."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from loaders import Batch, LoaderSpec
from loaders.resident import ResidentLoader
from loaders.torch_loader import TorchLoader
from models import create_model
from shards.folder import ShardFolder
from trainer.optim.compilation import CompiledModel
from trainer.optim.ema import EMA
from trainer.optim.losses import make_loss
from trainer.optim.optimizers import LearningRate, make_optimizer
from trainer.optim.precision import Precision
from trainer.step import Step, StepStats


def resident(shards: ShardFolder, device: torch.device, batch_size: int) -> ResidentLoader:
    """Return a loader whose images were decoded on the CPU, without DALI, so that they are the same on any device."""
    spec = LoaderSpec(shards, "train", batch_size, device, training=True, flip="random")
    return ResidentLoader(spec, TorchLoader)


def endless(loader: ResidentLoader) -> Iterator[Batch]:
    while True:
        yield from loader


class Training:
    def __init__(
        self,
        shards: ShardFolder,
        device: torch.device,
        precision: str,
        *,
        arch: str = "custom_cnn",
        batch_size: int = 8,
        compiled: bool = False,
        ema: float = 0.0,
        **changes: Any,
    ) -> None:
        torch.manual_seed(0)
        how = Precision(precision, device)
        how.allow_fast_math()
        self.model = create_model(arch, size=shards.manifest.size).to(device).train()
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # a compiled model draws other numbers
        self.stats = StepStats(device)
        parts = {
            "forward": CompiledModel(self.model, batch_size, compiled=compiled),
            "loss": make_loss("bce", "none", shards.manifest.splits["train"], device),
            "optimizer": make_optimizer("adam", self.model.parameters(), 1e-4, 0.0),
            "rate": LearningRate("constant", 1e-4, 1, 0),
            "stats": self.stats,
            "autocast": how.autocast,
            "scaler": how.make_scaler(),
            "ema": EMA(self.model, ema) if ema else None,
        }
        self.step = Step(**{**parts, **changes})
        self._number = 0

    def take(self, *batches: Batch, factor: float = 1.0) -> None:
        """Take a step over a group of batches, with its gradient multiplied by `factor`."""
        images = sum(len(batch.images) for batch in batches)
        for index, batch in enumerate(batches):
            share = factor * len(batch.images) / images
            self.step.backward(batch.images, batch.labels, share, more=index < len(batches) - 1)
        self._number += 1
        self.step.optimizer_step(self._number)

    def weights(self) -> torch.Tensor:
        return torch.cat([weight.detach().flatten() for weight in self.model.parameters()])


def fingerprint(batch: Batch) -> torch.Tensor:
    """Return int64 [3, N], of each sample the row, its pixels with their places, and its labels; waits for nothing."""
    pixels, labels = batch.images.flatten(1).long(), batch.labels.long()
    places = torch.arange(pixels.shape[1], device=pixels.device) % 8191 + 1
    bits = 2 ** torch.arange(labels.shape[1], device=labels.device)
    return torch.stack([batch.rows.long(), (pixels * places).sum(1), (labels * bits).sum(1)])
