"""The registry of architectures: each registers itself under its name.

To add one, write a module beside resnet50.py,

    @register(head="fc", last_stage=("layer4",))
    def my_arch(findings: int, size: int) -> nn.Module:
        ...

import it in models/__init__.py, and add its name to ARCHS in trainer/options.py, which imports no torch (a test holds
the two equal). `models.classifier.Arch` describes the fields; only head and last_stage are required.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from models.classifier import Arch, Classifier

Make = Callable[[int, int], nn.Module]

_archs: dict[str, Arch] = {}


class UnknownArch(ValueError):  # noqa: N818  the name says it
    """A name that no architecture was registered under; the message lists those that were."""


def register(**fields: Any) -> Callable[[Make], Make]:
    """Register the decorated function as the `make` of an arch of its own name; `fields` are the others of `Arch`.

    Raises ValueError where the name is taken.
    """

    def add(make: Make) -> Make:
        name = make.__name__
        if name in _archs:
            raise ValueError(f"arch {name!r} is already registered")
        _archs[name] = Arch(name, make, **fields)
        return make

    return add


def list_models() -> tuple[str, ...]:
    """Return the registered names, sorted."""
    return tuple(sorted(_archs))


def get_arch(name: str) -> Arch:
    """Return the record of an arch; raise UnknownArch where nothing is registered under that name."""
    if name not in _archs:
        raise UnknownArch(f"unknown arch {name!r}; known: {', '.join(list_models())}")
    return _archs[name]


def create_model(name: str, *, findings: int = 14, size: int = 224) -> Classifier:
    """Build a newly initialised float32 model, drawn from torch's global generator.

    It is on torch's default device, in training mode, with every parameter trainable. Convolution weights
    are laid out channels-last, as the activations are: to write them to safetensors, which takes contiguous
    tensors only, call `.contiguous()` on each.

    Args:
        name: one of `list_models()`; another raises UnknownArch.
        findings: the number of logits; ValueError below 1.
        size: height and width of the images in pixels; ValueError where the arch cannot take it.
    """
    arch = get_arch(name)
    if findings < 1:
        raise ValueError(f"a model needs at least 1 finding, got {findings}")
    model = Classifier(arch, arch.make(findings, size), size)
    return model.to(memory_format=torch.channels_last)
