"""Drawn chests in an NIH-shaped tree, for machines without the download and as ground truth for tests."""

from shards.phantoms.tree import Phantoms, make_phantoms

__all__ = ["Phantoms", "make_phantoms"]
