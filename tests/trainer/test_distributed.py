"""Two ranks on CPUs, started by torchrun: they train what one process trains, stop together, and resume."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from shards.folder import ShardFolder, open_shards
from shards.packing import pack
from shards.packing.planning import SplitRecipe, make_plan
from shards.pixels import PixelRecipe
from tests.ranks import start_ranks
from tests.trainer.running import TIMEOUT, command, losses, metrics, train
from trainer.__main__ import main
from trainer.distributed import Distributed, should_sync_bn
from trainer.logging.checkpoints import load_checkpoint

# No batch norm that is trained, and no dropout: there ranks and one process are the same function.
EXACT = {
    "monitor": "auroc",
    "optimizer": "sgd",
    "lr": 0.01,
    "epochs": 1,
    "precision": "fp32",
    "weights": "none",
    "loader": "resident",
}
LONG = {"batch_size": 10, "accumulate": 2, "epochs": 2, "threads": 1, "loader": "resident"}


def start(arguments: list[str], ranks: int = 2, *, module: bool = True) -> "subprocess.Popen[str]":
    # Without the -- torchrun takes --monitor for one of its own.
    return start_ranks([*(["-m", "--"] if module else []), *arguments[2:]], ranks)


def together(folder: ShardFolder, runs: Path, run: str, **changes: Any) -> tuple[int, str, str]:
    """Run the command on two ranks; return the exit code and what was said."""
    process = start(command(folder, runs, run, **changes))
    said, errors = process.communicate(timeout=TIMEOUT)
    return process.returncode, said, errors


@pytest.fixture(scope="module")
def uneven_shards(phantom_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardFolder:
    """An odd number of images in train."""
    plans = (make_plan(phantom_tree, SplitRecipe(val_fraction=0.2, seed=seed)) for seed in itertools.count())
    uneven = next(plan for plan in plans if (plan.table["split"] == "train").sum() % 2)
    out = tmp_path_factory.mktemp("uneven")
    pack(uneven, out, PixelRecipe(size=64), shard_size=20)
    return open_shards(out)


def largest_difference(run: Path, other: Path) -> float:
    """Of the weights of two runs, relative to the largest weight of the same tensor."""
    first, second = (load_file(path / "model.safetensors") for path in (run, other))
    assert first.keys() == second.keys()
    return max(
        float((first[name] - second[name]).abs().max() / first[name].abs().max().clamp(min=1e-3)) for name in first
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"arch": "resnet50", "freeze": "backbone", "flip": "both", "accumulate": 2, "ema": 0.5},
        pytest.param({"arch": "vit_b_16", "freeze": "partial", "cache": "off"}, marks=pytest.mark.full),
        pytest.param({"arch": "vit_b_16"}, marks=pytest.mark.full),
    ],
)
def test_two_ranks_train_what_one_process_trains_on_the_same_batches(
    uneven_shards: ShardFolder, runs: Path, changes: dict[str, Any]
) -> None:
    # In the last batch the second rank has no image at all.
    images = uneven_shards.manifest.splits["train"].images
    fitting = next(size for size in range(8, images, 2) if images % size == 1)
    options = {**EXACT, **changes, "batch_size": fitting * (2 if changes.get("flip") == "both" else 1)}
    name = f"{changes['arch']}-{changes.get('freeze')}"
    code, said, errors = together(uneven_shards, runs, f"{name}-2", **options)
    assert code == 0, errors
    assert "on cpu on each of 2 ranks" in said
    alone = train(uneven_shards, runs, f"{name}-1", **options)
    assert alone.exit_code == 0, alone.stderr
    assert largest_difference(runs / f"{name}-1", runs / f"{name}-2") <= 1e-5
    first, second = (metrics(runs / f"{name}-{ranks}", "epoch") for ranks in (1, 2))
    assert [line["step"] for line in second] == [line["step"] for line in first]
    for key in ("train_loss", "val_loss", "val_auroc", "grad_norm"):
        assert second[0][key] == pytest.approx(first[0][key], rel=1e-4), key


@pytest.fixture(scope="module")
def undisturbed(phantom_shards: ShardFolder, runs: Path) -> Path:
    code, said, errors = together(phantom_shards, runs, "undisturbed", **LONG)
    assert code == 0, errors
    assert said.count("epoch 1: train loss") == 1
    return runs / "undisturbed"


def stop_in(
    epoch: int, folder: ShardFolder, run: Path, act: Callable[["subprocess.Popen[str]"], None]
) -> tuple[int, float]:
    """Act once a step of the epoch is on record; return torchrun's exit code, and the seconds until then."""
    process = start(command(folder, run.parent, run.name, **LONG))
    record = run / "metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT
    while not (record.is_file() and f'"step", "epoch": {epoch}' in record.read_text()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
    begun = time.monotonic()
    act(process)
    process.communicate(timeout=TIMEOUT)
    return process.returncode, time.monotonic() - begun


def ranks_of(process: "subprocess.Popen[str]") -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in children.split()]


def assert_same_end(run: Path, other: Path) -> None:
    assert losses(run) == losses(other)
    assert [line["step"] for line in metrics(run, "step")] == [line["step"] for line in metrics(other, "step")]
    assert (run / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the ranks in /proc")
def test_ranks_that_were_stopped_and_of_which_one_died_go_on_to_the_undisturbed_weights(
    undisturbed: Path, phantom_shards: ShardFolder, runs: Path
) -> None:
    run = runs / "disturbed"
    code, _ = stop_in(1, phantom_shards, run, lambda process: process.send_signal(signal.SIGTERM))
    assert code != 0
    assert "stopped in epoch 1, saved" in (run / "log.txt").read_text()
    saved = load_checkpoint(run / "checkpoints" / "last.pt")
    assert len(saved["ranks"]) == 2
    assert not torch.equal(saved["ranks"][0]["rng"], saved["ranks"][1]["rng"])

    # The other rank is ended by torchrun, or sees that its connection is gone.
    code, seconds = stop_in(2, phantom_shards, run, lambda process: os.kill(ranks_of(process)[-1], signal.SIGKILL))
    assert code != 0
    assert seconds < 60

    alone = train(phantom_shards, runs, run.name, **LONG)
    assert alone.exit_code == 5
    assert "world_size was 2, is now 1" in alone.stderr

    code, said, errors = together(phantom_shards, runs, run.name, **LONG)
    assert code == 0, errors
    assert "from its last checkpoint" in said
    assert_same_end(run, undisturbed)


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the ranks in /proc")
def test_ranks_that_are_all_killed_go_on_to_the_undisturbed_weights(
    undisturbed: Path, phantom_shards: ShardFolder, runs: Path
) -> None:
    def kill(process: "subprocess.Popen[str]") -> None:
        ranks = ranks_of(process)
        process.kill()
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)

    assert stop_in(2, phantom_shards, runs / "killed", kill)[0] == -signal.SIGKILL
    code, _, errors = together(phantom_shards, runs, "killed", **LONG)
    assert code == 0, errors
    assert_same_end(runs / "killed", undisturbed)


@pytest.mark.parametrize(("mirrored", "sizes"), [(False, "take 8 or 10"), (True, "even parts; take 8 or 12")])
def test_a_batch_that_the_ranks_cannot_share_is_refused_with_the_nearest_that_they_can(
    mirrored: bool, sizes: str
) -> None:
    Distributed(size=2).verify_batch_size(12, mirrored=mirrored)
    with pytest.raises(click.UsageError, match="--batch-size 9 is for all 2 ranks together") as refused:
        Distributed(size=2).verify_batch_size(9, mirrored=mirrored)
    assert sizes in refused.value.message


@pytest.mark.parametrize("changes", [{}, {"batch_size": 9}, {"log_to": "paper"}])
def test_a_dry_run_of_several_ranks_says_everything_once(
    phantom_shards: ShardFolder, tmp_path: Path, changes: dict[str, Any]
) -> None:
    process = start([*command(phantom_shards, tmp_path, "dry", **changes), "--dry-run"])
    said, errors = process.communicate(timeout=TIMEOUT)
    assert (process.returncode == 0) is not bool(changes)
    assert [said.count(text) for text in ("arch ", "trainable parameters", "ranks 2")] == (
        [0] * 3 if changes else [1] * 3
    )
    assert errors.count("\nError: ") == bool(changes)
    assert not list(tmp_path.iterdir())


TAIL = """
import sys, torch
from pathlib import Path
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from shards.folder import open_shards
from trainer.distributed import join
from trainer.optim.precision import Precision
from trainer.options import TrainConfig
from trainer.resolve import RunContext, build_model
from trainer.run_directory import RunDirectory
from trainer.setup import new_state
from trainer.stop_signal import StopSignal

with join("cpu") as (dist, device):
    folder, batch_size = Path(sys.argv[1]), int(sys.argv[2])
    config = TrainConfig(arch="custom_cnn", shards=folder, batch_size=batch_size, loader="resident")
    shards, run = open_shards(folder), RunDirectory(Path(sys.argv[3]), writes=False)
    model = build_model(config, shards)
    state = new_state(RunContext(config, run, shards, Precision("bf16", device), StopSignal(), dist), model, None)
    seen, norms = [], [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.register_forward_pre_hook(
            lambda _, inputs: seen.append((str(inputs[0].dtype), inputs[0].shape[1:], len(inputs[0]) > 0))
        )
    def exchange(_, bucket):
        seen.append((str(bucket.buffer().dtype), bucket.buffer().shape))
        return allreduce_hook(None, bucket)
    state.step.forward._model.register_comm_hook(None, exchange)
    for number, (everywhere, own, batch) in enumerate(state.train.iter_from(0), start=1):
        seen.append(everywhere)
        state.step.backward(batch.images, batch.labels, dist.size * own / everywhere)
        state.step.optimizer_step(number)
    first, second = dist.gather(seen)
    assert first == second, (first, second)
    sys.stdout.write(f"rank {dist.rank}: {own} of {everywhere} in the last batch, {len(seen)} tensors\\n")
"""


def test_a_rank_without_an_image_in_the_last_batch_has_tensors_like_those_of_the_others(
    uneven_shards: ShardFolder, tmp_path: Path
) -> None:
    images = uneven_shards.manifest.splits["train"].images
    batch_size = next(size for size in range(8, images, 2) if images % size == 1)
    program = tmp_path / "tail.py"
    program.write_text(TAIL)
    process = start_ranks([str(program), str(uneven_shards.path), str(batch_size), str(tmp_path / "run")], 2)
    said, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors
    assert "rank 0: 1 of 1 in the last batch" in said
    assert "rank 1: 0 of 1 in the last batch" in said


def test_batch_norm_is_synced_for_few_images_a_gpu_or_where_it_is_asked_for() -> None:
    gpu, cpu, two = torch.device("cuda", 0), torch.device("cpu"), Distributed(size=2)
    assert [should_sync_bn("auto", images, gpu, two) for images in (30, 32)] == [True, False]
    assert should_sync_bn("on", 64, gpu, two) and not should_sync_bn("off", 2, gpu, two)
    assert not should_sync_bn("auto", 2, cpu, two) and not should_sync_bn("on", 2, gpu, Distributed())


def test_synced_batch_norm_on_a_cpu_is_a_usage_error(phantom_shards: ShardFolder, tmp_path: Path) -> None:
    for more in ([], ["--dry-run"]):
        done = CliRunner().invoke(main, [*command(phantom_shards, tmp_path, "synced", sync_bn="on")[3:], *more])
        assert done.exit_code == 2
        assert "--sync-bn on is for GPUs" in done.stderr
    assert not list(tmp_path.iterdir())


SHARES = """
import sys, torch, models
from pathlib import Path
from loaders import LoaderSpec
from shards.folder import open_shards
from trainer.distributed import join
from trainer.feature_cache import chunks, features
from trainer.optim.precision import Precision

chunks.SAVE_EVERY = 0.0
features._SENT_AT_ONCE = 5
with join("cpu") as (dist, device):
    torch.manual_seed(0)
    model = models.create_model("custom_cnn", size=64)
    models.freeze(model, "backbone")
    frozen, ran = models.feature_extractor(model.eval(), "backbone"), []
    def counted(images):
        ran.append(len(images))
        return frozen(images)
    shards = open_shards(Path(sys.argv[1]))
    # The first rank has a batch more than the second.
    batch_size = shards.manifest.splits["train"].images // 2
    spec = LoaderSpec(
        shards, "train", batch_size, device, training=True, flip="random",
        rank=dist.rank, world_size=dist.size,
    )
    precision = Precision("fp32", device)
    stop = lambda: bool(dist.all_reduce_max(0)[0])
    def compute():
        name = f"train-{dist.rank}-of-{dist.size}"
        saved = chunks.FeatureChunks(Path(sys.argv[2]), name, "")
        ran.clear()
        return features.compute_features(
            counted, spec, precision, device, stop=stop, dist=dist, chunks=saved
        )
    mine = compute()
    whole = features.compute_features(frozen, spec, precision, device)
    torch.testing.assert_close(mine.values, whole.values, rtol=1e-5, atol=1e-5)
    assert torch.equal(mine.labels, whole.labels) and torch.equal(mine.rows, whole.rows)
    # In one write, for the ranks share a pipe, and under torchrun print() writes its line break separately.
    sys.stdout.write(f"rank {dist.rank} ran {sum(ran)}\\n")
    if dist.rank:
        next(Path(sys.argv[2]).glob("train-1-of-2-*.pt")).unlink()
    again = compute()
    assert torch.equal(again.values, mine.values) and torch.equal(again.rows, mine.rows)
    sys.stdout.write(f"rank {dist.rank} ran {sum(ran)} again\\n")
"""


def test_each_rank_runs_and_saves_its_share_of_a_frozen_network_and_has_all_of_its_output(
    uneven_shards: ShardFolder, tmp_path: Path
) -> None:
    program = tmp_path / "shares.py"
    program.write_text(SHARES)
    process = start(
        [sys.executable, "-m", str(program), str(uneven_shards.path), str(tmp_path / "features")], module=False
    )
    said, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors
    images = uneven_shards.manifest.splits["train"].images
    # One image more to find the shape; each as it is and mirrored.
    assert f"rank 0 ran {1 + 2 * -(-images // 2)}\n" in said
    assert f"rank 1 ran {1 + 2 * (images // 2)}\n" in said
    # What the second saved was lost.
    assert "rank 0 ran 1 again" in said
    assert f"rank 1 ran {1 + 2 * (images // 2)} again" in said
