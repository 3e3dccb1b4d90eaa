"""The architectures, all fed raw gray bytes; imports no other package of this project."""

from models import custom_cnn, resnet50, vit_b_16
from models.classifier import Arch, Classifier, GrayInput
from models.freezing import FREEZES, feature_extractor, freeze, parameter_counts, trainable_head
from models.registry import UnknownArch, create_model, get_arch, list_models
from models.weights import WeightsUnavailable, has_imagenet_weights, load_weights

ARCHS = list_models()
"""The names that `create_model` knows, sorted. Complete here, since the imports above register them."""

__all__ = [
    "ARCHS",
    "FREEZES",
    "Arch",
    "Classifier",
    "GrayInput",
    "UnknownArch",
    "WeightsUnavailable",
    "create_model",
    "custom_cnn",
    "feature_extractor",
    "freeze",
    "get_arch",
    "has_imagenet_weights",
    "list_models",
    "load_weights",
    "parameter_counts",
    "resnet50",
    "trainable_head",
    "vit_b_16",
]
