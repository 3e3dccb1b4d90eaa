"""One optimizer step: groups of batches, clipping, schedules, overflow, and the first bad step."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from trainer.optim.losses import FindingLoss
from trainer.optim.optimizers import OPTIMIZERS, make_optimizer
from trainer.step import Step, StepStats

RATES = [0.5, 0.25, 0.125, 0.0625]


def rate_after(applied: Tensor) -> Tensor:
    return torch.tensor(RATES)[applied.clamp(max=len(RATES) - 1)]


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    yield


class Bench:
    """A linear model of 6 inputs and 14 findings, and what trains it."""

    def __init__(self, optimizer: str = "sgd", scale: float | None = None, clip: float = 0.0) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(6, 14)
        self.counters = StepStats(torch.device("cpu"))
        self.optimizer = make_optimizer(optimizer, self.model.parameters(), 1.0, 0.0)
        self.scaler = torch.amp.GradScaler(
            "cpu", init_scale=scale or 1.0, backoff_factor=2.0**-120, enabled=scale is not None
        )
        loss = FindingLoss("bce", torch.ones(14))
        self.step = Step(self.model, loss, self.optimizer, rate_after, self.counters, plainly, self.scaler, clip)

    def take(self, number: int, *batches: tuple[Tensor, Tensor]) -> None:
        images = sum(len(batch[0]) for batch in batches)
        for inputs, labels in batches:
            self.step.backward(inputs, labels, len(inputs) / images)
        self.step.optimizer_step(number)

    @property
    def rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])


def batch(images: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, 6, generator=generator), torch.rand(images, 14, generator=generator).round()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_group_of_batches_counts_as_one_of_all_its_images(optimizer: str) -> None:
    inputs, labels = batch(8)
    whole, parts = Bench(optimizer), Bench(optimizer)
    whole.take(1, (inputs, labels))
    parts.take(1, (inputs[:3], labels[:3]), (inputs[3:6], labels[3:6]), (inputs[6:], labels[6:]))
    assert torch.allclose(whole.model.weight, parts.model.weight, rtol=0, atol=2e-6)
    assert float(parts.counters.loss_sum) == pytest.approx(float(whole.counters.loss_sum), rel=1e-6)


def test_a_batch_that_has_no_share_changes_nothing() -> None:
    batches = Bench("adam"), Bench("adam")
    for bench in batches:
        bench.step.backward(*batch(4), 1.0)
    batches[1].step.backward(*batch(1, seed=5), 0.0)
    for bench in batches:
        bench.step.optimizer_step(1)
    assert torch.equal(batches[0].model.weight, batches[1].model.weight)
    assert batches[0].counters.loss_sum == batches[1].counters.loss_sum


def test_each_step_has_its_own_rate() -> None:
    bench = Bench()
    seen = []
    for number in range(1, 6):
        bench.take(number, batch(4, number))
        seen.append(bench.rate)
    assert seen == [*RATES, RATES[-1]]


def test_a_long_gradient_is_cut_to_the_norm_and_its_length_is_known() -> None:
    free, clipped = Bench(), Bench(clip=1e-3)
    before = free.model.weight.detach().clone(), free.model.bias.detach().clone()
    for bench in (free, clipped):
        bench.take(1, batch(4))
    norm = float(free.counters.grad_norm)
    assert float(clipped.counters.grad_norm) == norm > 1e-3
    for now, full, was in zip(clipped.model.parameters(), free.model.parameters(), before, strict=True):
        assert torch.allclose(now - was, (full - was) * (1e-3 / norm), rtol=1e-2, atol=1e-8)


def test_the_first_step_without_a_number_is_named_whenever_it_is_looked_at() -> None:
    bench = Bench()
    for number in range(1, 7):
        inputs, labels = batch(4, number)
        if number in (3, 5):
            inputs[0, 0] = torch.nan
        bench.take(number, (inputs, labels))
    assert int(bench.counters.first_bad) == 3


def test_a_gradient_without_a_number_is_noticed_though_the_loss_is_one() -> None:
    bench = Bench()
    inputs, labels = batch(4)
    bench.model.weight.register_hook(lambda gradient: gradient * torch.inf)
    bench.take(1, (inputs, labels))
    assert int(bench.counters.first_bad) == 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_overflow_is_skipped_counted_and_does_not_advance_the_schedule(optimizer: str) -> None:
    calm, wild = Bench(optimizer, scale=1.0), Bench(optimizer, scale=2.0**127)
    start = wild.model.weight.detach().clone()
    inputs, labels = batch(4, 9)
    wild.take(1, (100 * inputs, labels))
    assert torch.equal(wild.model.weight, start)
    assert (int(wild.counters.skipped), int(wild.counters.applied), int(wild.counters.first_bad)) == (1, 0, 0)
    for number in (1, 2):
        calm.take(number, batch(4, number))
        wild.take(number + 1, batch(4, number))
    assert wild.rate == calm.rate == RATES[1]
    assert torch.allclose(wild.model.weight, calm.model.weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("adam", lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.01)),
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.01)),
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01, momentum=0.9, nesterov=True)),
    ],
)
def test_the_fused_optimizers_do_what_the_plain_ones_do(name: str, plain: type[torch.optim.Optimizer]) -> None:
    mine, theirs = nn.Parameter(torch.linspace(-1, 1, 9)), nn.Parameter(torch.linspace(-1, 1, 9))
    fused, reference = make_optimizer(name, [mine], 0.1, 0.01), plain([theirs])
    for number in range(3):
        mine.grad, theirs.grad = ((parameter.detach() - number) ** 2 for parameter in (mine, theirs))
        fused.step()
        reference.step()
    assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-7)


def test_there_must_be_something_to_train() -> None:
    with pytest.raises(ValueError, match="every parameter is frozen"):
        make_optimizer("adam", [nn.Parameter(torch.zeros(1), requires_grad=False)], 0.1, 0.0)
