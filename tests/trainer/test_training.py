"""`python -m trainer` as a user runs it: on phantoms, killed, resumed, and told wrong things."""

import itertools
import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from loaders import LoaderSpec, make_loader
from shards.files import exclusive_lock
from shards.folder import ShardFolder, open_shards
from shards.packing import SplitRecipe, make_plan, pack
from shards.pixels import PixelRecipe
from tests.trainer.running import ROOT, TIMEOUT, command, losses, metrics, train
from trainer.__main__ import main
from trainer.logging.checkpoints import load_checkpoint
from trainer.model_file import load_model
from trainer.optim.losses import make_loss
from trainer.optim.precision import choose_precision
from trainer.step import Step
from trainer.validation import validate

CPU = torch.device("cpu")


def stop_in_epoch_2(shards: ShardFolder, runs: Path, name: str, with_signal: int) -> int:
    """Send a signal once a step of epoch 2 is on record and epoch 1 is saved; return the exit code."""
    process = subprocess.Popen(
        command(shards, runs, name), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    record, last = runs / name / "metrics.jsonl", runs / name / "checkpoints" / "last.pt"
    deadline = time.monotonic() + TIMEOUT
    # A thread saves epoch 1 while epoch 2 trains.
    while not (record.is_file() and '"step", "epoch": 2' in record.read_text() and last.is_file()):
        assert process.poll() is None, "training ended before it could be stopped"
        assert time.monotonic() < deadline
    process.send_signal(with_signal)
    return process.wait(TIMEOUT)


@pytest.fixture(scope="module")
def undisturbed(phantom_shards: ShardFolder, runs: Path) -> Path:
    told = command(phantom_shards, runs, "undisturbed")
    done = subprocess.run(told, cwd=ROOT, timeout=TIMEOUT, check=True, capture_output=True, text=True)
    assert "leak" not in done.stderr  # as libraries say when Python ends before they have cleaned up
    return runs / "undisturbed"


def test_a_run_folder_holds_what_a_reader_needs(undisturbed: Path, phantom_shards: ShardFolder) -> None:
    config = json.loads((undisturbed / "config.json").read_text())
    assert config["lr"] == {"value": 1e-3, "from": "commandline"}
    assert config["seed"] == {"value": 0, "from": "default"}
    environment = json.loads((undisturbed / "environment.json").read_text())
    assert environment["manifest_sha256"] == phantom_shards.digest
    assert environment["versions"]["torch"] == torch.__version__.split("+")[0]
    assert "--arch custom_cnn" in environment["command"]
    epochs = metrics(undisturbed, "epoch")
    assert [line["epoch"] for line in epochs] == [1, 2, 3]
    assert all(line["images_per_second"] > 0 and 0 <= line["data_wait"] <= 1 for line in epochs)
    assert all(line["step"] % 2 == 0 for line in metrics(undisturbed, "step"))
    assert (undisturbed / "log.txt").read_text().count("val loss 0.") == 4


def test_the_best_weights_are_what_is_kept(undisturbed: Path, phantom_shards: ShardFolder) -> None:
    best = min(metrics(undisturbed, "epoch"), key=lambda line: line["val_loss"])
    assert best["best"]
    model, metadata = load_model(undisturbed / "model.safetensors")
    assert (metadata["epoch"], metadata["val_loss"]) == (best["epoch"], best["val_loss"])
    precision = choose_precision("auto", CPU)
    loss = make_loss("bce", "none", phantom_shards.manifest.splits["train"], CPU)
    with make_loader("dali", LoaderSpec(phantom_shards, "val", 8, CPU, training=False)) as val:
        score = validate(val, model, loss, precision.autocast, auroc=False, stop=lambda: False)
    assert score is not None
    assert score.loss == pytest.approx(best["val_loss"], rel=1e-4)


def test_the_same_seed_gives_the_same_losses_to_the_last_digit(
    undisturbed: Path, phantom_shards: ShardFolder, runs: Path
) -> None:
    train(phantom_shards, runs, "again")
    assert losses(runs / "again") == losses(undisturbed)
    assert (runs / "again" / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()


def test_another_seed_gives_other_losses(undisturbed: Path, phantom_shards: ShardFolder, runs: Path) -> None:
    train(phantom_shards, runs, "other", seed=1, epochs=1)
    assert losses(runs / "other")[0] != losses(undisturbed)[0]


@pytest.mark.parametrize(
    ("with_signal", "exit_code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_run_stopped_in_epoch_2_and_resumed_ends_at_the_undisturbed_weights(
    undisturbed: Path, phantom_shards: ShardFolder, runs: Path, with_signal: int, exit_code: int
) -> None:
    name = f"stopped-by-{with_signal}"
    assert stop_in_epoch_2(phantom_shards, runs, name, with_signal) == exit_code
    resumed = train(phantom_shards, runs, name)
    assert resumed.exit_code == 0, resumed.stderr
    assert "from its last checkpoint" in resumed.stdout
    assert losses(runs / name) == losses(undisturbed)
    assert [line["step"] for line in metrics(runs / name, "step")] == [
        line["step"] for line in metrics(undisturbed, "step")
    ]
    assert (runs / name / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()


def test_a_finished_run_is_left_alone(undisturbed: Path, phantom_shards: ShardFolder, runs: Path) -> None:
    before = (undisturbed / "model.safetensors").stat().st_mtime_ns
    done = train(phantom_shards, runs, "undisturbed")
    assert (done.exit_code, "has finished already" in done.stdout) == (0, True)
    assert (undisturbed / "model.safetensors").stat().st_mtime_ns == before


def test_patience_1_stops_at_the_first_rise(phantom_shards: ShardFolder, runs: Path) -> None:
    # A head that learns its few images by heart within a few epochs.
    done = train(
        phantom_shards,
        runs,
        "patient",
        patience=1,
        epochs=20,
        lr=3e-3,
        batch_size=10,
        freeze="backbone",
        weights="none",
        precision="fp32",
    )
    assert done.exit_code == 0, done.stderr
    val = [loss for _, loss in losses(runs / "patient")]
    assert len(val) < 20
    assert val[-1] >= val[-2]
    assert all(later < earlier for earlier, later in itertools.pairwise(val[:-1]))


@pytest.mark.parametrize("changes", [{"freeze": "backbone"}, {"freeze": "partial"}])
def test_frozen_weights_and_statistics_do_not_move(
    phantom_shards: ShardFolder, runs: Path, changes: dict[str, str]
) -> None:
    name = f"frozen-{changes['freeze']}"
    for run, epochs in ((name, 1), (f"{name}-longer", 2)):
        done = train(phantom_shards, runs, run, epochs=epochs, flip="both", pos_weight="sqrt", **changes)
        assert done.exit_code == 0, done.stderr
    short, long = (load_checkpoint(runs / run / "checkpoints" / "last.pt")["model"] for run in (name, f"{name}-longer"))
    moved = {key for key in short if not torch.equal(short[key], long[key])}
    assert moved
    first_stage = [key for key in short if short[key].shape[:2] == (32, 3) or short[key].shape == (32,)]
    assert first_stage
    assert moved.isdisjoint(first_stage)


@pytest.mark.parametrize("arch", ["resnet50", "vit_b_16"])
def test_the_large_archs_train(phantom_shards: ShardFolder, runs: Path, arch: str) -> None:
    done = train(phantom_shards, runs, arch, arch=arch, weights="none", epochs=1, batch_size=32, freeze="backbone")
    assert done.exit_code == 0, done.stderr
    assert len(losses(runs / arch)) == 1


@pytest.mark.parametrize(
    ("changes", "exit_code", "message"),
    [
        ({"arch": "resnet5"}, 2, "'custom_cnn', 'resnet50', 'vit_b_16'"),
        ({"loader": "ffcv"}, 2, "'auto', 'dali', 'resident'"),
        ({"batch_size": 0}, 2, "batch-size"),
        ({"batch_size": 7, "flip": "both"}, 2, "even --batch-size"),
        ({"device": "tpu"}, 2, "auto, cpu, cuda"),
        ({"precision": "fp16", "device": "cpu"}, 2, "bf16 or fp32"),
        ({"shards": "nowhere"}, 3, "make_shards.py"),
        ({"name": "../elsewhere"}, 2, "no plain name"),
        ({"weights": "missing.pth"}, 3, "missing.pth"),
        ({"weights": "imagenet"}, 3, "custom_cnn"),
        ({"device": "cuda:99"}, 4, "GPUs"),
    ],
)
def test_bad_input_gets_one_clear_line_and_its_exit_code(
    phantom_shards: ShardFolder, tmp_path: Path, changes: dict[str, Any], exit_code: int, message: str
) -> None:
    done = train(phantom_shards, tmp_path, "wrong", **changes)
    assert done.exit_code == exit_code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("Error:")] == done.stderr.splitlines()[-1:]


def test_a_diverging_run_stops_and_says_where(phantom_shards: ShardFolder, tmp_path: Path) -> None:
    done = train(phantom_shards, tmp_path, "diverged", lr=1e20)
    assert done.exit_code == 1
    assert "at step" in done.stderr
    assert isinstance(done.exception, SystemExit)


def test_a_val_loss_that_is_no_number_stops_the_run_before_anything_is_kept(
    phantom_shards: ShardFolder, tmp_path: Path
) -> None:
    # One step an epoch: the train loss is taken before it, the val loss after it.
    done = train(phantom_shards, tmp_path, "diverged", lr=1e38, batch_size=1000)
    assert done.exit_code == 1
    assert "the val loss is" in done.stderr
    assert not list((tmp_path / "diverged").glob("checkpoints/*"))


def test_a_start_that_failed_does_not_claim_the_name(phantom_shards: ShardFolder, tmp_path: Path) -> None:
    assert train(phantom_shards, tmp_path, "again", weights="missing.pth").exit_code == 3
    assert train(phantom_shards, tmp_path, "again", weights="none", epochs=1).exit_code == 0


def test_metrics_of_a_first_epoch_that_was_killed_are_forgotten(phantom_shards: ShardFolder, tmp_path: Path) -> None:
    run = tmp_path / "first"
    run.mkdir()
    line = '{"kind": "step", "epoch": 1, "step": 2, "lr": 0.1, "train_loss": 0.5}'
    (run / "metrics.jsonl").write_text(f'{line}\n{{"kind": "st')
    assert train(phantom_shards, tmp_path, "first", epochs=1).exit_code == 0
    steps = [line["step"] for line in metrics(run, "step")]
    assert steps == sorted(set(steps))


def test_a_second_command_for_a_run_at_work_is_refused(phantom_shards: ShardFolder, tmp_path: Path) -> None:
    with exclusive_lock(tmp_path / "busy"):
        done = train(phantom_shards, tmp_path, "busy")
    assert done.exit_code == 4
    assert "another command is at work" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_exit_4(phantom_shards: ShardFolder, tmp_path: Path) -> None:
    run = tmp_path / "full"
    run.mkdir()
    (run / "log.txt").symlink_to("/dev/full")
    done = train(phantom_shards, tmp_path, "full", epochs=1)
    assert done.exit_code == 4
    assert "log.txt: No space left on device" in done.stderr


def test_shards_of_a_size_that_the_arch_cannot_take_are_refused(phantom_tree: Path, tmp_path: Path) -> None:
    pack(make_plan(phantom_tree, SplitRecipe(val_fraction=0.2)), tmp_path / "odd", PixelRecipe(size=20))
    done = train(open_shards(tmp_path / "odd"), tmp_path, "odd-run", arch="vit_b_16", weights="none")
    assert done.exit_code == 3
    assert "multiple of 16" in done.stderr


def test_the_same_name_with_another_setting_is_refused_naming_it(
    undisturbed: Path, phantom_shards: ShardFolder, runs: Path
) -> None:
    done = train(phantom_shards, runs, "undisturbed", lr=1e-4, freeze="partial")
    assert done.exit_code == 5
    assert "lr was 0.001, is now 0.0001" in done.stderr
    assert "freeze was none, is now partial" in done.stderr


@pytest.mark.parametrize(
    ("arch", "freeze", "trainable"),
    [
        ("resnet50", "none", "23,536,718"),
        ("resnet50", "partial", "14,993,422"),
        ("resnet50", "backbone", "28,686"),
        ("vit_b_16", "none", "85,809,422"),
        ("vit_b_16", "backbone", "10,766"),
    ],
)
def test_a_dry_run_prints_the_trainable_parameters(arch: str, freeze: str, trainable: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["--arch", arch, "--freeze", freeze, "--dry-run", "--runs", str(tmp_path)])
    assert done.exit_code == 0, done.stderr
    assert f"trainable parameters {trainable} of" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_dry_run_counts_for_the_shards_that_are_there(phantom_shards: ShardFolder, tmp_path: Path) -> None:
    arguments = ["--arch", "vit_b_16", "--dry-run", "--runs", str(tmp_path)]
    done = CliRunner().invoke(main, [*arguments, "--shards", str(phantom_shards.path)])
    assert done.exit_code == 0, done.stderr
    # Of its 14 x 14 + 1 position embeddings of 768 numbers, 64 px need 4 x 4 + 1.
    assert f"of {85_809_422 - 180 * 768:,}" in done.stdout


def test_running_out_of_the_hosts_memory_is_exit_4_with_a_way_out(
    phantom_shards: ShardFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Step, "backward", lambda *_, **__: torch.empty(2**60, dtype=torch.uint8))
    done = train(phantom_shards, tmp_path, "large", accumulate=3)
    assert done.exit_code == 4
    assert "--batch-size 4 --grad-accum-steps 6" in done.stderr
    assert "Traceback" not in done.stderr
