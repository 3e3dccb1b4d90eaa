"""The model class: gray bytes in, one logit a finding out, submodules known by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn
from torchvision.models import WeightsEnum

from models.input import GrayInput

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
    """Between the last stage and the head, without parameters: submodules by name, or modules for what the
    network does itself. Last stage, pooling and head in sequence end the network's forward pass."""

    heatmap_layers: tuple[str, ...] = ()
    """The submodules whose outputs, [N, C, H, W] or [N, 1 + H * W, C], heat maps are computed from, in the
    order they are called; none named: the first of the last stage."""

    imagenet: WeightsEnum | None = None
    """torchvision's published weights, if there are any."""

    convert_state_dict: Callable[[State, int], State] | None = None
    """(state dict of a file, size in pixels) -> the same with current names and at this size."""


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
        """Classify raw gray images.

        Args:
            images: uint8 [N, 1, size, size], 0..255, on the model's device.

        Returns:
            Logits [N, findings]: float32, or the autocast type where autocast is on.

        Raises:
            TypeError: the images are not uint8.
            ValueError: the images are not [N, 1, size, size].
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
