"""The number type of the passes."""

import click
import pytest
import torch

from trainer.optim.precision import choose_precision, cpu_has_bf16

CPU = torch.device("cpu")


def test_auto_is_bf16_on_a_cpu_that_has_it_and_float32_elsewhere() -> None:
    assert choose_precision("auto", CPU).name == ("bf16" if cpu_has_bf16() else "fp32")


def test_auto_is_fp16_with_a_scaler_on_a_gpu() -> None:
    assert choose_precision("auto", torch.device("cuda", 0)).name == "fp16"


def test_prefer_bf16_takes_it_on_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, expected in (((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert choose_precision("prefer-bf16", torch.device("cuda", 0)).name == expected
    assert choose_precision("prefer-bf16", CPU) == choose_precision("auto", CPU)


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_product_under_autocast_has_the_chosen_type(name: str, dtype: torch.dtype) -> None:
    precision = choose_precision(name, CPU)
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert not precision.make_scaler().is_enabled()


def test_fp16_on_a_cpu_is_a_usage_error() -> None:
    with pytest.raises(click.UsageError, match="bf16 or fp32"):
        choose_precision("fp16", CPU)
