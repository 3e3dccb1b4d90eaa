"""The device of the tests in this folder: the first GPU, or the CPU when they are rehearsed there."""

import pytest
import torch

from tests.conftest import GPU


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu") if GPU == "cpu" else torch.device("cuda", 0)
