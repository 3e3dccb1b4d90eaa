"""What a run's own records say of its training, and what is said of a damaged one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eval.compare import cost_of
from eval.report.page import run_facts
from eval.training_log import read_training_log
from shards.errors import BadData
from tests.eval.report.reporting import a_run
from trainer.model_file import ModelHeader
from trainer.run_directory import RunDirectory


def on(run: RunDirectory, **machine: object) -> RunDirectory:
    run.environment.write_text(json.dumps(machine))
    return run


def test_epochs_are_read_and_options_as_they_were_given(tmp_path: Path) -> None:
    log = read_training_log(a_run(tmp_path / "demo"))
    assert [line["epoch"] for line in log.epochs] == [1, 2, 3]
    assert (log.name, log.config, log.best_epoch) == ("demo", {"arch": "custom_cnn"}, 2)
    assert log.seconds == 60


def test_records_that_are_not_there_are_empty(tmp_path: Path) -> None:
    log = read_training_log(RunDirectory(tmp_path / "none"))
    assert (log.epochs, log.config, log.environment, log.device) == ((), {}, {}, None)


def test_a_last_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    run = a_run(tmp_path / "demo")
    whole = run.metrics.read_text()
    for cut in (2, 10, len(whole.splitlines()[-1]) - 1):
        run.metrics.write_text(whole + whole.splitlines()[-1][:cut])
        assert [line["epoch"] for line in read_training_log(run).epochs] == [1, 2, 3]
        assert len(run.read_metrics()) == len(whole.splitlines())


@pytest.mark.parametrize("damaged", ["{\n", "[]\n", '{"kind": "epo\n', "\n"])
def test_any_other_line_that_is_damaged_is_named(tmp_path: Path, damaged: str) -> None:
    run = a_run(tmp_path / "demo")
    run.metrics.write_text(damaged + run.metrics.read_text())
    with pytest.raises(BadData, match=rf"{re.escape(str(run.metrics))}, line 1 is damaged.*delete that line"):
        read_training_log(run)


@pytest.mark.parametrize(
    "changes",
    [{"seconds": 0}, {"seconds": -1}, {"seconds": 10**400}, {"train_loss": float("inf")}],
    ids=["no time", "negative time", "a huge time", "an infinite loss"],
)
def test_an_epoch_whose_numbers_cannot_be_is_named(tmp_path: Path, changes: dict[str, float]) -> None:
    run = a_run(tmp_path / "demo")
    *others, last = run.metrics.read_text().splitlines()
    run.metrics.write_text("\n".join([*others, json.dumps({**json.loads(last), **changes})]) + "\n")
    with pytest.raises(BadData, match=rf"{re.escape(str(run.metrics))}, line 5 is damaged"):
        read_training_log(run)


def test_an_option_without_a_value_is_damage(tmp_path: Path) -> None:
    run = a_run(tmp_path / "demo")
    run.config.write_text('{"arch": "custom_cnn"}')
    with pytest.raises(BadData, match=r"config\.json, arch is damaged: "):
        read_training_log(run)


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        ({"device_type": "cpu", "device": "x86_64", "cores": 2}, "x86_64, 2 cores"),
        ({"device_type": "cuda", "device": "NVIDIA H200", "cores": 16}, "NVIDIA H200"),
        ({"device_type": "cpu", "device": "x86_64"}, "x86_64"),
    ],
)
def test_cores_are_told_of_a_cpu_and_not_of_a_gpu(tmp_path: Path, machine: dict[str, object], said: str) -> None:
    run = on(a_run(tmp_path / "demo"), **machine)
    assert dict(run_facts(read_training_log(run)))["Device"] == said
    assert cost_of([run], [ModelHeader({}, 7, "0" * 64)]).device == said


def test_what_a_run_cost_is_known_without_torch(tmp_path: Path) -> None:
    run = a_run(tmp_path / "demo")
    code = (
        "import sys; from eval.training_log import read_training_log\n"
        "from trainer.run_directory import RunDirectory\n"
        f"from pathlib import Path; print(read_training_log(RunDirectory(Path({str(run.path)!r}))).seconds)\n"
        "print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["60.0", "False"]
