from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import models
from models import Classifier

Images = Callable[[int, int], Tensor]


def still_parts(model: Classifier) -> dict[str, Tensor]:
    """Everything a frozen model must not change: frozen parameters and statistics beside them."""
    trained = {name.rpartition(".")[0] for name, weight in model.named_parameters() if weight.requires_grad}
    return {
        name: tensor.clone() for name, tensor in model.state_dict().items() if name.rpartition(".")[0] not in trained
    }


def train_a_step(model: Classifier, images: Tensor) -> None:
    logits = model.train()(images)
    F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, 0.25)).backward()  # type: ignore[no-untyped-call]
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    torch.optim.SGD(trainable, lr=0.1).step()


@pytest.mark.parametrize(("how", "trainable"), [("none", 23_536_718), ("partial", 14_993_422), ("backbone", 28_686)])
def test_resnet50_has_the_published_trainable_counts(resnet50: Classifier, how: str, trainable: int) -> None:
    models.freeze(resnet50, how)
    assert models.parameter_counts(resnet50) == (trainable, 23_536_718)


# The last block of a ViT-B has 7,087,872 parameters, the final layer norm 1,536.
@pytest.mark.parametrize(("how", "trainable"), [("none", 85_809_422), ("partial", 7_100_174), ("backbone", 10_766)])
def test_vit_b_16_has_the_published_trainable_counts(how: str, trainable: int) -> None:
    with torch.device("meta"):
        model = models.create_model("vit_b_16")
    models.freeze(model, how)
    assert models.parameter_counts(model) == (trainable, 85_809_422)


@pytest.mark.parametrize(("how", "trainable"), [("none", 3_312_430), ("partial", 3_292_942), ("backbone", 3_218_958)])
def test_the_custom_cnn_has_its_trainable_counts(custom_cnn: Classifier, how: str, trainable: int) -> None:
    models.freeze(custom_cnn, how)
    assert models.parameter_counts(custom_cnn) == (trainable, 3_312_430)


@pytest.mark.parametrize("how", ["partial", "backbone"])
def test_a_training_step_moves_what_is_trainable_and_nothing_else(
    custom_cnn: Classifier, images: Images, how: str
) -> None:
    models.freeze(custom_cnn, how)
    still = still_parts(custom_cnn)
    before = {name: weight.detach().clone() for name, weight in custom_cnn.named_parameters()}
    train_a_step(custom_cnn, images(4, 32))
    after = custom_cnn.state_dict()
    assert any(name.endswith("running_mean") for name in still)
    assert all(torch.equal(after[name], tensor) for name, tensor in still.items())
    for name, weight in custom_cnn.named_parameters():
        assert (weight.grad is not None) == weight.requires_grad, name
        if weight.requires_grad:
            assert not torch.equal(weight, before[name]), name


def test_frozen_batch_norms_of_resnet50_keep_their_statistics(resnet50: Classifier, images: Images) -> None:
    models.freeze(resnet50, "backbone")
    still = {name: tensor.clone() for name, tensor in resnet50.named_buffers()}
    with torch.no_grad():
        resnet50.train()(images(2, 224))
    assert all(torch.equal(tensor, still[name]) for name, tensor in resnet50.named_buffers())


def test_trained_batch_norms_follow_their_batches(custom_cnn: Classifier, images: Images) -> None:
    models.freeze(custom_cnn, "partial")
    norm = custom_cnn.network.get_submodule("stage3.norm")
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
    before = norm.running_mean.clone()
    custom_cnn.train()(images(4, 32))
    assert not torch.equal(norm.running_mean, before)


def test_training_mode_reaches_only_what_is_trained(model: Classifier) -> None:
    models.freeze(model, "backbone")
    model.train()
    assert model.training and model.head.training
    assert not any(part.training for last in model.last_stage for part in last.modules())
    models.freeze(model, "partial")
    assert all(part.training for last in model.last_stage for part in last.modules())
    models.freeze(model, "none")
    assert all(part.training for part in model.modules())
    assert not any(part.training for part in model.eval().modules())


def test_freezing_leaves_a_model_in_evaluation_there(custom_cnn: Classifier) -> None:
    models.freeze(custom_cnn.eval(), "partial")
    assert not any(part.training for part in custom_cnn.modules())


def test_dropout_of_the_head_works_while_the_backbone_is_frozen(custom_cnn: Classifier, images: Images) -> None:
    models.freeze(custom_cnn, "backbone")
    custom_cnn.train()
    with torch.no_grad():
        assert not torch.equal(custom_cnn(images(2, 32)), custom_cnn(images(2, 32)))


def test_an_unknown_freeze_is_refused_with_the_known_ones(custom_cnn: Classifier) -> None:
    with pytest.raises(ValueError, match="'all'; known: none, partial, backbone"):
        models.freeze(custom_cnn, "all")


@pytest.mark.parametrize("how", ["backbone", "partial"])
def test_the_two_parts_are_the_model_to_the_bit_in_both_modes(model: Classifier, images: Images, how: str) -> None:
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
