"""A sweep of heads on one cache: each is what it would be alone, and the best is known."""

import math
from dataclasses import replace

import pytest
import torch

import models
from loaders import LoaderSpec
from models import Classifier
from shards.folder import ShardFolder
from trainer.config.sweeps import parse_sweep
from trainer.frozen.features import Cached, cache_frozen
from trainer.frozen.heads import (
    Head,
    HeadResult,
    HeadTraining,
    Options,
    best_head,
    sweep_table,
    train_heads,
)
from trainer.optimization.averaging import Average
from trainer.optimization.losses import make_loss
from trainer.optimization.optimizers import make_optimizer
from trainer.optimization.precision import Precision
from trainer.optimization.schedules import LearningRate
from trainer.step import Counters, Step
from trainer.stop_signal import Stopped
from trainer.validation import validate

CPU = torch.device("cpu")
FP32 = Precision("fp32", CPU)
EPOCHS = 2
SWEEP = parse_sweep("lr=1e-5,1e-3 weight-decay=0,1e-4", ("lr", "weight-decay"))


@pytest.fixture(scope="module")
def model() -> Classifier:
    torch.manual_seed(0)
    model = models.create_model("custom_cnn", size=64)
    models.freeze(model, "backbone")
    return model


@pytest.fixture(scope="module")
def cached(model: Classifier, phantom_shards: ShardFolder) -> Cached:
    train = LoaderSpec(phantom_shards, "train", 16, CPU, training=True, flip="random")
    cached = cache_frozen(
        model, "backbone", train, LoaderSpec(phantom_shards, "val", 16, CPU, training=False), FP32, print
    )
    assert cached is not None
    return cached


@pytest.fixture
def training(model: Classifier, cached: Cached, phantom_shards: ShardFolder) -> HeadTraining:
    loss = make_loss("bce", "none", phantom_shards.manifest.splits["train"], CPU)
    torch.manual_seed(2)  # of the dropout in the heads

    def make(options: Options, counters: Counters) -> Head:
        average = Average(model, options["ema"]) if "ema" in options else None
        optimizer = make_optimizer(
            "adam", cached.trainable.parameters(), options["lr"], options.get("weight-decay", 0.0)
        )
        rate = LearningRate("constant", options["lr"], 1000, 0)
        step = Step(
            cached.trainable, loss, optimizer, rate, counters, FP32.autocast, FP32.make_scaler(),
            average=average,
        )  # fmt: skip
        kept = models.trainable_head(average.model, "backbone") if average else cached.trainable
        return Head(step, kept)

    return HeadTraining(
        cached.trainable, make, cached.train, cached.val, loss, FP32, epochs=EPOCHS, patience=0
    )


def test_every_head_is_what_it_is_when_trained_alone(training: HeadTraining) -> None:
    together = train_heads(training, SWEEP)
    assert [head.options for head in together] == SWEEP
    assert len({head.val_loss for head in together}) == len(SWEEP)
    for options, head in list(zip(SWEEP, together, strict=True))[1:3]:
        (alone,) = train_heads(training, [options])
        assert alone == head
        assert all(torch.equal(alone.state[name], head.state[name]) for name in head.state)


def test_a_sweep_leaves_everything_as_it_was(training: HeadTraining) -> None:
    training.part.eval()
    weights = {name: tensor.clone() for name, tensor in training.part.state_dict().items()}
    place, random = training.train.state_dict(), torch.get_rng_state()
    train_heads(training, SWEEP[:2])
    after = training.part.state_dict()
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert training.train.state_dict() == place
    assert torch.equal(torch.get_rng_state(), random)
    assert not training.part.training


def test_the_best_heads_weights_give_its_val_loss_again(training: HeadTraining) -> None:
    results = train_heads(training, SWEEP)
    best = best_head(results)
    assert best.val_loss == min(head.val_loss for head in results)
    start = {name: tensor.clone() for name, tensor in training.part.state_dict().items()}
    training.part.load_state_dict(best.state)
    training.part.eval()
    score = validate(
        training.val, training.part, training.val_loss, FP32.autocast, auroc=False, stop=lambda: False
    )
    training.part.load_state_dict(start)
    assert score is not None
    assert score.loss == best.val_loss


def test_an_average_is_what_is_kept_where_there_is_one(training: HeadTraining) -> None:
    plain, averaged = train_heads(training, [{"lr": 1e-3}, {"lr": 1e-3, "ema": 0.9}])
    assert averaged.state.keys() == plain.state.keys()
    assert averaged.val_loss != plain.val_loss


def test_accumulated_batches_make_one_step(training: HeadTraining) -> None:
    single, double = (
        train_heads(replace(training, accumulate=batches), [{"lr": 1e-3}])[0] for batches in (1, 2)
    )
    assert single.val_loss != double.val_loss
    assert math.isfinite(double.val_loss)


def test_each_head_stops_by_its_own_patience(training: HeadTraining) -> None:
    results = train_heads(replace(training, epochs=8, patience=1), [{"lr": 1e-6}, {"lr": 0.05}])
    assert results[0].epochs > results[1].epochs
    assert results[1].epochs == results[1].best_epoch + 1


def test_a_diverging_head_is_never_the_best_and_is_named_so(training: HeadTraining) -> None:
    results = train_heads(training, [{"lr": 1e20}, {"lr": 1e-3}])
    assert (results[0].val_loss, results[0].state, results[0].epochs) == (math.inf, {}, 1)
    assert best_head(results) is results[1]
    _, diverged, best = sweep_table(results)
    assert diverged.endswith("diverged") and best.endswith("best")
    with pytest.raises(ValueError, match="every head of the sweep diverged"):
        best_head(results[:1])


def test_a_sweep_stops_when_asked(training: HeadTraining) -> None:
    with pytest.raises(Stopped):
        train_heads(replace(training, stop=lambda: True), SWEEP)


def test_an_empty_sweep_is_refused(training: HeadTraining) -> None:
    with pytest.raises(ValueError, match="at least one point"):
        train_heads(training, [])


def test_the_table_has_a_line_a_head() -> None:
    results = [
        HeadResult({"lr": 1e-4, "weight-decay": 0.0}, 20, 20, 0.2512345, 0.261, {"weight": torch.ones(1)}),
        HeadResult({"lr": 0.001, "weight-decay": 1e-5}, 9, 8, 0.2, 0.25, {"weight": torch.ones(1)}),
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
    with pytest.raises(ValueError, match=message):
        parse_sweep(text, ("lr", "weight-decay"))
