"""Pack an NIH tree into a shard folder: plan by patient, write in parallel, resume after a kill."""

from shards.packing.assembly import pack
from shards.packing.planning import Plan, SplitRecipe, make_plan

__all__ = ["Plan", "SplitRecipe", "make_plan", "pack"]
