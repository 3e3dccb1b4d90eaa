"""Training on cached features is training the frozen network on images."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import pytest
import torch
from torch import nn

import models
from benchmarks.harness import trainer_log
from loaders import Flip, Loader, LoaderSpec, make_loader
from loaders.memory import free_memory
from models import Classifier
from shards.folder import ShardFolder
from trainer.feature_cache.features import (
    DoesNotFit,
    FeatureCache,
    FeatureLoader,
    cache_features,
    compute_features,
    device_for_cache,
)
from trainer.optim.precision import Precision
from trainer.stop_signal import Stopped

CPU = torch.device("cpu")
FP32, BF16 = Precision("fp32", CPU), Precision("bf16", CPU)
Spec = Callable[..., LoaderSpec]


@pytest.fixture
def spec(phantom_shards: ShardFolder) -> Spec:
    """(split, anything else of a LoaderSpec) -> the spec, in batches that do not divide a split."""

    def make(split: Literal["train", "val"], **changes: Any) -> LoaderSpec:
        told = {"batch_size": 10, "device": CPU, "training": split == "train", "seed": 3, **changes}
        return LoaderSpec(phantom_shards, split, **told)

    return make


def frozen_model(arch: str, how: str) -> Classifier:
    """The same weights every time; statistics of batch norm away from their first values."""
    torch.manual_seed(0)
    model = models.create_model(arch, size=64)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -0.1, 0.1)  # type: ignore[arg-type]
        nn.init.uniform_(norm.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    models.freeze(model, how)
    return model


def cache(model: Classifier, how: str, train: LoaderSpec, val: LoaderSpec, precision: Precision = FP32) -> FeatureCache:
    return cache_features(model, how, train, val, precision)


def train(
    model: Classifier, forward: nn.Module, loaders: Iterable[Loader], epochs: int, precision: Precision = FP32
) -> list[float]:
    """Train as the loop does; return every step's loss and every epoch's val losses."""
    train_loader, val_loader = loaders
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=1e-3, fused=True)
    torch.manual_seed(1)  # of the dropout in a head
    losses = []
    for _ in range(epochs):
        for training, loader in ((True, train_loader), (False, val_loader)):
            model.train(training)
            for batch in loader:
                with torch.set_grad_enabled(training), precision.autocast():
                    logits = forward(batch.images)
                loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), batch.labels.float())
                losses.append(loss.item())
                if training:
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    optimizer.zero_grad()
    return losses


@pytest.mark.parametrize(
    ("arch", "how", "flip", "precision"),
    [
        ("custom_cnn", "backbone", "none", FP32),
        ("custom_cnn", "backbone", "random", FP32),
        ("custom_cnn", "backbone", "both", FP32),
        ("custom_cnn", "backbone", "random", BF16),
        ("custom_cnn", "partial", "random", FP32),
        ("custom_cnn", "partial", "both", BF16),
        ("resnet50", "backbone", "random", FP32),
        ("resnet50", "partial", "random", FP32),
    ],
)
def test_losses_are_those_of_training_the_frozen_network_on_images(
    spec: Spec, arch: str, how: str, flip: Flip, precision: Precision
) -> None:
    of_train, of_val = spec("train", flip=flip), spec("val")
    epochs = 1 if arch == "resnet50" else 2  # it is slow
    model = frozen_model(arch, how)
    with make_loader("dali", of_train) as train_images, make_loader("dali", of_val) as val_images:
        on_images = train(model, model, (train_images, val_images), epochs, precision)
    model = frozen_model(arch, how)
    cached = cache(model, how, of_train, of_val, precision)
    on_features = train(model, cached.trainable, (cached.train, cached.val), epochs, precision)
    assert len(on_features) == epochs * (cached.train.batches + cached.val.batches)
    assert on_features == pytest.approx(on_images, rel=1e-5 if precision is FP32 else 1e-2)


@pytest.mark.parametrize("flip", ["none", "random", "both"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_feature_loader_hands_out_what_the_image_loader_would(spec: Spec, flip: Flip, ranks: int) -> None:
    model = frozen_model("custom_cnn", "backbone")
    frozen = models.feature_extractor(model.eval(), "backbone")
    told = spec("train", flip=flip, rank=ranks - 1, world_size=ranks)
    cached = cache(model, "backbone", told, spec("val"))
    with make_loader("dali", told) as images, cached.train as features:
        assert (features.samples, features.batches) == (images.samples, images.batches)
        for _ in range(2):
            for seen, given in zip(images, features, strict=True):
                assert torch.equal(given.rows, seen.rows)
                assert torch.equal(given.labels, seen.labels)
                torch.testing.assert_close(given.images, frozen(seen.images))


@pytest.mark.parametrize(
    ("how", "precision", "dtype", "shape"),
    [
        ("backbone", FP32, torch.float32, (128 * 7 * 7,)),
        ("backbone", BF16, torch.bfloat16, (128 * 7 * 7,)),
        ("partial", FP32, torch.float32, (16, 16, 64)),
        ("partial", BF16, torch.bfloat16, (16, 16, 64)),
    ],
)
def test_features_are_stored_in_the_type_that_the_network_emits(
    spec: Spec, how: str, precision: Precision, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    cached = cache(frozen_model("custom_cnn", how), how, spec("train", flip="random"), spec("val"), precision)
    train_values, val_values = cached.train.features.values, cached.val.features.values
    assert (train_values.dtype, val_values.dtype) == (dtype, dtype)
    assert train_values.shape == (2, cached.train.samples, *shape)
    assert val_values.shape == (1, cached.val.samples, *shape)


def test_maps_come_back_channels_last(spec: Spec) -> None:
    cached = cache(frozen_model("custom_cnn", "partial"), "partial", spec("train"), spec("val"))
    maps = next(iter(cached.train)).images
    assert maps.shape == (10, 64, 16, 16)
    assert maps.is_contiguous(memory_format=torch.channels_last)


def test_a_resume_builds_the_same_bits_and_goes_on_with_the_next_batch(spec: Spec) -> None:
    of_train, of_val = spec("train", flip="random"), spec("val")
    first = cache(frozen_model("custom_cnn", "backbone"), "backbone", of_train, of_val).train
    batches = iter(first)
    next(batches)
    place = first.state_dict()
    expected = list(batches)
    second = cache(frozen_model("custom_cnn", "backbone").eval(), "backbone", of_train, of_val).train
    assert torch.equal(second.features.values, first.features.values)
    second.load_state_dict(place)
    for again, batch in zip(second, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(again, batch, strict=True))


def test_building_draws_no_random_numbers(spec: Spec) -> None:
    model = frozen_model("custom_cnn", "backbone")
    before = torch.get_rng_state()
    cache(model, "backbone", spec("train", flip="both"), spec("val"))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_was_chosen_is_said_with_its_size(spec: Spec) -> None:
    of_train = spec("train", flip="both")
    model = frozen_model("custom_cnn", "partial")
    with trainer_log() as said:
        cached = cache_features(model, "partial", of_train, spec("val"), FP32)
    images = 2 * len(cached.train.features.rows) + len(cached.val.features.rows)
    needed = images * 64 * 16 * 16 * 4 / 2**30
    assert f"it takes {needed:.2f} GiB, 60% of what is free on cpu are" in said[0]
    assert "cached train: " in said[1] and "and their mirrors, each [16, 16, 64] of float32" in said[1]
    assert "mirrors" not in said[2] and "images/s" in said[2]


def test_augmented_images_are_not_cached_and_that_is_said(spec: Spec) -> None:
    model = frozen_model("custom_cnn", "backbone")
    told = spec("train", augment="light")
    with trainer_log() as lines, pytest.raises(DoesNotFit) as refused:
        cache_features(model, "backbone", told, spec("val"), FP32)
    assert lines == ["the backbone runs in every epoch: --augment light makes other images in each"]
    assert refused.value.message == lines[0]


def test_what_fits_nowhere_is_not_cached_with_the_figures() -> None:
    everything = 2 * free_memory(CPU)
    place, figures = device_for_cache(everything, CPU)
    assert place is None
    assert f"it takes {everything / 2**30:.2f} GiB" in figures and "60% of what is free on cpu" in figures


def test_ranks_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    tenth = free_memory(CPU) // 10
    assert device_for_cache(tenth, CPU)[0] == CPU
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert device_for_cache(tenth, CPU)[0] is None


def test_building_stops_between_batches_when_asked(spec: Spec) -> None:
    frozen = models.feature_extractor(frozen_model("custom_cnn", "backbone").eval(), "backbone")
    answers = iter([False, True])
    with pytest.raises(Stopped):
        compute_features(frozen, spec("train"), FP32, CPU, stop=lambda: next(answers))


def test_a_model_that_is_not_frozen_is_refused(spec: Spec) -> None:
    with pytest.raises(ValueError, match="not frozen as 'backbone'"):
        cache_features(frozen_model("custom_cnn", "none"), "backbone", spec("train"), spec("val"), FP32)


def test_an_image_loader_goes_on_from_a_feature_loaders_state(spec: Spec) -> None:
    told = spec("train", flip="random")
    features: FeatureLoader = cache(frozen_model("custom_cnn", "backbone"), "backbone", told, spec("val")).train
    next(iter(features))
    with make_loader("dali", told) as images:
        images.load_state_dict(features.state_dict())
        assert [batch.rows.tolist() for batch in images] == [batch.rows.tolist() for batch in features]
