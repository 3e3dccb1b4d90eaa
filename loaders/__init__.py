"""Shards in, uint8 batches on the device out.

`make_loader(name, spec)` is the way in; every loader keeps the contract of `Loader`.
"""

from loaders.batch import Batch
from loaders.registry import LOADER_CHOICES, LOADERS, Loader, choose_loader, make_loader, streaming_loader
from loaders.spec import Augment, Flip, LoaderSpec

__all__ = [
    "LOADERS",
    "LOADER_CHOICES",
    "Augment",
    "Batch",
    "Flip",
    "Loader",
    "LoaderSpec",
    "choose_loader",
    "make_loader",
    "streaming_loader",
]
