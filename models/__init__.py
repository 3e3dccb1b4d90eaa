"""The architectures, all fed raw gray bytes; imports no other package of this project."""

from models import custom_cnn, resnet50, vit_b_16
from models.classifier import Arch, Classifier
from models.cutting import frozen_part, trainable_part
from models.freezing import FREEZES, freeze, parameter_counts
from models.input import GrayInput
from models.registry import UnknownArch, build, find_arch, known_archs
from models.weights import WeightsUnavailable, has_imagenet_weights, load_weights

ARCHS = known_archs()
"""The names that `build` knows, sorted. Complete here, since the imports above register them."""

__all__ = [
    "ARCHS",
    "FREEZES",
    "Arch",
    "Classifier",
    "GrayInput",
    "UnknownArch",
    "WeightsUnavailable",
    "build",
    "custom_cnn",
    "find_arch",
    "freeze",
    "frozen_part",
    "has_imagenet_weights",
    "known_archs",
    "load_weights",
    "parameter_counts",
    "resnet50",
    "trainable_part",
    "vit_b_16",
]
