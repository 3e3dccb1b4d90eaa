"""The model class: gray bytes in, normalised, one logit per finding out; submodules known by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import WeightsEnum

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Per RGB channel, in units of 0..1: what torchvision's published weights were trained with."""

State: TypeAlias = dict[str, Tensor]
"""A state dict of a network: plain names, without the prefix `network.`."""


@dataclass(frozen=True)
class Arch:
    """One architecture, and the submodules that freezing, loading and heat maps use."""

    name: str
    """What the command line calls it."""

    make: Callable[[int, int], nn.Module]
    """(findings, size in pixels) -> a newly initialised network; ValueError for a size it cannot take."""

    head: str
    """The submodule that is called last and once: features [N, F] in, logits [N, findings] out. The
    network before it never looks at the number of findings."""

    last_stage: tuple[str, ...]
    """The submodules between the rest of the backbone and the head, in the order they are called."""

    pooling: tuple[str | nn.Module, ...] = ()
    """Parameter-free steps between the last stage and the head: the name of a submodule, or a module that repeats
    what the network's forward() does inline, such as flattening. Last stage, pooling and head in sequence are the end
    of the forward pass."""

    heatmap_layers: tuple[str, ...] = ()
    """The submodules whose outputs, [N, C, H, W] or [N, 1 + H * W, C], heat maps are computed from, in the
    order they are called; none named: the first of the last stage."""

    imagenet: WeightsEnum | None = None
    """torchvision's published weights, if there are any."""

    convert_state_dict: Callable[[State, int], State] | None = None
    """(state dict of a file, size in pixels) -> the same with current names and at this size."""


class GrayInput(nn.Module):
    """Gray bytes to the normalised three-channel image that the architectures expect.

    The first module of every model, so that a saved model cannot be fed wrongly. A byte has 256 values, so
    normalising is looking up one row of a [256, 3] table: correctly rounded, and one pass that writes
    channels-last by itself. Eager, a batch of 32 at 224 px on two cores takes 1.6 ms in float32 or bfloat16;
    arithmetic in float32 takes 2.2 to 3.5 ms, a 1x1 convolution 4.7 ms and more (Xeon with AMX, torch 2.15).

    The table is not in the state dict, whose keys are those of the architecture alone.
    """

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        gray = torch.arange(256, dtype=torch.float64).div(255).unsqueeze(1)
        mean = torch.tensor(IMAGENET_MEAN, dtype=torch.float64)
        std = torch.tensor(IMAGENET_STD, dtype=torch.float64)
        self.register_buffer("table", ((gray - mean) / std).float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalise uint8 [N, 1, H, W], 0 black and 255 white, of any memory format.

        Channel c of the result, [N, 3, H, W] and channels-last, is (images / 255 - mean[c]) / std[c], in the
        autocast type where autocast is on for the images' device, else in float32 (or the type that the
        whole model was cast to). Raises TypeError for another dtype, ValueError for another shape.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"expected raw gray images as uint8 (0..255), got {images.dtype}")
        if images.dim() != 4 or images.shape[1] != 1:
            raise ValueError(f"expected gray images of shape [N, 1, H, W], got {list(images.shape)}")
        table = self.table
        device = images.device.type
        if torch.is_autocast_enabled(device):
            table = table.to(torch.get_autocast_dtype(device))
        # int32, because uint8 cannot index and int64 costs three times as much.
        return F.embedding(images[:, 0].int(), table).permute(0, 3, 1, 2)


class Classifier(nn.Module):
    """GrayInput, then the network of one arch. Built by `models.create_model`.

    State-dict keys are the network's own (torchvision's, where it is torchvision's) behind `network.`.
    """

    def __init__(self, arch_spec: Arch, network: nn.Module, size: int) -> None:
        super().__init__()
        self.arch_spec = arch_spec
        self.arch = arch_spec.name
        self.size = size
        self.input = GrayInput()
        self.network = network

    @property
    def head(self) -> nn.Module:
        """The last module: features [N, F] to logits [N, findings]."""
        return self.network.get_submodule(self.arch_spec.head)

    @property
    def last_stage(self) -> tuple[nn.Module, ...]:
        """The modules just before the head, in the order they are called."""
        return tuple(self.network.get_submodule(name) for name in self.arch_spec.last_stage)

    @property
    def heatmap_layers(self) -> tuple[nn.Module, ...]:
        """The modules whose outputs heat maps are computed from, in the order they are called."""
        names = self.arch_spec.heatmap_layers or self.arch_spec.last_stage[:1]
        return tuple(self.network.get_submodule(name) for name in names)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [N, findings], float32 or the autocast type, of uint8 [N, 1, size, size], 0..255.

        Raises TypeError for another dtype, ValueError for another shape.
        """
        if images.shape[1:] != (1, self.size, self.size):
            raise ValueError(
                f"{self.arch} was built for images [N, 1, {self.size}, {self.size}], got {list(images.shape)}"
            )
        logits: Tensor = self.network(self.input(images))
        return logits

    def train(self, mode: bool = True) -> "Classifier":
        """Set training mode; submodules whose parameters are all frozen stay in evaluation mode.

        So frozen batch norms keep their running statistics and frozen dropout drops nothing.
        """
        super().train(mode)
        if mode:
            _eval_frozen(self)
        return self


def _eval_frozen(module: nn.Module) -> None:
    """Put the largest submodules that have parameters, none of them trainable, in evaluation mode."""
    for child in module.children():
        trainable = [parameter.requires_grad for parameter in child.parameters()]
        if trainable and not any(trainable):
            child.eval()
        else:
            _eval_frozen(child)
