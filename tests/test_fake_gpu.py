"""What runs in every step on a GPU neither waits for it nor mixes devices, as fake CUDA tensors show without one."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorDeviceMismatchError,
    unset_fake_temporarily,
)

import loaders.memory
import models
from loaders import Batch, LoaderSpec, make_loader
from loaders.augment import PARAMETERS, distort
from loaders.collate import collate
from loaders.resident import ResidentLoader
from loaders.sampler import BatchIndices
from models import Classifier, create_model, feature_extractor, freeze
from shards.findings import FINDINGS
from shards.folder import ShardFolder
from shards.manifest import SplitRecord
from tests.fake_gpu import HostWaitError, fake_gpu, gradients_of_zeros, never_waits
from trainer.feature_cache.features import FeatureLoader, compute_features
from trainer.optim.ema import EMA
from trainer.optim.losses import LOSSES, POS_WEIGHTS, make_loss
from trainer.optim.optimizers import SCHEDULES, LearningRate, make_optimizer
from trainer.optim.precision import Precision
from trainer.step import Step, StepStats
from trainer.validation import validate

# copy.deepcopy asks any subclass of Tensor for its address.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

TRAIN = SplitRecord(1000, 500, dict.fromkeys(FINDINGS, 10), dict.fromkeys(FINDINGS, 0.01))
SIZE = 32


@contextlib.contextmanager
def fp16(device: torch.device) -> Iterator[None]:
    """Autocast to fp16. For "cuda" torch.autocast warns where there is no GPU, and leaves it off."""
    with torch.autocast(device.type, dtype=torch.float16, enabled=False):  # restores what it finds
        torch.set_autocast_enabled(device.type, True)
        yield


def scaler(enabled: bool) -> torch.amp.GradScaler:
    """The scaler of fp16. One for "cuda" turns itself off where there is no GPU; this one differs in nothing else,
    since its scale is on the device of the loss.
    """
    return torch.amp.GradScaler("cpu", enabled=enabled)


def fake_model(arch: str, device: torch.device, how: str = "none", size: int = SIZE) -> Classifier:
    """A model of fake tensors. It is real at first, since making a ViT reads values."""
    with unset_fake_temporarily():
        model = create_model(arch, size=size)
    freeze(model, how)
    return model.to_empty(device=device)


def images(count: int, device: torch.device) -> Tensor:
    return torch.zeros(count, 1, SIZE, SIZE, dtype=torch.uint8, device=device)


def labels(count: int, device: torch.device) -> Tensor:
    return torch.zeros(count, len(FINDINGS), dtype=torch.uint8, device=device)


@pytest.mark.parametrize(
    "wait",
    [
        lambda on_gpu, on_cpu: on_gpu.sum().item(),
        lambda on_gpu, on_cpu: bool(on_gpu.any()),
        lambda on_gpu, on_cpu: float(on_gpu.max()),
        lambda on_gpu, on_cpu: on_gpu.nonzero(),
        lambda on_gpu, on_cpu: on_gpu[on_gpu > 0],
        lambda on_gpu, on_cpu: on_gpu.cpu(),
        lambda on_gpu, on_cpu: on_gpu.to("cpu", non_blocking=True),
        lambda on_gpu, on_cpu: on_cpu.copy_(on_gpu),
        lambda on_gpu, on_cpu: on_cpu.to(on_gpu.device),
        lambda on_gpu, on_cpu: on_gpu.copy_(on_cpu),
        lambda on_gpu, on_cpu: on_gpu + on_cpu,
        lambda on_gpu, on_cpu: torch.where(on_gpu > 0, on_cpu[0], on_gpu),
        lambda on_gpu, on_cpu: on_gpu[on_cpu.long()],
    ],
)
def test_the_fake_gpu_notices_whatever_waits_or_mixes(wait: Callable[[Tensor, Tensor], Any]) -> None:
    noticed = (HostWaitError, DataDependentOutputException, DynamicOutputShapeException, FakeTensorDeviceMismatchError)
    with fake_gpu() as device:
        on_gpu, on_cpu = torch.zeros(4, device=device), torch.zeros(4)
        with never_waits(), pytest.raises(noticed):
            wait(on_gpu, on_cpu)


def test_the_fake_gpu_allows_what_is_queued() -> None:
    with fake_gpu() as device, never_waits():
        moved = torch.zeros(4).to(device, non_blocking=True)
        moved.copy_(torch.ones(4), non_blocking=True)
        assert (torch.where(moved > 0, 1.0, moved) / 3).device == device


def take_two_steps(
    device: torch.device, optimizer: str, scaled: bool, clip: float, batches: list[int], *, real_backward: bool
) -> set[torch.device]:
    """Train on batches of so many images each, for 0 on one that has no share; return where everything is then."""
    model = fake_model("custom_cnn", device)
    step = Step(
        model,
        make_loss("bce", "log", TRAIN, device, 0.1),
        make_optimizer(optimizer, model.parameters(), 1e-3, 1e-4),
        LearningRate("cosine", 1e-3, 100, 10),
        StepStats(device),
        functools.partial(fp16, device) if scaled else contextlib.nullcontext,
        scaler(scaled),
        clip,
        EMA(model, 0.999),
    )
    given = [(images(max(count, 1), device), labels(max(count, 1), device), count / sum(batches)) for count in batches]
    with never_waits(), contextlib.nullcontext() if real_backward else gradients_of_zeros(model):
        for number in (1, 2):
            for position, (pixels, truth, share) in enumerate(given, 1):
                step.backward(pixels, truth, share, more=position < len(given))
            step.optimizer_step(number)
    assert step.scaler.is_enabled() == scaled
    assert step.optimizer.state.keys() == {*model.parameters()}
    changed = [*vars(step.stats).values(), step.optimizer.param_groups[0]["lr"], *model.parameters()]
    for state in step.optimizer.state.values():
        changed += state.values()
    return {tensor.device for tensor in changed}


@pytest.mark.parametrize(
    ("optimizer", "scaled", "clip", "batches"),
    [
        ("adam", True, 1.0, [4]),
        ("adamw", True, 0.0, [4, 2]),
        ("sgd", True, 1.0, [4, 0]),
        ("adam", False, 0.0, [4, 2]),
        ("adamw", False, 1.0, [4]),
        ("sgd", False, 0.0, [4]),
    ],
)
def test_a_step_queues_its_work(optimizer: str, scaled: bool, clip: float, batches: list[int]) -> None:
    with fake_gpu() as device:
        real = torch.cuda.is_available()
        assert take_two_steps(device, optimizer, scaled, clip, batches, real_backward=real) == {device}


@pytest.mark.parametrize(
    ("optimizer", "scaled", "clip", "batches"), [("adamw", True, 1.0, [4, 2]), ("sgd", False, 0.0, [4, 0])]
)
def test_nothing_reads_a_value_in_a_backward_pass(
    optimizer: str, scaled: bool, clip: float, batches: list[int]
) -> None:
    """On fake tensors of the host, where the pass can run without a GPU; devices cannot mix there."""
    with fake_gpu("cpu") as device:
        assert take_two_steps(device, optimizer, scaled, clip, batches, real_backward=True) == {device}


@pytest.mark.parametrize("arch", models.ARCHS)
def test_every_arch_makes_its_logits_on_the_gpu_in_the_autocast_type(arch: str) -> None:
    with fake_gpu() as device:
        model, pixels = fake_model(arch, device), images(2, device)
        with never_waits(), fp16(device):
            normalised = model.input(pixels)
            made = [normalised, model.train()(pixels), model.eval()(pixels)]
    assert {(tensor.device, tensor.dtype) for tensor in made} == {(device, torch.float16)}
    assert normalised.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("rule", POS_WEIGHTS)
def test_every_loss_stays_on_the_gpu(name: str, rule: str) -> None:
    with fake_gpu() as device:
        loss = make_loss(name, rule, TRAIN, device, 0.1)
        logits = torch.zeros(4, len(FINDINGS), device=device)
        with never_waits():
            value = loss(logits, labels(4, device).float())
        assert (value.device, value.shape) == (device, ())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 10])
def test_every_schedule_computes_its_rate_on_the_gpu(schedule: str, warmup: int) -> None:
    with fake_gpu() as device:
        applied = torch.zeros((), dtype=torch.int64, device=device)
        with never_waits():
            rate = LearningRate(schedule, 1e-3, 100, warmup)(applied)
    assert (rate.device, rate.dtype) == (device, torch.float64)


def test_the_moving_average_is_taken_on_the_gpu() -> None:
    with fake_gpu() as device:
        ema = EMA(fake_model("custom_cnn", device, "partial"), 0.999)
        with never_waits():
            ema.update(1)
        assert {tensor.device for tensor in ema.model.state_dict().values()} == {device}


def test_validation_waits_only_for_its_results() -> None:
    asked: list[int] = []

    def stop() -> bool:
        asked.append(len(asked))
        return False

    with fake_gpu() as device:
        model, loss = fake_model("custom_cnn", device).eval(), make_loss("bce", "none", TRAIN, device)
        batch = Batch(images(2, device), labels(2, device), torch.zeros(2, dtype=torch.int32, device=device))
        with never_waits(), pytest.raises(DataDependentOutputException):
            validate([batch, batch], model, loss, contextlib.nullcontext, auroc=True, stop=stop)
    assert asked == [0, 1]


@pytest.mark.parametrize("flip", ["none", "random", "both"])
@pytest.mark.parametrize("decoded_on", ["cpu", "cuda"])
@pytest.mark.parametrize("augmented", [False, True])
def test_decoded_images_become_a_batch_on_the_gpu(
    phantom_shards: ShardFolder, flip: Any, decoded_on: str, augmented: bool
) -> None:
    with fake_gpu() as device:
        spec = LoaderSpec(phantom_shards, "train", 8, device, training=True, flip=flip)
        count = spec.batch_size // spec.copies
        drawn = np.zeros((spec.batch_size, PARAMETERS), np.float32) if augmented else None
        indices = BatchIndices(np.arange(count), 3 if flip == "random" else 0, drawn)
        decoded = torch.zeros(count, SIZE, SIZE, dtype=torch.uint8, device=decoded_on)
        truth, rows = torch.zeros(count, len(FINDINGS), dtype=torch.uint8), torch.zeros(count, dtype=torch.int32)
        for into in (None, torch.empty_like(decoded, device=device)):
            with never_waits():
                batch = collate(decoded, truth, rows, indices, spec, into)
            assert {tensor.device for tensor in batch} == {device}
            assert batch.images.shape == (8, 1, SIZE, SIZE) and len(batch.labels) == len(batch.rows) == 8
            assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_images_are_distorted_on_the_gpu() -> None:
    with fake_gpu() as device, never_waits():
        distorted = distort(images(4, device)[:, 0], np.zeros((4, PARAMETERS), np.float32))
        assert (distorted.device, distorted.dtype, distorted.shape) == (device, torch.uint8, (4, SIZE, SIZE))


@pytest.mark.parametrize("memory", ["cuda", "cpu"])
def test_the_resident_loader_gathers_without_waiting(
    phantom_shards: ShardFolder, monkeypatch: pytest.MonkeyPatch, memory: str
) -> None:
    # Free memory is the one thing that a fake GPU cannot be asked for.
    monkeypatch.setattr(loaders.memory, "free_memory", lambda device: 2**40 * (device.type == memory))
    with fake_gpu() as device:
        spec = LoaderSpec(phantom_shards, "train", 16, device, training=True, flip="random", augment="light")
        loader = ResidentLoader(spec, lambda once: make_loader("synthetic", once))
        # Without the stream of its own that prefetch_to_device gives it: a fake GPU has none.
        for _ in loader._batches():
            pass  # the first epoch decodes
        with never_waits():
            batches = list(loader._batches())
    assert sum(len(batch.rows) for batch in batches) == phantom_shards.manifest.splits["train"].images
    assert {tensor.device for batch in batches for tensor in batch} == {device}


@pytest.mark.parametrize("flip", ["none", "random", "both"])
@pytest.mark.parametrize(("memory", "how"), [("cuda", "backbone"), ("cuda", "partial"), ("cpu", "partial")])
def test_cached_features_come_without_waiting(phantom_shards: ShardFolder, flip: Any, memory: str, how: str) -> None:
    with fake_gpu() as device:
        spec = LoaderSpec(phantom_shards, "train", 16, device, training=True, flip=flip)
        frozen = feature_extractor(fake_model("custom_cnn", device, how, size=64).eval(), how)
        features = compute_features(frozen, spec, Precision("fp32", device), torch.device(memory), loader="synthetic")
        loader = FeatureLoader(features, spec)
        with never_waits():
            batches = list(loader)
            first = loader.first_image()
    assert sum(len(batch.rows) for batch in batches) == loader.samples
    assert {tensor.device for batch in [*batches, first] for tensor in batch} == {device}
