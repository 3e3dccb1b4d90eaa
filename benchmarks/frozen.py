"""Training with a frozen backbone: the network run in every epoch against its output cached once."""

import copy
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from loaders import Batch, LoaderSpec, make_loader
from models import Classifier, create_model, freeze
from shards.folder import ShardFolder
from trainer.feature_cache.features import cache_features
from trainer.optim.losses import make_loss
from trainer.optim.optimizers import LearningRate, make_optimizer
from trainer.optim.precision import Precision
from trainer.step import Step, StepStats
from trainer.validation import validate

_LR = 1e-3


def frozen_against_cached(
    arch: str, how: str, shards: ShardFolder, precision: Precision, epochs: int, batch_size: int
) -> dict[str, Any]:
    """Train the same head twice, from the same weights in the same order, and compare time and val loss.

    An epoch is one pass over train and one over val. The cached epochs are as many, and each is timed;
    the figure is their median, as it is for the streamed ones.
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
        on_cache = _train(model, cached.trainable, cached.train, cached.val, shards, precision, epochs)
    with make_loader("auto", train) as images, make_loader("auto", val) as val_images:
        streamed = _train(twin, twin, images, val_images, shards, precision, epochs)
    return {
        "arch": arch,
        "freeze": how,
        "epochs": epochs,
        "images": shards.manifest.splits["train"].images,
        "val_images": shards.manifest.splits["val"].images,
        "caching_seconds": caching,
        "cached_seconds": sorted(on_cache.seconds)[epochs // 2],
        "streamed_seconds": sorted(streamed.seconds)[epochs // 2],
        "speedup": sorted(streamed.seconds)[epochs // 2] / sorted(on_cache.seconds)[epochs // 2],
        "cached_val_loss": on_cache.val_loss,
        "streamed_val_loss": streamed.val_loss,
    }


class _Trained:
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.val_loss = 0.0


def _train(
    model: Classifier,
    part: nn.Module,
    batches: Iterable[Batch],
    val_batches: Iterable[Batch],
    shards: ShardFolder,
    precision: Precision,
    epochs: int,
) -> _Trained:
    torch.manual_seed(1)  # of dropout in the head
    loss = make_loss("bce", "none", shards.manifest.splits["train"], precision.device)
    optimizer = make_optimizer("adam", model.parameters(), _LR, 0.0)
    counters = StepStats(precision.device)
    step = Step(
        part,
        loss,
        optimizer,
        LearningRate("constant", _LR, 1, 0),
        counters,
        precision.autocast,
        precision.make_scaler(),
    )
    trained, steps = _Trained(), 0
    never: Callable[[], bool] = lambda: False  # noqa: E731
    for _ in range(epochs):
        start = time.perf_counter()
        part.train()
        for batch in batches:
            steps += 1
            step.backward(batch.images, batch.labels, 1.0)
            step.optimizer_step(steps)
        part.eval()
        score = validate(val_batches, part, loss, precision.autocast, auroc=False, stop=never)
        assert score is not None
        trained.seconds.append(time.perf_counter() - start)
        trained.val_loss = score.loss
    return trained
