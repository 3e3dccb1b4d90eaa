"""Values that no run can have are refused with their range, before anything is built."""

import subprocess
import sys

import pytest
from click.testing import CliRunner

from eval.__main__ import main as evaluation
from tests.trainer.running import ROOT
from trainer.__main__ import main
from trainer.devices import rank_from_env

HUGE = "1000000000000"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--seed", str(2**63)),
        ("--lr", "nan"),
        ("--lr", "inf"),
        ("--weight-decay", "inf"),
        ("--warmup", "nan"),
        ("--clip-grad", "inf"),
        ("--clip", "inf"),
        ("--ema", "nan"),
        ("--label-smoothing", "nan"),
        ("--checkpoint-every", "inf"),
        ("--batch-size", HUGE),
        ("--grad-accum-steps", HUGE),
        ("--accumulate", HUGE),
        ("--threads", HUGE),
        ("--epochs", "1000000000"),
        ("--sweep", "lr=nan"),
    ],
)
def test_training_refuses_what_no_run_can_have(option: str, value: str) -> None:
    extra = ["--freeze", "backbone"] if option == "--sweep" else []
    done = CliRunner().invoke(main, [option, value, "--dry-run", *extra])
    assert done.exit_code == 2, done.output
    last = done.stderr.splitlines()[-1]
    assert option in last
    assert "range" in last or "finite" in last


@pytest.mark.parametrize(
    ("option", "value"), [("--resamples", "1000000000"), ("--seed", str(2**63)), ("--batch-size", HUGE)]
)
def test_evaluation_refuses_what_none_can_have(option: str, value: str) -> None:
    done = CliRunner().invoke(evaluation, ["run", option, value])
    assert done.exit_code == 2, done.output
    assert "range" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("make_shards", ["--val-fraction", "nan"]),
        ("make_shards", ["--seed", str(2**64)]),
        ("make_shards", ["--jobs", "1000000"]),
        ("verify_shards", ["--jobs", "1000000"]),
        ("make_phantoms", ["out", "--images", HUGE]),
        ("fetch_shards", ["url", "out", "--jobs", "1000000"]),
    ],
)
def test_scripts_refuse_what_none_can_have(script: str, options: list[str]) -> None:
    command = [sys.executable, f"scripts/{script}.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "range" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "value"), [("WORLD_SIZE", "x"), ("WORLD_SIZE", "0"), ("RANK", "2"), ("LOCAL_RANK", "-1")]
)
def test_what_torchrun_never_sets_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", name: value}
    for key, text in ranks.items():
        monkeypatch.setenv(key, text)
    done = CliRunner().invoke(main, ["--dry-run"])
    assert done.exit_code == 2, done.output
    assert f"{name}, which torchrun sets, is '{value}'" in done.stderr


def test_ranks_are_read_as_torchrun_sets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rank_from_env() == (0, 1, 0)
    for key, text in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(key, text)
    assert rank_from_env() == (3, 4, 1)
