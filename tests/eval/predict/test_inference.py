"""A model is scored in float32 without TF32, and training's settings are as they were afterwards."""

from collections.abc import Iterator

import pytest
import torch

from eval.heatmaps.gradients import heatmaps
from eval.predict.inference import full_precision, predict
from models import Classifier, create_model
from shards.folder import ShardFolder

Settings = tuple[str, bool, bool]
CPU = torch.device("cpu")
EXACT, FAST = ("highest", False, False), ("high", True, True)


def settings() -> Settings:
    """Of products of matrices, twice, and of convolutions; the same on a machine without a GPU."""
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
    )


@pytest.fixture
def fast() -> Iterator[None]:
    """As training leaves them on a GPU."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = convolutions


def watched() -> tuple[Classifier, set[Settings]]:
    """A model, and the settings under which it ran."""
    model, seen = create_model("custom_cnn", size=64), set[Settings]()
    model.register_forward_pre_hook(lambda _module, _inputs: seen.add(settings()))
    return model, seen


@pytest.mark.usefixtures("fast")
def test_predictions_are_made_without_tf32(phantom_shards: ShardFolder) -> None:
    model, seen = watched()
    predict(model, phantom_shards, "val", CPU, 16)
    assert seen == {EXACT}
    assert settings() == FAST


@pytest.mark.usefixtures("fast")
def test_heat_maps_are_made_without_tf32() -> None:
    model, seen = watched()
    heatmaps(model, torch.zeros(1, 1, 64, 64, dtype=torch.uint8), [0])
    assert seen == {EXACT}
    assert settings() == FAST


@pytest.mark.usefixtures("fast")
def test_the_settings_come_back_after_an_error() -> None:
    with pytest.raises(KeyError), full_precision():
        raise KeyError
    assert settings() == FAST
