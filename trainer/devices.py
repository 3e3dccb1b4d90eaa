"""The device a command runs on, from its option."""

from typing import TYPE_CHECKING

import click

from shards.errors import ResourceMissing

if TYPE_CHECKING:  # the names of devices are known without it
    import torch

DEVICE_CHOICES = "auto|cpu|cuda|cuda:N"


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
