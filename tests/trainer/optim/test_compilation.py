"""torch.compile, and what happens where it fails."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from models import create_model
from shards.folder import ShardFolder
from tests.trainer.running import ROOT, command, logged, losses, train
from trainer.optim.compilation import CompiledModel


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


@pytest.mark.full
def test_a_compiled_model_gives_the_same_logits_and_a_compiled_run_ends(
    phantom_shards: ShardFolder, tmp_path: Path
) -> None:
    model = create_model("custom_cnn", size=64).eval()
    images = torch.randint(0, 256, (8, 1, 64, 64), dtype=torch.uint8)
    forward = CompiledModel(model, 8, compiled=True)
    with logged() as lines:
        assert torch.allclose(forward(images), model(images), rtol=1e-4, atol=1e-5)
    assert not lines
    assert torch.equal(forward(images[:3]), model(images[:3]))  # a short batch goes the plain way
    # Its dropout draws other numbers, so that the losses cannot be compared.
    assert "failed" not in run(phantom_shards, tmp_path, "compiled", {}, ema=0.9)
    assert len(losses(tmp_path / "compiled")) == 1
