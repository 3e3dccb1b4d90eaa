import pytest
import torch
from torch import Tensor

from models import GrayInput

MEAN = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(1, 3, 1, 1)


def every_byte() -> Tensor:
    return torch.arange(2 * 256, dtype=torch.int64).remainder(256).to(torch.uint8).view(2, 1, 16, 16)


def by_the_formula(images: Tensor) -> Tensor:
    return (images.double() / 255 - MEAN) / STD


def test_every_byte_comes_out_as_the_formula_says() -> None:
    images = every_byte()
    got = GrayInput()(images)
    assert got.dtype == torch.float32
    assert torch.equal(got, by_the_formula(images).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_output_has_the_autocast_type_and_the_same_values(dtype: torch.dtype) -> None:
    images = every_byte()
    with torch.autocast("cpu", dtype=dtype):
        got = GrayInput()(images)
    assert got.dtype == dtype
    assert torch.equal(got, by_the_formula(images).float().to(dtype))


def test_autocast_for_another_device_or_switched_off_changes_nothing() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert GrayInput()(every_byte()).dtype == torch.float32


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("number", [1, 2])
def test_the_output_is_channels_last_from_any_layout(layout: torch.memory_format, number: int) -> None:
    got = GrayInput()(every_byte()[:number].contiguous(memory_format=layout))
    assert got.shape == (number, 3, 16, 16)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_it_adds_nothing_to_the_state_dict_and_has_no_parameters() -> None:
    assert not GrayInput().state_dict()
    assert not list(GrayInput().parameters())


def test_pixels_that_are_not_bytes_are_refused() -> None:
    with pytest.raises(TypeError, match=r"uint8.*float32"):
        GrayInput()(every_byte().float() / 255)


@pytest.mark.parametrize("shape", [(16, 16), (1, 16, 16), (2, 3, 16, 16)])
def test_shapes_that_are_not_gray_batches_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[N, 1, H, W\], got"):
        GrayInput()(torch.zeros(shape, dtype=torch.uint8))


def test_it_exports_with_a_free_batch_size() -> None:
    free = {0: torch.export.Dim("n", min=1, max=64)}
    exported = torch.export.export(GrayInput(), (every_byte(),), dynamic_shapes=(free,))
    more = every_byte().repeat(3, 1, 1, 1)
    assert torch.equal(exported.module()(more), GrayInput()(more))


def test_it_is_one_graph_under_dynamo_with_and_without_autocast() -> None:
    gray = GrayInput()
    # The eager backend traces as inductor does, and needs no C++ compiler.
    traced = torch.compile(gray, fullgraph=True, backend="eager")
    assert torch.equal(traced(every_byte()), gray(every_byte()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(traced(every_byte()), gray(every_byte()))
