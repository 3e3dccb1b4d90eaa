"""The moving average of the weights."""

import pytest
import torch

from models import create_model, freeze
from trainer.optim.ema import EMA


def test_the_average_follows_its_formula_and_starts_fast() -> None:
    model = create_model("custom_cnn", size=16)
    average = EMA(model, 0.9)
    expected = {key: value.double().clone() for key, value in model.state_dict().items()}
    for step in range(1, 4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
            model.network.stage1.norm.running_mean += step
            model.network.stage1.norm.num_batches_tracked += 1
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        for key, value in model.state_dict().items():
            expected[key] = decay * expected[key] + (1 - decay) * value
    found = average.model.state_dict()
    for key, value in expected.items():
        if found[key].is_floating_point():
            assert torch.allclose(found[key].double(), value, rtol=1e-5, atol=1e-6)
    assert int(found["network.stage1.norm.num_batches_tracked"]) == 3


def test_the_average_is_a_model_in_evaluation_mode_that_nothing_trains() -> None:
    model = create_model("custom_cnn", size=16).train()
    average = EMA(model, 0.99)
    images = torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8)
    assert torch.equal(average.model(images), model.eval()(images))
    assert not any(parameter.requires_grad for parameter in average.model.parameters())
    assert not any(module.training for module in average.model.modules())


def test_a_restored_average_goes_on() -> None:
    model = create_model("custom_cnn", size=16)
    first, second = EMA(model, 0.5), EMA(create_model("custom_cnn", size=16), 0.5)
    with torch.no_grad():
        model.network.stage1.conv.weight.add_(1)
    first.update(100)
    second.model.load_state_dict(first.model.state_dict())
    # Its own source is the other model, which has other weights.
    second.update(1)
    assert first.model.state_dict().keys() == second.model.state_dict().keys()
    assert second.model.state_dict()["network.stage1.conv.weight"] != pytest.approx(
        first.model.state_dict()["network.stage1.conv.weight"]
    )


def test_what_is_frozen_is_shared_and_only_the_rest_averaged() -> None:
    model = create_model("custom_cnn", size=16)
    freeze(model, "partial")
    average = EMA(model, 0.5)
    theirs, before = model.state_dict(), {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for value in theirs.values():
            value += 1  # what is frozen does not change in truth; here it shows that it is the same memory
    average.update(100)
    for key, value in average.model.state_dict().items():
        frozen = not key.startswith(("network.stage3", "network.head"))
        assert (value.data_ptr() == theirs[key].data_ptr()) is frozen
        if not frozen and value.is_floating_point():
            assert torch.allclose(value, before[key] + 0.5, atol=1e-6)
