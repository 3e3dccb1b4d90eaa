"""Shards in, uint8 batches on the device out.

`make_loader(name, spec)` is the way in; every loader keeps the contract of `Loader`.
"""

from loaders.batch import Batch
from loaders.registry import LOADERS, Loader, make_loader
from loaders.spec import Flip, LoaderSpec

__all__ = ["LOADERS", "Batch", "Flip", "Loader", "LoaderSpec", "make_loader"]
