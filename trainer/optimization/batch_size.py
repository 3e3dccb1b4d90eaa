"""`--batch-size auto`: the largest power of two whose step fits the GPU."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:  # options are read before it is imported
    import torch

AUTO = 0
"""What stands for `auto` until it is resolved."""
ON_CPU = 64
"""The report's, and enough to keep a CPU busy."""
LARGEST = 4096
"""That auto tries."""
_MOST = 2**20  # more than there are features in NIH's train split, mirrors counted
# Of the GPU's memory; the rest is for the loader's decoder and for fragmentation.
_USABLE = 0.9


def parse_batch_size(text: str | int) -> int:
    """Return the option's value: a positive whole number, or AUTO for `auto`; else BadParameter."""
    if text == "auto":
        return AUTO
    return int(click.IntRange(1, _MOST)(text))


def largest_power_of_two(fits: Callable[[int], bool], at_most: int) -> int:
    """Return the largest power of two up to `at_most` that `fits`, doubling from 1; 0 where none does."""
    found, size = 0, 1
    while size <= at_most and fits(size):
        found, size = size, 2 * size
    return found


def fits_gpu(
    try_step: Callable[[int], None], device: "torch.device", share: float = 1.0
) -> Callable[[int], bool]:
    """Return a test of whether a step of so many images stays within nine tenths of the GPU's memory.

    With a share, of that share of it.
    """
    import torch

    usable = _USABLE * share * torch.cuda.mem_get_info(device)[1]

    def fits(images: int) -> bool:
        torch.cuda.reset_peak_memory_stats(device)
        try:
            try_step(images)
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()
        return torch.cuda.max_memory_reserved(device) <= usable

    return fits
