"""What all models have in common: gray bytes in, one logit a finding out, and parts known by name."""

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
    """One architecture and the names of its parts, which freezing, loading and heat maps go by."""

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
    """What stands between the last stage and the head, without parameters: submodules by name, or modules
    for what the network does itself. Last stage, pooling and head in a row end the network's forward pass."""

    imagenet: WeightsEnum | None = None
    """torchvision's published weights, if there are any."""

    convert_state_dict: Callable[[State, int], State] | None = None
    """(a file's state, size in pixels) -> the same in today's names and at this size."""


class Classifier(nn.Module):
    """GrayInput, then the network of one arch. Built by `models.build`.

    State-dict keys are the network's own (torchvision's, where it is torchvision's) behind `network.`.
    """

    def __init__(self, record: Arch, network: nn.Module, size: int) -> None:
        super().__init__()
        self.record = record
        self.arch = record.name
        self.size = size
        self.input = GrayInput()
        self.network = network

    @property
    def head(self) -> nn.Module:
        """The last module: features [N, F] to logits [N, findings]."""
        return self.network.get_submodule(self.record.head)

    @property
    def last_stage(self) -> tuple[nn.Module, ...]:
        """The modules just before the head, in the order they are called."""
        return tuple(self.network.get_submodule(name) for name in self.record.last_stage)

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
        """Set training mode, except where every parameter is frozen: there evaluation mode stays.

        So frozen batch norms keep their running statistics and frozen dropout drops nothing.
        """
        super().train(mode)
        if mode:
            _keep_frozen_still(self)
        return self


def _keep_frozen_still(module: nn.Module) -> None:
    """Put the largest submodules that have parameters, none of them trainable, in evaluation mode."""
    for child in module.children():
        trainable = [parameter.requires_grad for parameter in child.parameters()]
        if trainable and not any(trainable):
            child.eval()
        else:
            _keep_frozen_still(child)
