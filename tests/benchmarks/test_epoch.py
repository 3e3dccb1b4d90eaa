"""What `python -m benchmarks.epoch` measures, in small."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from benchmarks.epoch import by_device, main
from benchmarks.plot import plot_epoch
from benchmarks.training_run import VARIANTS
from shards.folder import ShardFolder


def measured(folder: ShardFolder, out: Path, *options: str) -> dict[str, Any]:
    given = ["--shards", str(folder.path), "--json", str(out), "--arch", "custom_cnn", "--batch-size", "8"]
    done = CliRunner().invoke(main, [*given, *options])
    assert done.exit_code == 0, done.output
    record: dict[str, Any] = json.loads(out.read_text())
    return record


def test_every_loader_is_measured_with_its_ceiling_and_what_an_epoch_of_the_real_sets_takes(
    phantom_shards: ShardFolder, tmp_path: Path
) -> None:
    out = tmp_path / "epoch.json"
    options = ("--loader", "resident", "--steps", "2", "--runs", "2", "--no-ladder")
    record = measured(phantom_shards, out, *options)
    loaders = record["archs"]["custom_cnn"]
    assert list(loaders) == ["resident", "synthetic", "plain loop"]
    assert loaders["plain loop"]["loader"] == "resident"
    for one in loaders.values():
        rate = one["images_per_second"]["median"]
        assert one["epoch_seconds"] == {
            "train_val of NIH": pytest.approx(86_524 / rate),
            "the report's doubled set": pytest.approx(224_240 / rate),
        }
        assert 0 < one["step_ms_p50"] <= one["step_ms_p99"]
        assert 0 <= one["data_wait"] < 1
        assert one["memory_mib"] > 100  # torch alone is more
    assert loaders["synthetic"]["utilisation"] == 1
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    record["ladder"] = {"arch": "custom_cnn", "rungs": {"one": loaders["resident"]["images_per_second"]}}
    plain = out.with_suffix(".png").stat().st_size
    assert plot_epoch(record, tmp_path / "ladder.png").stat().st_size > plain


def test_the_defaults_suit_the_device_and_options_win() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert by_device(gpu, None, None, None) == (256, 50, True)
    assert by_device(cpu, None, None, None) == (32, 4, False)
    assert by_device(gpu, 8, 2, False) == (8, 2, False)
    assert by_device(cpu, 8, 2, True) == (8, 2, True)


def test_the_cached_and_the_streamed_head_end_at_the_same_val_loss(phantom_shards: ShardFolder, tmp_path: Path) -> None:
    options = ("--freeze", "backbone", "--epochs", "2")
    frozen = measured(phantom_shards, tmp_path / "frozen.json", *options)["frozen"]
    assert frozen["cached_val_loss"] == pytest.approx(frozen["streamed_val_loss"], abs=1e-3)
    assert frozen["speedup"] == pytest.approx(frozen["streamed_seconds"] / frozen["cached_seconds"])


def test_each_variant_of_the_ablation_makes_one_change() -> None:
    first, last = VARIANTS[0], VARIANTS[-1]
    assert (first.loader, first.waits, first.channels_last, first.autocast) == ("report", True, False, False)
    assert (last.loader, last.waits, last.compiled, last.fused) == ("resident", False, True, True)
    for before, variant in itertools.pairwise(VARIANTS):
        changed = [name for name, value in vars(variant).items() if value != getattr(before, name)]
        assert len(changed) == 2  # the name is one
