"""torch.compile, and what happens where it fails."""

import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.runtime.triton_compat import OutOfResources
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.harness import trainer_log
from models import create_model
from shards.folder import ShardFolder
from tests.trainer.running import ROOT, command, losses, terminate, train
from trainer.optim.compilation import WORTHWHILE, CompiledModel, should_compile


def run(shards: ShardFolder, runs: Path, name: str, env: dict[str, str], **changes: Any) -> str:
    arguments = command(shards, runs, name, epochs=1, precision="fp32", compile="on", **changes)
    done = subprocess.run(
        arguments, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=500, check=True
    )
    return done.stdout


def test_a_compiler_that_fails_is_announced_and_done_without(phantom_shards: ShardFolder, tmp_path: Path) -> None:
    env = {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    said = run(phantom_shards, tmp_path, "failed", env)
    assert "torch.compile failed, continuing without it: " in said
    assert train(phantom_shards, tmp_path, "plain", epochs=1, precision="fp32").exit_code == 0
    assert losses(tmp_path / "failed") == losses(tmp_path / "plain")


def use_backend(monkeypatch: pytest.MonkeyPatch, backend: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))


def test_an_epoch_with_a_short_last_batch_and_val_compiles_once(
    phantom_shards: ShardFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = phantom_shards.manifest.splits
    assert splits["train"].images % 8 and splits["val"].images >= 8
    counter = CompileCounter()
    use_backend(monkeypatch, counter)
    done = train(phantom_shards, tmp_path, "counted", epochs=2, compile="on", ema=0.9)
    assert done.exit_code == 0, done.stderr
    assert "failed" not in done.stdout
    assert counter.frame_count == 1


def fails(*_: Any) -> None:
    raise RuntimeError("no such kernel")


def test_a_signal_while_compiling_stops_the_run_at_once(
    phantom_shards: ShardFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = [], []

    def compile_slowly(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        begun.append(graph)
        terminate()
        ended.append(graph)
        return graph

    use_backend(monkeypatch, compile_slowly)
    done = train(phantom_shards, tmp_path, "stopped", epochs=1, compile="on")
    assert done.exit_code == 143, done.stderr
    assert "stopped before a step" in done.stdout
    assert begun and not ended


def test_a_backward_pass_that_does_not_compile_is_announced_before_a_step_is_taken(
    phantom_shards: ShardFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"epochs": 1, "precision": "fp32"}
    assert train(phantom_shards, tmp_path, "plain", **options).exit_code == 0
    use_backend(monkeypatch, aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=fails))
    done = train(phantom_shards, tmp_path, "failed", **options, compile="on")
    assert done.exit_code == 0, done.stderr
    assert "torch.compile failed, continuing without it: " in done.stdout
    assert losses(tmp_path / "failed") == losses(tmp_path / "plain")


@pytest.mark.parametrize(
    "error",
    [OutOfResources(262_144, 232_448, "shared memory"), RuntimeError("No valid triton configs. OutOfResources: ..")],
)
def test_a_kernel_that_the_gpu_cannot_launch_is_done_without(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(_: torch.Tensor) -> torch.Tensor:
        raise error

    monkeypatch.setattr(torch, "compile", lambda model, **_: launch)
    forward = CompiledModel(nn.Flatten(), 2, compiled=True)
    with trainer_log() as lines:
        assert torch.equal(forward(torch.ones(2, 1, 1)), torch.ones(2, 1))
    assert len(lines) == 1


def test_an_error_of_the_model_itself_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        CompiledModel(nn.Linear(3, 1), 2, compiled=True)(torch.ones(2, 2))


def test_the_compiled_backward_pass_of_max_pooling_gathers_and_equals_the_eager_one() -> None:
    pool, images = nn.MaxPool2d(2), torch.randn(4, 8, 10, 10).to(memory_format=torch.channels_last)
    weights, gradients = torch.randn(4, 8, 5, 5), []
    forward = CompiledModel(pool, 4, compiled=True)
    for function in (pool, forward):
        given = images.clone().requires_grad_()
        (function(given) * weights).sum().backward()
        gradients.append(given.grad)
    assert torch.equal(*gradients)
    assert torch.ops.aten.max_pool2d_with_indices_backward.default not in select_decomp_table()


def test_cudnn_searches_for_the_fastest_algorithms_for_full_batches_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    seen = []
    forward = CompiledModel(lambda images: seen.append(torch.backends.cudnn.benchmark) or images, 4, compiled=False)
    with FakeTensorMode():
        for images in (4, 3, 4):
            forward(torch.empty(images, device="cuda"))
    assert seen == [True, False, True]
    forward(torch.empty(3))
    assert seen[-1]


def test_auto_compiles_long_runs_on_a_gpu() -> None:
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert [should_compile("auto", gpu, images) for images in (WORTHWHILE - 1, WORTHWHILE)] == [False, True]
    assert not should_compile("auto", cpu, 10 * WORTHWHILE)
    assert should_compile("on", cpu, 1) and not should_compile("off", gpu, WORTHWHILE)


@pytest.mark.full
def test_a_compiled_model_gives_the_same_logits_and_a_compiled_run_ends(
    phantom_shards: ShardFolder, tmp_path: Path
) -> None:
    model = create_model("custom_cnn", size=64).eval()
    images = torch.randint(0, 256, (8, 1, 64, 64), dtype=torch.uint8)
    forward = CompiledModel(model, 8, compiled=True)
    with trainer_log() as lines:
        assert torch.allclose(forward(images), model(images), rtol=1e-4, atol=1e-5)
    assert not lines
    assert torch.equal(forward(images[:3]), model(images[:3]))  # a short batch goes the plain way
    # Its dropout draws other numbers, so that the losses cannot be compared.
    assert "failed" not in run(phantom_shards, tmp_path, "compiled", {}, ema=0.9)
    assert len(losses(tmp_path / "compiled")) == 1
