"""Heat maps show what the network itself says, and leave it as it was."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from eval.heatmaps.gradients import SMOOTHING, heatmaps
from models import Classifier, create_model, freeze

SIZE = 64
EVERY_ARCH = pytest.mark.parametrize("arch", ["custom_cnn", "resnet50", "vit_b_16"])


@pytest.fixture(scope="module")
def models() -> dict[str, Classifier]:
    """One of each arch, newly initialised, with a head that is not zero."""
    made = {}
    for arch in ("custom_cnn", "resnet50", "vit_b_16"):
        torch.manual_seed(0)
        made[arch] = create_model(arch, size=SIZE).eval()
        for parameter in made[arch].head.parameters():
            torch.nn.init.normal_(parameter, mean=0.03, std=0.1)
    return made


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(3, 1, 8, 8, generator=generator)
    return (F.interpolate(coarse, (SIZE, SIZE), mode="bicubic").clip(0, 1) * 255).to(torch.uint8)


def stages_of(model: Classifier) -> list[torch.nn.Module]:
    network = model.network
    return {
        "custom_cnn": lambda: [network.stage2, network.stage3],
        "resnet50": lambda: [network.layer4],
        "vit_b_16": lambda: [network.encoder.layers[-1].ln_1],
    }[model.arch]()


def plain_maps(model: Classifier, images: Tensor, column: int, *, averaged: bool = False) -> np.ndarray:
    """The same by the whole backward pass, one image and one place after the other.

    With `averaged` the gradient is averaged over places first: Grad-CAM.
    """
    kept: list[Tensor] = []
    handles = [
        stage.register_forward_hook(lambda _module, _inputs, output: kept.append(output)) for stage in stages_of(model)
    ]
    logits = model(images)
    for handle in handles:
        handle.remove()
    total = np.zeros((len(images), SIZE, SIZE))
    for activation, gradient in zip(kept, torch.autograd.grad(logits[:, column].sum(), kept), strict=True):
        if averaged:
            gradient = gradient.mean(dim=(2, 3), keepdim=True)
        product = (activation * gradient).detach()
        if product.dim() == 3:
            side = int((product.shape[1] - 1) ** 0.5)
            product = product[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        for number, one in enumerate(product):
            coarse = one.sum(dim=0).clip(min=0)[None, None]
            total[number] += F.interpolate(coarse, (SIZE, SIZE), mode="bilinear")[0, 0].numpy()
    smooth = [
        ndimage.gaussian_filter(one, SMOOTHING * SIZE, mode="nearest", radius=int(np.ceil(3 * SMOOTHING * SIZE)))
        for one in total
    ]
    return np.stack([one / (one.max() or 1) for one in smooth])


@EVERY_ARCH
def test_maps_are_those_of_the_whole_backward_pass(models: dict[str, Classifier], images: Tensor, arch: str) -> None:
    found = heatmaps(models[arch], images, [5, 0])
    assert found.dtype == torch.float32
    assert found.shape == (3, 2, SIZE, SIZE)
    for place, column in enumerate((5, 0)):
        expected = plain_maps(models[arch], images, column)
        np.testing.assert_allclose(found[:, place].numpy(), expected, atol=2e-4)


@EVERY_ARCH
def test_maps_are_not_constant_and_differ_between_images_and_findings(
    models: dict[str, Classifier], images: Tensor, arch: str
) -> None:
    found = heatmaps(models[arch], images, [3, 7])
    assert torch.equal(found.amax(dim=(2, 3)), torch.ones(3, 2))
    assert (found >= 0).all()
    assert (found.std(dim=(2, 3)) > 0.02).all()
    assert (found[0] - found[1]).abs().max() > 0.003
    assert (found[:, 0] - found[:, 1]).abs().max() > 0.05


def test_the_map_of_resnet50_is_its_grad_cam(models: dict[str, Classifier], images: Tensor) -> None:
    expected = plain_maps(models["resnet50"], images, 2, averaged=True)
    np.testing.assert_allclose(heatmaps(models["resnet50"], images, [2])[:, 0].numpy(), expected, atol=2e-4)


def test_the_vit_is_looked_at_where_its_patches_still_count(images: Tensor) -> None:
    # The head as torchvision makes it is zero: no place raises a logit, and the map says so.
    torch.manual_seed(0)
    model = create_model("vit_b_16", size=SIZE)
    assert not heatmaps(model, images, [0]).any()


@pytest.mark.parametrize("arch", ["custom_cnn", "resnet50"])
def test_several_findings_and_images_at_once_give_what_each_gives_alone(
    models: dict[str, Classifier], images: Tensor, arch: str
) -> None:
    together = heatmaps(models[arch], images, [1, 13])
    alone = torch.stack(
        [torch.cat([heatmaps(models[arch], image[None], [column])[0] for column in (1, 13)]) for image in images]
    )
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=0)
    assert heatmaps(models[arch], images, []).shape == (3, 0, SIZE, SIZE)
    assert heatmaps(models[arch], images[:0], [1]).shape == (0, 1, SIZE, SIZE)


@EVERY_ARCH
def test_the_model_is_left_as_it_was(models: dict[str, Classifier], images: Tensor, arch: str) -> None:
    model = models[arch]
    freeze(model, "partial")
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    found = heatmaps(model, images, [0, 1])
    assert not found.requires_grad
    assert torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not module._forward_hooks for module in model.modules())
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    freeze(model, "none")
    torch.testing.assert_close(found, heatmaps(model.eval(), images, [0, 1]))


def test_neither_autocast_nor_inference_mode_around_it_changes_a_map(
    models: dict[str, Classifier], images: Tensor
) -> None:
    expected = heatmaps(models["custom_cnn"], images, [0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(heatmaps(models["custom_cnn"], images, [0]), expected)
    with torch.inference_mode():
        assert torch.equal(heatmaps(models["custom_cnn"], images, [0]), expected)
    with torch.no_grad():
        assert torch.equal(heatmaps(models["custom_cnn"], images, [0]), expected)
        assert not torch.is_grad_enabled()


def test_images_that_the_model_refuses_leave_no_hook_behind(models: dict[str, Classifier]) -> None:
    model = models["custom_cnn"]
    with pytest.raises(ValueError, match="was built for images"):
        heatmaps(model, torch.zeros(1, 1, 32, 32, dtype=torch.uint8), [0])
    assert all(not module._forward_hooks for module in model.modules())
    assert torch.is_grad_enabled()


def test_a_network_that_learned_to_see_squares_points_at_them() -> None:
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    model = create_model("custom_cnn", findings=2, size=SIZE)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def draw(count: int) -> tuple[Tensor, Tensor, np.ndarray]:
        pixels = generator.integers(60, 140, (count, 1, SIZE, SIZE))
        labels = generator.integers(0, 2, (count, 2))
        corners = generator.integers(4, SIZE - 14, (count, 2, 2))
        for number in range(count):
            for kind, (top, left) in enumerate(corners[number]):
                if labels[number, kind]:
                    pixels[number, 0, top : top + 10, left : left + 10] = (230, 10)[kind]
        return torch.from_numpy(pixels.astype(np.uint8)), torch.from_numpy(labels).float(), corners

    for _ in range(40):
        batch, labels, _ = draw(16)
        loss = F.binary_cross_entropy_with_logits(model(batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pictures, labels, corners = draw(64)
    maps = heatmaps(model, pictures, [0, 1]).numpy()
    hits = []
    for number, kind in np.argwhere(labels.numpy() == 1):
        down, across = np.unravel_index(maps[number, kind].argmax(), (SIZE, SIZE))
        top, left = corners[number, kind]
        hits.append(top <= down < top + 10 and left <= across < left + 10)
    assert np.mean(hits) > 0.5  # blindly: 0.024
