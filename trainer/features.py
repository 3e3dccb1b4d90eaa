"""The cache of a frozen network: its output, computed once, is what the trained part then trains on."""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from loaders import Loader, LoaderSpec, streaming_loader
from loaders.batch import Batch
from loaders.memory import free_memory
from loaders.schedule import Slot
from loaders.scheduled import ScheduledLoader
from models import Classifier, frozen_part, trainable_part
from shards.progress import progress_bar
from trainer.precision import Precision

# Of the free memory, what the features of train and val together may take; the rest is left to the
# activations and gradients of the trained part. So the largest case, ResNet-50 frozen up to its last
# stage on all of NIH with mirrors (72 GB in 16 bits), is cached on a GPU with 141 GB.
SHARE = 0.6
_CPU = torch.device("cpu")
_NO_SLOT = Slot(np.empty(0, dtype=np.int64), 0, None)

Say = Callable[[str], None]


class Stopped(Exception):  # noqa: N818  the name says it
    """Building a cache or training on one was asked to stop; there is nothing to save."""


@dataclass(frozen=True)
class Features:
    """What the frozen part makes of every image of one split, in row order."""

    values: Tensor
    """[views, N, ...] in the type that the network emits, so nothing is rounded: float32, or under
    autocast bf16 or fp16 where its last operation gives that. Features [F], tokens [tokens, F], or maps
    as [H, W, C], which is how channels-last maps lie in memory. View 0 is the image, view 1, where there
    are flips, its mirror."""
    labels: Tensor
    """uint8 [N, 14]."""
    rows: Tensor
    """int32 [N]: the rows of entries.csv."""

    def batch(self, slot: Slot, both: bool, device: torch.device) -> Batch:
        """Return the batch of a slot on the device, with features in the place of images."""
        positions, samples = torch.from_numpy(slot.positions), len(self.rows)
        if both:
            places = torch.cat([positions, positions + samples])
        else:
            places = positions.clone()
            places[: slot.mirrored] += samples
        places = places.to(self.values.device, non_blocking=True)
        values = _chosen(self.values.flatten(0, 1), places, device)
        images = places % samples
        return Batch(
            values.permute(0, 3, 1, 2) if values.dim() == 4 else values,
            _chosen(self.labels, images, device),
            _chosen(self.rows, images, device),
        )


def _chosen(stored: Tensor, places: Tensor, device: torch.device) -> Tensor:
    chosen = stored.index_select(0, places)
    return chosen if chosen.device == device else chosen.pin_memory().to(device, non_blocking=True)


class FeatureLoader(ScheduledLoader):
    """Keeps the contract of `Loader`, but `Batch.images` holds what the frozen part makes of the images.

    Order, flips, batches and state are those of any loader of the same spec, which also resumes from
    this one's state. With several ranks each holds the features of the whole split, since the order
    hands every rank other samples in every epoch.
    """

    def __init__(self, features: Features, spec: LoaderSpec) -> None:
        super().__init__(spec, len(features.rows))
        self.features = features

    @property
    def device(self) -> torch.device:
        """Where the batches go."""
        return self._spec.device

    def _epoch(self) -> Iterator[Batch]:
        for slot in self._schedule.remaining():
            yield self.features.batch(slot, self._spec.flip == "both", self._spec.device)


@dataclass(frozen=True)
class Cached:
    """What to train instead of the whole model on images."""

    trainable: nn.Module
    """The model's own trained part: features in, logits out."""
    train: FeatureLoader
    val: FeatureLoader

    def nothing(self) -> Batch:
        """Return a batch of no images."""
        return self.val.features.batch(_NO_SLOT, False, self.val.device)


def cache_frozen(
    model: Classifier,
    how: str,
    train: LoaderSpec,
    val: LoaderSpec,
    precision: Precision,
    say: Say,
    *,
    decoding: Callable[[LoaderSpec], Loader] = streaming_loader,
    stop: Callable[[], bool] = lambda: False,
) -> Cached | None:
    """Run the frozen part once over train and val where its output fits in memory; say what was chosen.

    Training the trained part on the cache is the same function as training the model on the images, in
    the same order, with the same flips and the same draws of dropout: losses are equal up to the
    rounding that convolutions have in batches of another composition. Building draws no random numbers,
    and on a CPU builds the same bits again after a resume.

    The cost is one pass forward over each image, and each mirror where train has flips. The features are
    kept on the specs' device where they take at most SHARE of its free memory, else on the host under
    the same rule (there the ranks of one machine share what is free).

    Args:
        model: on the specs' device, with the weights to train from, frozen by `freeze(model, how)`. Its
            mode is evaluation afterwards.
        how: `backbone` or `partial`.
        train: of the training split; its augment must be none for a cache.
        val: of the split to evaluate on.
        precision: as it will be in training.
        say: is given lines for the user.
        decoding: makes the loader for the one pass over the images.
        stop: is asked between batches.

    Returns:
        The trained part and its two loaders. None where the frozen network has to be run in every epoch:
        the images are augmented, or the features fit nowhere.

    Raises:
        Stopped: `stop` said so.
        ValueError: the model is not frozen like that.
    """
    name = "backbone" if how == "backbone" else "frozen part"
    frozen = frozen_part(model, how)
    place, figures = place_of_cache(model, how, train, val, precision)
    if place is None:
        say(f"the {name} runs in every epoch: {figures}")
        return None
    say(f"the {name} runs once, its output is kept in the memory of {place}: {figures}")
    loaders = []
    for spec in (train, val):
        start = time.perf_counter()
        features = compute_features(frozen, spec, precision, place, decoding=decoding, stop=stop)
        seconds = time.perf_counter() - start
        views, images = features.values.shape[:2]
        say(
            f"cached {spec.split}: {images:,} images{' and their mirrors' if views == 2 else ''}, each "
            f"{list(features.values.shape[2:])} of {str(features.values.dtype).removeprefix('torch.')}, in "
            f"{seconds:.1f} s ({views * images / seconds:,.0f} images/s)"
        )
        loaders.append(FeatureLoader(features, spec))
    return Cached(trainable_part(model, how), *loaders)


def place_of_cache(
    model: Classifier, how: str, train: LoaderSpec, val: LoaderSpec, precision: Precision
) -> tuple[torch.device | None, str]:
    """Return where a cache of these would be kept, None for nowhere, and why; runs one image.

    Puts the model in evaluation mode. See cache_frozen.
    """
    if train.augment != "none":
        return None, f"--augment {train.augment} makes other images in each"
    frozen = frozen_part(model.eval(), how)
    return place_for(sum(_bytes(model, frozen, spec, precision) for spec in (train, val)), train.device)


def place_for(needed: int, device: torch.device) -> tuple[torch.device | None, str]:
    """Return where so many bytes fit: the device, else the host, else None; and the figures in words."""
    figures = f"it takes {_gib(needed)}"
    for place in dict.fromkeys((device, _CPU)):
        # torchrun tells every rank how many of them share this machine's memory
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if place == _CPU else 1
        room = SHARE * free_memory(place) / ranks
        figures += f", {SHARE:.0%} of what is free on {place} are {_gib(room)}"
        if needed <= room:
            return place, figures
    return None, figures


def compute_features(
    frozen: Callable[[Tensor], Tensor],
    spec: LoaderSpec,
    precision: Precision,
    place: torch.device,
    *,
    decoding: Callable[[LoaderSpec], Loader] = streaming_loader,
    stop: Callable[[], bool] = lambda: False,
) -> Features:
    """Run the frozen part over every image of a split in row order, and over its mirror if spec flips.

    Raises:
        Stopped: `stop` said so.
    """
    views = _views(spec)
    once = replace(spec, training=False, flip="none", rank=0, world_size=1)
    values, labels, rows = torch.empty(0), [], []
    done = 0
    with (
        decoding(once) as loader,
        progress_bar(views * loader.samples, f"caching {spec.split}", "img", disable=spec.rank > 0) as bar,
    ):
        for batch in loader:
            if stop():
                raise Stopped
            for view in range(views):
                with precision.autocast():
                    part = _as_stored(frozen(batch.images.flip(-1) if view else batch.images))
                if not done and not view:
                    shape = (views, loader.samples, *part.shape[1:])
                    values = torch.empty(shape, dtype=part.dtype, device=place)
                values[view, done : done + len(part)] = part
            labels.append(batch.labels.to(place))
            rows.append(batch.rows.to(place))
            done += len(batch.rows)
            bar.update(views * len(batch.rows))
    return Features(values, torch.cat(labels), torch.cat(rows))


def _views(spec: LoaderSpec) -> int:
    return 1 if spec.flip == "none" else 2


def _as_stored(features: Tensor) -> Tensor:
    return features.permute(0, 2, 3, 1) if features.dim() == 4 else features


def _bytes(
    model: Classifier, frozen: Callable[[Tensor], Tensor], spec: LoaderSpec, precision: Precision
) -> int:
    """Return what the features of a split take, found by running one black image."""
    black = torch.zeros(1, 1, model.size, model.size, dtype=torch.uint8, device=spec.device)
    with precision.autocast():
        features = frozen(black)
    images = spec.shards.manifest.splits[spec.split].images
    return _views(spec) * images * math.prod(features.shape) * features.element_size()


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
