"""Draw chest phantoms in an NIH-shaped tree: a stand-in for the download, and ground truth for tests."""

from shards.phantoms.tree import Phantoms, make_phantoms

__all__ = ["Phantoms", "make_phantoms"]
