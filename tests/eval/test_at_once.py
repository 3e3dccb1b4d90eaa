"""Evaluations of one run at once, as real processes: weights and decisions stay whole, the others wait."""

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from shards.files import exclusive_lock, sha256_of
from tests.eval.commanding import NUMBERS, contents, expect_refusal, score, succeed

ROOT = Path(__file__).parents[2]
TIMEOUT = 600
FINDS_IT_BUSY = 4


@pytest.fixture(scope="module")
def alone(scored: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run scored by one evaluation alone."""
    runs = Path(shutil.copytree(scored, tmp_path_factory.mktemp("alone") / "runs"))
    succeed("small", "--runs", runs, *NUMBERS)
    return runs / "small"


def hold_at_random(processes: Sequence["subprocess.Popen[str]"], lot: random.Random) -> None:
    """Stop one that runs for up to half a second, then another, until all have ended."""
    while running := [process for process in processes if process.poll() is None]:
        held = lot.choice(running)
        held.send_signal(signal.SIGSTOP)
        _wait_for_any(running, lot.uniform(0, 0.5))
        held.send_signal(signal.SIGCONT)
        _wait_for_any(running, lot.uniform(0, 0.5))


def _wait_for_any(running: Sequence["subprocess.Popen[str]"], seconds: float) -> None:
    try:
        running[0].wait(seconds)
    except subprocess.TimeoutExpired:
        return


def evaluate_at_once(run: Path, count: int, seed: int | None = None) -> list[int]:
    """Start so many evaluations of a run; return their exit codes. With a seed they are held at random."""
    return run_at_once([[str(run)]] * count, seed)


def run_at_once(commands: Sequence[list[str]], seed: int | None = None) -> list[int]:
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "eval", *command, *map(str, NUMBERS)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    try:
        if seed is not None:
            hold_at_random(processes, random.Random(seed))
        said = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    print(f"{len(commands)} at once, seed {seed}: exit codes {codes}")
    assert not [text for text in said if "Traceback" in text], said
    assert set(codes) <= {0, FINDS_IT_BUSY} and 0 in codes, said
    return codes


def expect_whole(run: Path, alone: Path, weights: str) -> None:
    assert sha256_of(run / "model.safetensors") == weights
    assert (run / "decisions.json").read_bytes() == (alone / "decisions.json").read_bytes()
    folder = Path("eval", "test")
    for name in ("predictions.csv", "metrics.json", "thresholds.json"):
        assert (run / folder / name).read_bytes() == (alone / folder / name).read_bytes(), name
    assert not list(run.rglob(".*.partial"))


@pytest.mark.parametrize(("count", "seed"), [(2, None), (4, 0)])
def test_evaluations_of_one_run_at_once_leave_what_one_alone_leaves(
    scored: Path, trained: Path, alone: Path, tmp_path: Path, count: int, seed: int | None
) -> None:
    run = Path(shutil.copytree(trained / "small", tmp_path / "small"))
    shutil.copytree(scored / "small" / "eval", run / "eval")  # its predictions, so that all end sooner
    weights = sha256_of(run / "model.safetensors")
    evaluate_at_once(run, count, seed)
    expect_whole(run, alone, weights)


def test_a_run_that_is_busy_too_long_is_named_and_nothing_of_it_changes(
    scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Path(shutil.copytree(scored, tmp_path / "runs"))
    before = contents(runs)
    monkeypatch.setattr("eval.launch.WAIT", 0.2)
    for options in (("other",), ("small", "other", "--average"), ("other", "small", "--compare")):
        with exclusive_lock(runs / "other"):
            numbers = ("--resamples", 2, *NUMBERS[2:])
            refused = score(*options, "--runs", runs, "--threshold-rule", "youden", *numbers)
        expect_refusal(refused, FINDS_IT_BUSY, f"another command is still at work in {runs / 'other'} after 0.2 s")
        assert refused.stderr.splitlines()[0].startswith("waiting up to 0.2 s for another command")
    assert contents(runs) == before


def test_averages_of_the_same_runs_in_another_order_do_not_block_each_other(scored: Path, tmp_path: Path) -> None:
    """Each would wait for a lock that the other holds, and neither would end in time."""
    runs = Path(shutil.copytree(scored, tmp_path / "runs"))
    orders = (("small", "other"), ("other", "small"))
    codes = run_at_once([[*names, "--runs", str(runs), "--average"] for names in orders])
    for code, names in zip(codes, orders, strict=True):
        assert (runs / "+".join(names) / "eval" / "test" / "metrics.json").is_file() == (code == 0)


@pytest.mark.full
@pytest.mark.parametrize("held", [False, True], ids=["running", "held at random"])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_ten_rounds_of_evaluations_at_once_leave_what_one_alone_leaves(
    scored: Path, trained: Path, alone: Path, tmp_path: Path, count: int, held: bool
) -> None:
    """Every other round has no predictions either, so that the model runs."""
    for number in range(10):
        run = Path(shutil.copytree(trained / "small", tmp_path / str(number) / "small"))
        if number % 2:
            shutil.copytree(scored / "small" / "eval", run / "eval")
        weights = sha256_of(run / "model.safetensors")
        evaluate_at_once(run, count, number if held else None)
        expect_whole(run, alone, weights)
