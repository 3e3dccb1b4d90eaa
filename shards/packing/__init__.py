"""An NIH tree becomes a shard folder: planned by patient, packed in parallel, resumed after a kill."""

from shards.packing.assembly import pack
from shards.packing.planning import Plan, SplitRecipe, make_plan

__all__ = ["Plan", "SplitRecipe", "make_plan", "pack"]
