"""The three models, built once: building the large ones is most of what these tests cost."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import models
from models import Classifier

Images = Callable[[int, int], Tensor]


@pytest.fixture(scope="session")
def resnet50() -> Classifier:
    """One ResNet-50 for all tests; each sets the freezing and the mode that it needs."""
    return models.create_model("resnet50")


@pytest.fixture(scope="session")
def vit_b_16() -> Classifier:
    """One ViT-B/16 for all tests, at 32 px, where it has all its blocks and 5 positions."""
    return models.create_model("vit_b_16", size=32)


@pytest.fixture
def custom_cnn() -> Classifier:
    """A custom CNN of the test's own: it is cheap."""
    return models.create_model("custom_cnn", size=32)


@pytest.fixture(params=models.ARCHS)
def model(request: pytest.FixtureRequest) -> Classifier:
    """Each of the three in turn."""
    built: Classifier = request.getfixturevalue(request.param)
    models.freeze(built, "none")
    return built.eval()


@pytest.fixture
def images() -> Images:
    """(number, size) -> seeded uint8 [number, 1, size, size]."""

    def draw(number: int, size: int) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        return torch.randint(0, 256, (number, 1, size, size), dtype=torch.uint8, generator=generator)

    return draw
