"""A frozen model in two parts that are together the model."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import models
from models import Classifier

Images = Callable[[int, int], Tensor]


@pytest.mark.parametrize("how", ["backbone", "partial"])
def test_the_two_parts_are_the_model_to_the_bit_in_both_modes(
    model: Classifier, images: Images, how: str
) -> None:
    models.freeze(model, how)
    seen = images(2, model.size)
    features = models.feature_extractor(model, how)(seen)
    assert not features.requires_grad
    for training in (False, True):
        model.train(training)
        logits = []
        for forward, given in ((model, seen), (models.trainable_head(model, how), features)):
            torch.manual_seed(1)  # of the dropout in the custom CNN's head
            logits.append(forward(given))
        assert torch.equal(*logits)


@pytest.mark.parametrize("how", ["backbone", "partial"])
def test_the_trainable_part_gets_the_gradients_of_the_whole_model(
    custom_cnn: Classifier, images: Images, how: str
) -> None:
    models.freeze(custom_cnn, how)
    custom_cnn.eval()
    seen = images(4, 32)
    part = models.trainable_head(custom_cnn, how)
    gradients = []
    for logits in (custom_cnn(seen), part(models.feature_extractor(custom_cnn, how)(seen))):
        F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, 0.25)).backward()  # type: ignore[no-untyped-call]
        gradients.append([weight.grad for weight in part.parameters()])
        custom_cnn.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_trainable_part_is_the_model_itself_not_a_copy(custom_cnn: Classifier) -> None:
    models.freeze(custom_cnn, "partial")
    part = models.trainable_head(custom_cnn, "partial")
    trained = {id(weight) for weight in custom_cnn.parameters() if weight.requires_grad}
    assert {id(weight) for weight in part.parameters()} == trained
    custom_cnn.train()
    assert all(module.training for module in (*custom_cnn.last_stage, custom_cnn.head))
    part.eval()
    assert not any(module.training for module in (*custom_cnn.last_stage, custom_cnn.head))


def test_the_frozen_part_leaves_the_model_usable(custom_cnn: Classifier, images: Images) -> None:
    models.freeze(custom_cnn, "backbone")
    custom_cnn.eval()
    before = custom_cnn(images(2, 32))
    models.feature_extractor(custom_cnn, "backbone")(images(2, 32))
    assert torch.equal(custom_cnn(images(2, 32)), before)


def test_a_model_that_is_frozen_as_a_whole_can_be_cut(custom_cnn: Classifier, images: Images) -> None:
    custom_cnn.requires_grad_(False).eval()
    for how in ("backbone", "partial"):
        features = models.feature_extractor(custom_cnn, how)(images(2, 32))
        assert torch.equal(models.trainable_head(custom_cnn, how)(features), custom_cnn(images(2, 32)))


@pytest.mark.parametrize("cut", [models.feature_extractor, models.trainable_head])
@pytest.mark.parametrize(
    ("frozen", "how", "message"),
    [
        ("none", "none", "'none' leaves no frozen part"),
        ("none", "backbone", "not frozen as 'backbone'"),
        ("partial", "backbone", "not frozen as 'backbone'"),
        ("backbone", "partial", r"call freeze\(model, 'partial'\) first"),
    ],
)
def test_a_model_that_is_not_frozen_so_is_refused(
    custom_cnn: Classifier, cut: Callable[[Classifier, str], object], frozen: str, how: str, message: str
) -> None:
    models.freeze(custom_cnn, frozen)
    with pytest.raises(ValueError, match=message):
        cut(custom_cnn, how)
