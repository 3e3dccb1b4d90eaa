"""What benchmarks train: with the trainer's settings for a GPU, and beside it a loop written by hand."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from benchmarks.training_run import PlainLoop, TrainingRun, Variant, frozen_against_cached, make_step
from models import create_model
from shards.folder import ShardFolder
from trainer.optim.losses import make_loss
from trainer.optim.optimizers import make_optimizer
from trainer.optim.precision import Precision
from trainer.step import StepStats

CPU = torch.device("cpu")
FP32 = Precision("fp32", CPU)
BEST = Variant("synthetic", "synthetic", channels_last=True, autocast=True, fused=True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is called in which order: the fast math of a GPU, and every forward pass."""
    seen: list[str] = []
    forward = nn.Conv2d.forward
    monkeypatch.setattr(Precision, "allow_fast_math", lambda _: seen.append("fast math"))
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, maps: (seen.append("forward"), forward(self, maps))[1])
    return seen


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_model_is_timed_with_the_fast_math_that_the_trainer_allows_a_gpu(
    phantom_shards: ShardFolder, calls: list[str], by_hand: bool
) -> None:
    run = TrainingRun("custom_cnn", replace(BEST, by_hand=by_hand), phantom_shards, FP32, 4)
    run.train(1)
    run.close()
    assert calls[0] == "fast math"
    assert "forward" in calls


def test_a_frozen_backbone_is_timed_with_fast_math_too(phantom_shards: ShardFolder, calls: list[str]) -> None:
    frozen_against_cached("custom_cnn", "backbone", phantom_shards, FP32, 1, 32)
    assert calls[0] == "fast math"
    assert "forward" in calls


def test_a_run_on_the_model_of_another_continues_its_training(phantom_shards: ShardFolder) -> None:
    first = TrainingRun("custom_cnn", BEST, phantom_shards, FP32, 4)
    other = TrainingRun("custom_cnn", BEST, phantom_shards, FP32, 4, model_of=first)
    assert other._take is first._take
    for run in (first, other, first):
        run.train(1)
    assert set(first.figures()) == {"data_wait", "step_ms_p50", "step_ms_p99"}
    for run in (first, other):
        run.close()


def test_a_compiled_model_is_compiled_once_though_an_epoch_ends_with_a_short_batch(
    phantom_shards: ShardFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = CompileCounter()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, backend=counter, **options))
    images = phantom_shards.manifest.splits["train"].images
    assert images % 8
    run = TrainingRun("custom_cnn", replace(BEST, loader="resident", compiled=True), phantom_shards, FP32, 8)
    run.train(2 * -(-images // 8))
    run.close()
    assert counter.frame_count == 1


def test_the_plain_loop_trains_to_the_weights_of_the_trainers_step(phantom_shards: ShardFolder) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 4, 1, 64, 64), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 2, (3, 4, 14), dtype=torch.uint8, generator=generator)
    ends = []
    for by_hand in (True, False):
        torch.manual_seed(0)
        model = create_model("custom_cnn", size=64).train()
        start = torch.cat([weight.detach().flatten() for weight in model.parameters()])
        if by_hand:
            loop = PlainLoop(model, model, FP32)
            for batch in zip(images, labels, strict=True):
                loop(*batch)
            loss = loop.loss_sum / len(images)
        else:
            loss = make_loss("bce", "none", phantom_shards.manifest.splits["train"], CPU)
            optimizer = make_optimizer("adam", model.parameters(), 1e-4, 0.0)
            stats = StepStats(CPU)
            step = make_step(model, loss, optimizer, 1e-4, stats, FP32)
            for number, batch in zip(itertools.count(1), zip(images, labels, strict=True)):
                step.backward(*batch, 1.0)
                step.optimizer_step(number)
            loss = stats.loss_sum / images[:, :, 0].shape[:2].numel()
        ends.append((torch.cat([weight.detach().flatten() for weight in model.parameters()]), float(loss)))
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-6)
    # Adam turns the rounding of a gradient near 0 into a step of another size: not each weight, but all together.
    moved, apart = (ends[0][0] - start).abs().mean(), (ends[0][0] - ends[1][0]).abs().mean()
    assert apart < 1e-3 * moved
