"""Features of a frozen network, computed once and kept in memory, on which the head then trains."""

import contextlib
import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from loaders import Batch, Loader, LoaderSpec, make_loader, streaming_loader
from loaders.memory import pick_device
from loaders.sampler import BatchIndices
from models import Classifier, feature_extractor, trainable_head
from shards.console import progress_bar
from shards.errors import ResourceMissing
from trainer.devices import ranks_of_machine
from trainer.distributed import SINGLE_PROCESS, Distributed
from trainer.feature_cache.chunks import FeatureChunks, digest_of_frozen
from trainer.optim.precision import Precision
from trainer.stop_signal import Stopped

# Of the free memory, what the features of train and val together may take; the rest is left to the
# activations and gradients of the trained part. So the largest case, ResNet-50 frozen up to its last
# stage on all of NIH with mirrors (72 GB in 16 bits), is cached on a GPU with 141 GB.
SHARE = 0.6
_CPU = torch.device("cpu")
_SENT_AT_ONCE = 1024  # images: their largest maps take 0.8 GB
_FIRST = BatchIndices(np.zeros(1, dtype=np.int64), 0, None)

log = logging.getLogger("cxrapid.trainer")


class DoesNotFit(ResourceMissing):
    """The features fit nowhere, or the images are augmented: the frozen part has to run in every epoch."""


@dataclass(frozen=True)
class Features:
    """Output of the frozen part for every image of one split, in row order."""

    values: Tensor
    """[views, N, ...] in the dtype of the network's output, so nothing is rounded: float32, or under
    autocast bf16 or fp16. Features [F], tokens [tokens, F], or channels-last maps [H, W, C]. View 0 is the
    image, view 1, if there are flips, its mirror."""
    labels: Tensor
    """uint8 [N, 14]."""
    rows: Tensor
    """int32 [N]: the rows of entries.csv."""


class FeatureLoader(Loader):
    """Keeps the contract of `Loader`, but `Batch.images` holds features.

    Order, flips, batches and state are those of any loader of the same spec, which also resumes from this one's
    state. Each rank holds the features of the whole split, since the order hands it other samples in every epoch.
    """

    def __init__(self, features: Features, spec: LoaderSpec) -> None:
        super().__init__(spec, len(features.rows))
        self.features = features

    def first_image(self) -> Batch:
        """Return a batch of the split's first image, and of its mirror if every epoch has both."""
        return self._batch(_FIRST)

    def _epoch(self) -> Iterator[Batch]:
        for indices in self._sampler.remaining():
            yield self._batch(indices)

    def _batch(self, batch: BatchIndices) -> Batch:
        features, device = self.features, self._spec.device
        positions, samples = torch.from_numpy(batch.positions), len(features.rows)
        if self._spec.flip == "both":
            indices = torch.cat([positions, positions + samples])
        else:
            indices = positions.clone()
            indices[: batch.mirrored] += samples
        indices = indices.to(features.values.device, non_blocking=True)
        values = _select(features.values.flatten(0, 1), indices, device)
        images = indices % samples
        return Batch(
            values.permute(0, 3, 1, 2) if values.dim() == 4 else values,
            _select(features.labels, images, device),
            _select(features.rows, images, device),
        )


def _select(stored: Tensor, indices: Tensor, device: torch.device) -> Tensor:
    selected = stored.index_select(0, indices)
    return selected if selected.device == device else selected.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class FeatureCache:
    """The trainable head, and loaders of the features it takes."""

    trainable: nn.Module
    """The model's own head: features in, logits out."""
    train: FeatureLoader
    val: FeatureLoader


def cache_features(
    model: Classifier,
    how: str,
    train: LoaderSpec,
    val: LoaderSpec,
    precision: Precision,
    *,
    loader: str = "auto",
    stop: Callable[[], bool] = lambda: False,
    dist: Distributed = SINGLE_PROCESS,
    save_in: Path | None = None,
) -> FeatureCache:
    """Run the frozen part once over train and val and keep its output in memory; log where and how large.

    Training the head on the cache is the same function as training the model on the images, in the same order, with
    the same flips and dropout: losses are equal up to the rounding of convolutions in batches of another composition.
    It draws no random numbers.

    The cost is one forward pass over each image, and each mirror if train has flips; of several ranks each runs its
    share and receives the others'. The features are kept on the specs' device if they take at most SHARE of its free
    memory, else on the host under the same rule. Every rank keeps all of them: the ranks of one machine divide what
    is free on the host.

    With `save_in`, a folder of its own, each rank saves its share there while computing, if it takes over a minute,
    unless it takes more than a tenth of what is free on the disk. Another call with the same weights, shards and
    options then computes only the rest, and on a CPU gives the same bits.

    Args:
        model: on the specs' device, frozen by `freeze(model, how)`; in evaluation mode afterwards.
        how: `backbone` or `partial`.
        train: of the training split; its augment must be none for a cache.
        val: of the split to evaluate on.
        precision: as it will be in training.
        loader: for the one pass over the images; auto: a streaming one.
        stop: called between batches, equally often on all ranks.
        dist: the ranks that call this with the same of everything but the rank in the specs.
        save_in: made when needed; its parent must exist. None: nothing is saved.

    Raises DoesNotFit if the images are augmented or the features fit nowhere, Stopped if `stop` returned True,
    ValueError if the model is not frozen like that.
    """
    name = "backbone" if how == "backbone" else "frozen part"
    frozen = feature_extractor(model, how)
    device, figures = choose_device_of_cache(model, how, train, val, precision, dist)
    if device is None:
        text = f"the {name} runs in every epoch: {figures}"
        log.info(text)
        raise DoesNotFit(text)
    log.info(f"the {name} runs once, its output is kept in the memory of {device}: {figures}")
    trained = trainable_head(model, how)
    weights_sha256 = "" if save_in is None else digest_of_frozen(model, trained)
    loaders = []
    for spec in (train, val):
        chunks = None
        if save_in is not None:
            # Numbers depend on the composition of batches, by their rounding, and so on batch size and ranks.
            identity = {
                "arch": model.arch,
                "freeze": how,
                "weights_sha256": weights_sha256,
                "manifest_sha256": spec.shards.digest,
                "split": spec.split,
                "views": _views(spec),
                "batch_size": spec.batch_size,
                "precision": precision.name,
                "loader": loader,
                "device": spec.device.type,
                "torch": torch.__version__,
            }
            name = f"{spec.split}-{dist.rank}-of-{dist.size}"
            chunks = FeatureChunks(save_in, name, json.dumps(identity, sort_keys=True))
        start = time.perf_counter()
        features = compute_features(frozen, spec, precision, device, loader=loader, stop=stop, dist=dist, chunks=chunks)
        seconds = time.perf_counter() - start
        ranks = f" on {dist.size} ranks" if dist.size > 1 else ""
        views, images = features.values.shape[:2]
        loaded = sum(dist.gather(0 if chunks is None else chunks.loaded))
        log.info(
            f"cached {spec.split}: {images:,} images{' and their mirrors' if views == 2 else ''}, each "
            f"{list(features.values.shape[2:])} of {str(features.values.dtype).removeprefix('torch.')}, in "
            f"{seconds:.1f} s{ranks} ({views * (images - loaded) / seconds:,.0f} images/s)"
            f"{f'; {loaded:,} of them were computed by an earlier start' if loaded else ''}"
        )
        loaders.append(FeatureLoader(features, spec))
    return FeatureCache(trained, *loaders)


def choose_device_of_cache(
    model: Classifier,
    how: str,
    train: LoaderSpec,
    val: LoaderSpec,
    precision: Precision,
    dist: Distributed = SINGLE_PROCESS,
) -> tuple[torch.device | None, str]:
    """Return the device that `cache_features` would keep its cache on, None for none, and why; runs one image.

    Of several ranks: one where it fits on all, so the host if it does not fit one of their GPUs. Puts the model in
    evaluation mode.
    """
    if train.augment != "none":
        return None, f"--augment {train.augment} makes other images in each"
    shape, dtype = _shape(feature_extractor(model.eval(), how), train, precision)
    images = sum(_views(spec) * spec.shards.manifest.splits[spec.split].images for spec in (train, val))
    device, figures = device_for_cache(images * math.prod(shape) * dtype.itemsize, train.device)
    devices = (train.device, _CPU, None)
    (common,) = dist.all_reduce_max(devices.index(device))
    if devices[common] != device:
        figures += f"; another rank has it {'nowhere' if devices[common] is None else 'on the host'}"
    return devices[common], figures


def device_for_cache(needed: int, device: torch.device) -> tuple[torch.device | None, str]:
    """Return where so many bytes fit: the device, else the host, else None; and the figures in words."""
    found, figures = pick_device(needed, device, SHARE, processes=ranks_of_machine())  # they share its memory
    return found, f"it {figures}"


def compute_features(
    frozen: Callable[[Tensor], Tensor],
    spec: LoaderSpec,
    precision: Precision,
    device: torch.device,
    *,
    loader: str = "auto",
    stop: Callable[[], bool] = lambda: False,
    dist: Distributed = SINGLE_PROCESS,
    chunks: FeatureChunks | None = None,
) -> Features:
    """Run the frozen part over every image of a split in row order, and over its mirror if spec flips.

    Of n ranks, rank r runs every n-th image from the r-th on, then all exchange their results. What `chunks` hold
    already is not run again, though its images are decoded if later ones are missing. Raises Stopped if `stop`
    returned True; what was computed is in `chunks` if it took long enough.
    """
    views, images = _views(spec), spec.shards.manifest.splits[spec.split].images
    shape, dtype = _shape(frozen, spec, precision)
    values = torch.empty((views, images, *shape), dtype=dtype, device=device)
    labels = torch.empty((images, len(spec.shards.manifest.findings)), dtype=torch.uint8, device=device)
    rows = torch.empty(images, dtype=torch.int32, device=device)
    features = {"values": values.swapaxes(0, 1), "labels": labels, "rows": rows}
    own = {name: tensor[dist.rank :: dist.size] for name, tensor in features.items()}
    done = chunks.load(own) if chunks is not None else 0
    try:
        with contextlib.closing(_decoded(spec, loader, stop, dist, done)) as batches:
            for batch, chunk in batches:
                for view in range(views):
                    with precision.autocast():
                        output = frozen(batch.images.flip(-1) if view else batch.images)
                    own["values"][chunk, view] = _as_stored(output)
                own["labels"][chunk], own["rows"][chunk] = batch.labels, batch.rows
                done = chunk.stop
                if chunks is not None:
                    chunks.save_if_due(own, done)
    finally:
        # Also where a signal raised Stopped.
        if chunks is not None and done:
            chunks.save_rest(own, done)
    for tensor in features.values():
        _exchange(tensor, dist)
    return Features(values, labels, rows)


def _decoded(
    spec: LoaderSpec, loader: str, stop: Callable[[], bool], dist: Distributed, done: int
) -> Generator[tuple[Batch, slice], None, None]:
    """Yield this rank's batches after its first `done` images, and where their images are among its own.

    Raises Stopped if `stop` returned True; it is called before each batch, equally often on all ranks.
    """
    views, images = _views(spec), spec.shards.manifest.splits[spec.split].images
    (is_missing,) = dist.all_reduce_max(done < len(range(dist.rank, images, dist.size)))
    if not is_missing:
        return
    once = replace(spec, training=False, flip="none", rank=dist.rank, world_size=dist.size)
    # Another rank may have one batch more, before which all are asked.
    batches = -(-images // (dist.size * spec.batch_size))
    position = 0
    with (
        streaming_loader(once) if loader == "auto" else make_loader(loader, once) as decoded,
        progress_bar(
            views * images,
            f"caching {spec.split}",
            "img",
            initial=min(dist.size * done, images) * views,
            disable=not dist.is_rank_zero,
        ) as bar,
    ):
        for batch in itertools.chain(decoded, [None] * (batches - decoded.batches)):
            if stop():
                raise Stopped
            if batch is None:
                continue
            chunk = slice(position, position + len(batch.rows))
            position = chunk.stop
            if chunk.start >= done:
                yield batch, chunk
                bar.update(min(dist.size * views * len(batch.rows), views * images - bar.n))


def _exchange(features: Tensor, dist: Distributed) -> None:
    """Fill in the other ranks' images: rank r has every n-th of the first dimension, from the r-th on."""
    if dist.size == 1:
        return
    together = dist.size * _SENT_AT_ONCE
    for start in range(0, len(features), together):
        for rank in range(min(dist.size, len(features) - start)):
            share = slice(start + rank, start + together, dist.size)
            sent = features[share].contiguous()
            dist.broadcast(sent, rank)
            features[share] = sent


def _views(spec: LoaderSpec) -> int:
    return 1 if spec.flip == "none" else 2


def _as_stored(features: Tensor) -> Tensor:
    return features.permute(0, 2, 3, 1) if features.dim() == 4 else features


def _shape(
    frozen: Callable[[Tensor], Tensor], spec: LoaderSpec, precision: Precision
) -> tuple[torch.Size, torch.dtype]:
    """Return how the features of one image are stored, found by running a black one."""
    size = spec.shards.manifest.size
    black = torch.zeros(1, 1, size, size, dtype=torch.uint8, device=spec.device)
    with precision.autocast():
        features = _as_stored(frozen(black))
    return features.shape[1:], features.dtype
