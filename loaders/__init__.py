"""Shards in, uint8 batches on the device out.

`make_loader(name, spec)` makes one; every loader keeps the contract of `Loader`.
"""

from loaders.loader import Batch, Loader
from loaders.registry import LOADER_CHOICES, LOADERS, choose_loader, make_loader, streaming_loader
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
