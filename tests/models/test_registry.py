from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

import models
from models import Classifier
from models.registry import register

Images = Callable[[int, int], Tensor]


def test_the_three_archs_are_known_by_name_in_order() -> None:
    assert models.ARCHS == ("custom_cnn", "resnet50", "vit_b_16")


def test_an_unknown_arch_is_refused_with_the_known_ones() -> None:
    with pytest.raises(models.UnknownArch, match="'resnet51'; known: custom_cnn, resnet50, vit_b_16"):
        models.create_model("resnet51")
    with pytest.raises(ValueError, match="unknown arch"):
        models.has_imagenet_weights("")


def test_a_name_is_registered_once() -> None:
    def resnet50(findings: int, size: int) -> nn.Module:
        return nn.Identity()

    with pytest.raises(ValueError, match="'resnet50' is already registered"):
        register(head="fc", last_stage=())(resnet50)
    assert models.get_arch("resnet50").last_stage == ("layer4",)


@pytest.mark.parametrize(
    ("arch", "size", "rule"),
    [
        ("vit_b_16", 225, "multiple of 16"),
        ("vit_b_16", 0, "multiple of 16"),
        ("resnet50", 31, "at least 32"),
        ("custom_cnn", 7, "at least 8"),
    ],
)
def test_a_size_that_an_arch_cannot_take_is_refused_with_the_rule(arch: str, size: int, rule: str) -> None:
    with pytest.raises(ValueError, match=f"{arch}.*{rule}.*got {size}"):
        models.create_model(arch, size=size)


def test_a_model_without_findings_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 finding"):
        models.create_model("custom_cnn", findings=0)


def test_every_model_gives_one_logit_a_finding_and_knows_its_arch_and_size(model: Classifier, images: Images) -> None:
    with torch.inference_mode():
        logits = model(images(2, model.size))
    assert logits.shape == (2, 14)
    assert logits.dtype == torch.float32
    assert model.arch in models.ARCHS


def test_logits_are_the_same_every_time_in_evaluation(model: Classifier, images: Images) -> None:
    with torch.inference_mode():
        assert torch.equal(model(images(2, model.size)), model(images(2, model.size)))


def test_logits_have_the_autocast_type(custom_cnn: Classifier, images: Images) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert custom_cnn(images(2, 32)).dtype == torch.bfloat16


def test_the_same_seed_builds_the_same_model() -> None:
    built = []
    for _ in range(2):
        torch.manual_seed(3)
        built.append(models.create_model("custom_cnn").state_dict())
    assert all(torch.equal(built[0][name], built[1][name]) for name in built[0])


def test_images_of_another_size_than_the_model_was_built_for_are_refused(
    custom_cnn: Classifier, images: Images
) -> None:
    with pytest.raises(ValueError, match=r"\[N, 1, 32, 32\], got \[2, 1, 48, 48\]"):
        custom_cnn(images(2, 48))


def test_the_head_takes_the_features_last_and_gives_the_logits(model: Classifier, images: Images) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        seen.append((args[0], output))

    hook = model.head.register_forward_hook(note)
    with torch.inference_mode():
        logits = model(images(2, model.size))
    hook.remove()
    ((features, output),) = seen
    assert features.dim() == 2 and features.shape[0] == 2
    assert output is logits


def test_state_dict_keys_are_the_networks_own_behind_one_prefix(resnet50: Classifier) -> None:
    with torch.device("meta"):
        theirs = torchvision.models.resnet50(num_classes=14).state_dict()
    assert [name.removeprefix("network.") for name in resnet50.state_dict()] == list(theirs)
    assert all(name.startswith("network.") for name in resnet50.state_dict())


def test_convolution_weights_are_channels_last(model: Classifier) -> None:
    assert all(
        weight.is_contiguous(memory_format=torch.channels_last) for weight in model.parameters() if weight.dim() == 4
    )


def test_the_custom_cnn_pools_its_third_stage_to_128_by_7_by_7(images: Images) -> None:
    model = models.create_model("custom_cnn").eval()
    shapes: list[tuple[int, ...]] = []

    def note(_: nn.Module, __: tuple[Tensor], output: Tensor) -> None:
        shapes.append(tuple(output.shape[1:]))

    for name in ("stage1", "stage2", "stage3", "pool", "head.hidden", "head.output"):
        model.network.get_submodule(name).register_forward_hook(note)
    with torch.inference_mode():
        model(images(1, 224))
    assert shapes == [(32, 112, 112), (64, 56, 56), (128, 28, 28), (128, 7, 7), (512,), (14,)]
