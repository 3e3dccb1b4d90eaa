"""A start that fails or is killed before it saved anything: what it leaves, and what is said of it."""

from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

from eval.__main__ import main as evaluate
from shards.folder import ShardFolder, open_shards
from shards.packing import SplitRecipe, make_plan, pack
from shards.pixels import PixelRecipe
from tests.trainer.running import command, kill, metrics, train
from trainer.run_directory import find_run
from trainer.step import Step


def listed(runs: Path) -> str:
    return CliRunner().invoke(evaluate, ["--runs", str(runs)]).stdout


@pytest.mark.parametrize(
    ("changes", "exit_code"),
    [
        ({"weights": "missing.pth"}, 3),
        ({"weights": "imagenet"}, 3),
        ({"device": "cuda:99"}, 4),
        ({"log_to": "tensorboard", "batch_size": 0}, 2),
        ({"freeze": "backbone", "cache": "on", "augment": "light"}, 4),
    ],
)
def test_a_start_that_failed_leaves_no_run(
    phantom_shards: ShardFolder, tmp_path: Path, changes: dict[str, Any], exit_code: int
) -> None:
    done = train(phantom_shards, tmp_path, "failed", **changes)
    assert done.exit_code == exit_code, done.stderr
    assert not (tmp_path / "failed").exists()
    assert "no runs in" in listed(tmp_path)
    with pytest.raises(click.UsageError, match="none yet"):
        find_run("failed", tmp_path)


def test_shards_without_val_leave_no_run(phantom_tree: Path, tmp_path: Path) -> None:
    pack(make_plan(phantom_tree, SplitRecipe(val_fraction=0)), tmp_path / "shards", PixelRecipe(size=64))
    done = train(open_shards(tmp_path / "shards"), tmp_path / "runs", "failed")
    assert done.exit_code == 3
    assert "the split val" in done.stderr
    assert not list((tmp_path / "runs").iterdir())


def test_running_out_of_memory_in_the_first_step_leaves_no_run(
    phantom_shards: ShardFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Step, "backward", lambda *_, **__: torch.empty(2**60, dtype=torch.uint8))
    assert train(phantom_shards, tmp_path, "large").exit_code == 4
    assert not (tmp_path / "large").exists()


def test_a_failed_start_leaves_what_it_did_not_make(phantom_shards: ShardFolder, tmp_path: Path) -> None:
    run = tmp_path / "noted"
    (run / "checkpoints").mkdir(parents=True)
    for name in ("notes.txt", "log.txt", "checkpoints/model.onnx"):
        (run / name).write_text("mine\n")
    assert train(phantom_shards, tmp_path, "noted", weights="missing.pth").exit_code == 3
    left = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    assert left == ["checkpoints/model.onnx", "log.txt", "notes.txt"]
    assert (run / "notes.txt").read_text() == "mine\n"
    assert (run / "log.txt").read_text().startswith("mine\n")


def test_a_failed_start_of_a_run_that_saved_something_leaves_it_all(
    phantom_shards: ShardFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, seen = Step.backward, []

    def fails(self: Step, *arguments: Any, **options: Any) -> None:
        seen.append(1)
        if len(seen) == 5:
            raise MemoryError
        add(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "backward", fails)
        assert train(phantom_shards, tmp_path, "begun", checkpoint_steps=2).exit_code == 4
    assert find_run("begun", tmp_path).state == "unfinished"
    assert metrics(tmp_path / "begun", "step")
    assert "unfinished" in listed(tmp_path)
    resumed = train(phantom_shards, tmp_path, "begun")
    assert (resumed.exit_code, "from its last checkpoint" in resumed.stdout) == (0, True)


def test_a_run_that_diverged_stays_on_record(phantom_shards: ShardFolder, tmp_path: Path) -> None:
    assert train(phantom_shards, tmp_path, "diverged", lr=1e20).exit_code == 1
    assert "nothing saved" in listed(tmp_path)
    assert (tmp_path / "diverged" / "log.txt").is_file()


def test_a_start_killed_before_it_saved_is_listed_as_that_and_other_options_begin_anew(
    phantom_shards: ShardFolder, tmp_path: Path
) -> None:
    run = tmp_path / "killed"
    kill(command(phantom_shards, tmp_path, "killed"), (run / "config.json").is_file, 0)
    assert not (run / "checkpoints").exists(), "it was killed too late"
    assert "nothing saved" in listed(tmp_path)
    assert "unfinished" not in listed(tmp_path)
    done = train(phantom_shards, tmp_path, "killed", epochs=1, seed=1)
    assert done.exit_code == 0, done.stderr
    assert "from no weights" in done.stdout


def test_what_killed_processes_left_half_written_is_gone_with_the_next_start(
    phantom_shards: ShardFolder, tmp_path: Path
) -> None:
    run = tmp_path / "left"
    partials = [
        run / ".curves.png.partial",
        run / ".config.json.1a2b.partial",
        run / "checkpoints" / ".last.pt.partial",
        run / "features" / ".train.pt.partial",
        run / "eval" / "test" / ".metrics.json.partial",
    ]
    done = train(phantom_shards, tmp_path, "left", epochs=1)
    assert done.exit_code == 0, done.stderr
    for again in range(2):
        for path in partials:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("half")
        (run / ".notes").write_text("mine")
        if again:
            (run / "model.safetensors").unlink()
            (run / "checkpoints" / "last.pt").unlink()
        assert train(phantom_shards, tmp_path, "left", epochs=1).exit_code == 0
        assert not list(run.rglob("*.partial"))
        assert (run / ".notes").is_file()
