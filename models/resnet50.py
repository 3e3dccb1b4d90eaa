"""ResNet-50 as torchvision has it, with one logit per finding."""

import torchvision
from torch import nn
from torchvision.models import ResNet50_Weights

from models.registry import register


@register(head="fc", last_stage=("layer4",), pooling=("avgpool", nn.Flatten()), imagenet=ResNet50_Weights.IMAGENET1K_V2)
def resnet50(findings: int, size: int) -> nn.Module:
    """Make the network of He et al., Deep Residual Learning for Image Recognition, arXiv:1512.03385.

    Any size from 32 px, below which its five halvings leave nothing.
    """
    if size < 32:
        raise ValueError(f"resnet50 takes images of at least 32 px, got {size}")
    network: nn.Module = torchvision.models.resnet50(num_classes=findings)
    return network
