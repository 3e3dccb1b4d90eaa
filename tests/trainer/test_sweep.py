"""A sweep of heads on one cache: each is what it would be alone, and the best is known."""

import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import torch

import models
from models import Classifier
from shards.folder import ShardFolder
from trainer.feature_cache.features import FeatureCache, cache_features
from trainer.optim.precision import Precision
from trainer.options import TrainConfig, parse_sweep
from trainer.resolve import RunContext
from trainer.run_directory import RunDirectory
from trainer.state import Diverged
from trainer.stop_signal import Stopped, StopSignal
from trainer.sweep import HeadResult, Options, best_head, sweep_table, train_heads

CPU = torch.device("cpu")
SWEEP = parse_sweep("lr=1e-5,1e-3 weight-decay=0,1e-4")


class Bench:
    """A cached model, and the context of a run on it."""

    def __init__(self, shards: ShardFolder) -> None:
        torch.manual_seed(0)
        self.model: Classifier = models.create_model("custom_cnn", size=64)
        models.freeze(self.model, "backbone")
        config = TrainConfig(
            arch="custom_cnn", freeze="backbone", batch_size=16, epochs=2, patience=0, precision="fp32"
        )
        run = RunDirectory(Path("nowhere"), writes=False)
        self.context = RunContext(config, run, shards, Precision("fp32", CPU), StopSignal())
        specs = (self.context.loader_spec(split) for split in ("train", "val"))
        self.cache: FeatureCache = cache_features(self.model, "backbone", *specs, self.context.precision)

    def train(self, *sweep: Options, **changes: Any) -> list[HeadResult]:
        torch.manual_seed(2)  # of the dropout in the heads
        context = replace(self.context, config=replace(self.context.config, **changes))
        return train_heads(context, self.model, self.cache, sweep)


@pytest.fixture(scope="module")
def bench(phantom_shards: ShardFolder) -> Bench:
    return Bench(phantom_shards)


def test_every_head_is_what_it_is_when_trained_alone(bench: Bench) -> None:
    together = bench.train(*SWEEP)
    assert [head.options for head in together] == SWEEP
    assert len({head.val_loss for head in together}) == len(SWEEP)
    for options, head in list(zip(SWEEP, together, strict=True))[1:3]:
        assert bench.train(options) == [head]


def test_a_sweep_leaves_everything_as_it_was(bench: Bench) -> None:
    bench.model.eval()
    weights = {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}
    position = bench.cache.train.state_dict()
    bench.train(*SWEEP[:2])
    torch.manual_seed(2)
    random = torch.get_rng_state()
    bench.train(*SWEEP[:2])
    after = bench.model.state_dict()
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert bench.cache.train.state_dict() == position
    assert torch.equal(torch.get_rng_state(), random)
    assert not bench.model.training


def test_an_average_is_validated_if_there_is_one(bench: Bench) -> None:
    plain, averaged = bench.train({"lr": 1e-3}, {"lr": 1e-3, "ema": 0.9})
    assert averaged.val_loss != plain.val_loss


def test_accumulated_batches_make_one_step(bench: Bench) -> None:
    single, double = (bench.train({"lr": 1e-3}, accumulate=batches)[0] for batches in (1, 2))
    assert single.val_loss != double.val_loss
    assert math.isfinite(double.val_loss)


def test_each_head_stops_by_its_own_patience(bench: Bench) -> None:
    results = bench.train({"lr": 1e-6}, {"lr": 0.05}, epochs=8, patience=1, weight_decay=0.0)
    assert results[0].epochs > results[1].epochs
    assert results[1].epochs == results[1].best_epoch + 1


def test_a_diverging_head_is_never_the_best_and_is_named_so(bench: Bench) -> None:
    results = bench.train({"lr": 1e20}, {"lr": 1e-3})
    assert (results[0].val_loss, results[0].best_epoch, results[0].epochs) == (math.inf, 0, 1)
    assert best_head(results) is results[1]
    _, diverged, best = sweep_table(results)
    assert diverged.endswith("diverged") and best.endswith("best")
    with pytest.raises(Diverged, match="every head of the sweep diverged"):
        best_head(results[:1])


def test_a_sweep_stops_on_a_signal(bench: Bench) -> None:
    context = replace(bench.context, stop=StopSignal())
    context.stop.receive(signal.SIGTERM)
    with pytest.raises(Stopped):
        train_heads(context, bench.model, bench.cache, SWEEP)


def test_the_table_has_a_line_a_head() -> None:
    results = [
        HeadResult({"lr": 1e-4, "weight-decay": 0.0}, 20, 20, 0.2512345, 0.261),
        HeadResult({"lr": 0.001, "weight-decay": 1e-5}, 9, 8, 0.2, 0.25),
    ]
    assert list(sweep_table(results)) == [
        "    lr  weight-decay  epochs  best epoch  train loss  val loss",
        "0.0001             0      20          20     0.25123   0.26100",
        " 0.001         1e-05       9           8     0.20000   0.25000  best",
    ]


def test_a_sweep_is_every_combination() -> None:
    assert SWEEP == [
        {"lr": 1e-5, "weight-decay": 0},
        {"lr": 1e-5, "weight-decay": 1e-4},
        {"lr": 1e-3, "weight-decay": 0},
        {"lr": 1e-3, "weight-decay": 1e-4},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", 'an empty sweep; one looks like "lr='),
        ("arch=1", "cannot vary 'arch'; it can vary: lr, weight-decay"),
        ("lr", "gives lr the value ''"),
        ("lr=1e-4,", "gives lr the value ''"),
        ("lr=fast", "the value 'fast', which is no finite number"),
        ("lr=nan", "no finite number"),
        ("lr=1 lr=2", "names lr twice"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused_with_the_reason(text: str, message: str) -> None:
    with pytest.raises(click.UsageError, match=message):
        parse_sweep(text)
