"""The device and the rank of this process, from its option and torchrun's variables. Importing it imports no torch."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from shards.errors import ResourceMissing

if TYPE_CHECKING:  # the names of devices are known without it
    import torch

DEVICE_CHOICES = "auto|cpu|cuda|cuda:N"
_MOST_RANKS = 2**20
# Parameters of glibc's mallopt(3), from malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def choose_device(name: str) -> "torch.device":
    """Resolve `auto` to the first GPU, or to the CPU where torch can use none.

    Raises UsageError for any other kind of device, ResourceMissing for a GPU that is not there.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise click.UsageError(f"--device {name!r} is none of {DEVICE_CHOICES.replace('|', ', ')}")
    if kind == "cpu":
        return torch.device("cpu")
    index = int(number or 0)
    if index >= torch.cuda.device_count():
        raise ResourceMissing(f"--device {name}: torch finds {torch.cuda.device_count()} GPUs on this machine")
    return torch.device("cuda", index)


def use_device(name: str) -> "torch.device":
    """Resolve the option as `choose_device` does, and set this process up for it; the errors are the same.

    A GPU becomes the current device, on which kernels, streams and libraries work that are not told another. For a CPU
    the process keeps the memory that it frees.
    """
    import torch

    device = choose_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        _keep_freed_memory()
    return device


def _keep_freed_memory() -> None:
    """Have malloc reuse freed memory of any size, up to 2 GiB of it, instead of giving it back to the kernel.

    glibc gives blocks of more than 32 MB back at once. A step's activations are such blocks: taken anew page by page in
    every step, they cost custom_cnn two fifths of its time. In return it holds more memory,
    36 % for custom_cnn, 16 % for resnet50 and 29 % for vit_b_16. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def rank_from_env() -> tuple[int, int, int]:
    """Return rank, number of ranks, and rank on this machine, as torchrun sets them; 0, 1, 0 without it.

    Raises UsageError naming the variable that is not a whole number in its range.
    """
    if not all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return 0, 1, 0
    size = _number("WORLD_SIZE", 1, _MOST_RANKS)
    return _number("RANK", 0, size - 1), size, _number("LOCAL_RANK", 0, size - 1)


def ranks_of_machine() -> int:
    """Return how many ranks torchrun started on this machine, 1 without it; UsageError for what it never sets."""
    return _number("LOCAL_WORLD_SIZE", 1, _MOST_RANKS) if "LOCAL_WORLD_SIZE" in os.environ else 1


def _number(name: str, least: int, most: int) -> int:
    text = os.environ[name]
    if not (text.isdecimal() and len(text) < 19 and least <= int(text) <= most):
        raise click.UsageError(
            f"the environment variable {name}, which torchrun sets, is {text!r}: not a whole number from "
            f"{least} to {most}"
        )
    return int(text)


@contextmanager
def only_rank_zero_complains(rank: int) -> Iterator[None]:
    """Let the other ranks exit quietly if all find the same error, before they have joined.

    They exit with code 0: at another one torchrun would end rank 0, maybe before it has printed the error.
    """
    try:
        yield
    except click.ClickException as error:
        if rank == 0:
            raise
        raise SystemExit(0) from error
