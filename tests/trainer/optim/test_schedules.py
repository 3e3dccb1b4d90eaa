"""Learning rates against torch's own schedulers, and at their ends."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.optim.optimizers import SCHEDULES, LearningRate


def learning_rates(schedule: str, lr: float, steps: int, warmup: int) -> list[float]:
    rates: list[float] = LearningRate(schedule, lr, steps, warmup)(torch.arange(steps)).tolist()
    return rates


def of_torch(make: "type[torch.optim.lr_scheduler.LRScheduler]", steps: int, **options: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = make(optimizer, **options)
    rates = []
    for _ in range(steps):
        rates.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.step() if len(rates) < steps else None
    return rates


@pytest.mark.parametrize("steps", [10, 37, 100])
def test_onecycle_is_torchs(steps: int) -> None:
    expected = of_torch(torch.optim.lr_scheduler.OneCycleLR, steps, max_lr=0.5, total_steps=steps)
    assert learning_rates("onecycle", 0.5, steps, 0) == pytest.approx(expected, rel=1e-9)


def test_the_rise_of_onecycle_can_be_given() -> None:
    expected = of_torch(torch.optim.lr_scheduler.OneCycleLR, 50, max_lr=0.5, total_steps=50, pct_start=0.1)
    assert learning_rates("onecycle", 0.5, 50, 5) == pytest.approx(expected, rel=1e-9)


def test_cosine_is_torchs() -> None:
    expected = of_torch(torch.optim.lr_scheduler.CosineAnnealingLR, 20, T_max=20)
    assert learning_rates("cosine", 0.5, 20, 0) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_warm_up_rises_evenly_to_the_highest_rate(schedule: str) -> None:
    rates = learning_rates(schedule, 1.0, 20, 4)
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])


@given(st.sampled_from(list(SCHEDULES)), st.integers(1, 300), st.floats(0, 0.99))
def test_every_rate_is_above_zero_and_not_above_the_highest(schedule: str, steps: int, warm: float) -> None:
    rates = learning_rates(schedule, 2.0, steps, round(warm * steps))
    assert len(rates) == steps
    assert all(0 < rate <= 2.0 + 1e-12 for rate in rates)


def test_a_rate_of_a_billion_steps_is_computed_when_it_is_needed() -> None:
    rate = LearningRate("cosine", 1.0, 10**9, 0)
    assert float(rate(torch.tensor(5 * 10**8))) == pytest.approx(0.5)
    assert float(rate(torch.tensor(10**10))) == float(rate(torch.tensor(10**9 - 1)))
