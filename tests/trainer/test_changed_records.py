"""Records and checkpoints of a run that somebody changed, signed again where they are signed."""

import hashlib
import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shards.errors import BadData
from shards.folder import ShardFolder
from tests.trainer.running import stop_at, train
from trainer.logging.checkpoints import load_checkpoint
from trainer.run_directory import RunDirectory

Change = Callable[[dict[str, Any]], object]
OPTIONS = {"epochs": 2, "batch_size": 16, "optimizer": "adam", "ema": 0.5, "loader": "resident"}


def sign(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.with_name(f"{path.name}.sha256").write_text(hashlib.sha256(content).hexdigest() + "\n")


def save(path: Path, state: object) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    sign(path, buffer.getvalue())


@pytest.fixture(scope="module")
def stopped(phantom_shards: ShardFolder, runs: Path) -> Path:
    """A run stopped within its second epoch; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 7)
        assert train(phantom_shards, runs, "stopped", **OPTIONS).exit_code == 143
    return runs / "stopped"


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> RunDirectory:
    return RunDirectory(Path(shutil.copytree(stopped, tmp_path / "stopped")))


def refusal(phantom_shards: ShardFolder, run: RunDirectory, exit_code: int) -> str:
    """Return the one line with which the command is refused."""
    done = train(phantom_shards, run.path.parent, run.name, **OPTIONS)
    assert done.exit_code == exit_code, done.exception
    assert isinstance(done.exception, SystemExit), done.exception
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    return last


def first(state: dict[str, Any], key: str) -> str:
    return next(iter(state[key]))


def put(*path: Any, value: Any) -> Change:
    def change(state: dict[str, Any]) -> None:
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return change


CHECKPOINTS: dict[str, tuple[Change, str]] = {
    "no model": (lambda state: state.pop("model"), "KeyError"),
    "a list for the model": (put("model", value=[]), "TypeError"),
    "text for a weight": (lambda state: state["model"].update({first(state, "model"): "x"}), ""),
    "another shape": (lambda state: state["model"].update({first(state, "model"): torch.zeros(2)}), ""),
    "a NaN weight": (lambda state: next(iter(state["model"].values())).fill_(math.nan), "is not finite"),
    "no average": (put("average", value={}), "state.average has not the same keys"),
    "ranks as a dict": (put("ranks", value={0: {}}), ""),
    "no ranks": (put("ranks", value=None), "TypeError"),
    "two ranks": (lambda state: state["ranks"].append({}), "world_size was 2, is now 1"),
    "a rank that is a list": (put("ranks", 0, value=[]), "state.ranks[0] is a list, not a dict"),
    "no counter": (lambda state: state["ranks"][0]["counters"].pop("applied"), "applied"),
    "a NaN counter": (put("ranks", 0, "counters", "loss_sum", value=torch.tensor(math.nan)), "loss_sum"),
    "a counter of text": (put("ranks", 0, "counters", "applied", value="7"), "is a str, not a tensor"),
    "a step that was bad": (put("ranks", 0, "counters", "first_bad", value=torch.tensor(3)), "good steps"),
    "steps that were not taken": (put("progress", "step", value=70), "not those of 70 good steps"),
    "a random state of no length": (put("ranks", 0, "rng", value=torch.zeros(0, dtype=torch.uint8)), "rng"),
    "a random state of text": (put("ranks", 0, "rng", value="x"), "rng is a str, not a tensor"),
    "another loader": (put("ranks", 0, "loader", "seed", value=9), "seed was 9, is now 0"),
    "an epoch of text": (put("progress", "epoch", value="2"), "state.progress.epoch is a str, not a int"),
    "a huge epoch": (put("progress", "epoch", value=10**40), "state.progress.epoch is no count"),
    "images below 0": (put("progress", "images", value=-16), "state.progress.images is no count"),
    "more images than there are": (put("progress", "images", value=10**6), "at another place"),
    "a batch below 0": (put("ranks", 0, "loader", "batch", value=-1), "loader.batch is no count"),
    "a huge batch": (put("ranks", 0, "loader", "batch", value=10**9), "at another place"),
    "another progress": (put("progress", value={"epoch": 1}), "state.progress has not the same keys"),
    "a NaN best": (put("stopping", "best", value=math.nan), "state.stopping.best is NaN"),
    "a best of text": (put("stopping", "best", value="low"), "state.stopping.best is a str"),
    "an optimizer of nothing": (put("optimizer", value=[]), "TypeError"),
    "a state of no parameter": (put("optimizer", "state", 99, value={}), "there is no such parameter"),
    "a state without exp_avg": (lambda state: state["optimizer"]["state"][0].pop("exp_avg"), "exp_avg"),
    "an infinite exp_avg": (lambda state: state["optimizer"]["state"][0]["exp_avg"].fill_(math.inf), "is not finite"),
    "a scaler": (put("scaler", value={"scale": 1.0}), "state.scaler has not the same keys"),
}


@pytest.mark.parametrize(("change", "cause"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_checkpoint_with_something_else_in_it_is_exit_5_in_one_line(
    phantom_shards: ShardFolder, run: RunDirectory, change: Change, cause: str
) -> None:
    state = load_checkpoint(run.last)
    change(state)
    save(run.last, state)
    assert cause in refusal(phantom_shards, run, 5)


def test_what_options_decide_of_the_optimizer_is_not_taken_from_a_checkpoint(
    phantom_shards: ShardFolder, run: RunDirectory
) -> None:
    state = load_checkpoint(run.last)
    state["optimizer"]["param_groups"] = [{"params": [], "betas": "x"}]
    save(run.last, state)
    assert train(phantom_shards, run.path.parent, run.name, **OPTIONS).exit_code == 0


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "cannot be read: "),
        (b"PK\3\4", "cannot be read: "),
        (b"\x80\x04N.", "cannot be read: "),
        (b"\x80\x02c__builtin__\neval\n.", "cannot be read: "),
    ],
    ids=repr,
)
def test_a_signed_file_that_is_no_checkpoint_is_exit_5(
    phantom_shards: ShardFolder, run: RunDirectory, content: bytes, cause: str
) -> None:
    for path in (run.last, run.previous):
        sign(path, content)
    assert cause in refusal(phantom_shards, run, 5)


@pytest.mark.parametrize("state", [[], None, "x", torch.zeros(3)], ids=repr)
def test_a_signed_checkpoint_that_is_no_state_is_exit_5(
    phantom_shards: ShardFolder, run: RunDirectory, state: object
) -> None:
    for path in (run.last, run.previous):
        save(path, state)
    assert "not the state of a run" in refusal(phantom_shards, run, 5)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda best: best.pop("model"), "best.pt has not the same keys: model"),
        (lambda best: best.pop("val_loss"), "best.pt has not the same keys: val_loss"),
        (lambda best: best.update(val_loss="x"), "best.pt.val_loss is a str, not a float"),
        (lambda best: best.update(epoch=-1), "best.pt.epoch is no count"),
        (lambda best: best["model"].popitem(), "best.pt.model has not the same keys"),
    ],
    ids=range(5),
)
def test_best_weights_with_something_else_in_them_are_exit_5(
    phantom_shards: ShardFolder, run: RunDirectory, change: Change, cause: str
) -> None:
    best = load_checkpoint(run.best)
    assert train(phantom_shards, run.path.parent, run.name, **OPTIONS).exit_code == 0
    run.model.unlink()  # as a kill leaves the run that comes just before it is written
    change(best)
    save(run.best, best)
    assert cause in refusal(phantom_shards, run, 5)
    assert not run.model.exists()


LINE = {"kind": "step", "epoch": 1, "step": 2, "lr": 0.1, "train_loss": 0.5}
EPOCH = {
    **LINE,
    "kind": "epoch",
    "val_loss": 0.4,
    "best": True,
    "seconds": 1.0,
    "data_wait": 0.1,
    "images_per_second": 9.0,
}
METRICS: dict[str, tuple[str, str]] = {
    "no step": (json.dumps({"kind": "step", "epoch": 1}), "required field `step`"),
    "no kind": (json.dumps({"epoch": 1, "step": 1}), "required field `kind`"),
    "another kind": (json.dumps({**LINE, "kind": "x"}), "kind: Invalid enum value 'x'"),
    "a step of text": (json.dumps({**LINE, "step": "2"}), "step: Expected `int`, got `str`"),
    "a step below 0": (json.dumps({**LINE, "step": -2}), "step: Expected `int` >= 0"),
    "a rate of text": (json.dumps({**LINE, "lr": "0.1"}), "lr: Expected `float`, got `str`"),
    "no rate": (json.dumps({"kind": "step", "epoch": 1, "step": 2}), "required field"),
    "NaN": (json.dumps({**LINE, "train_loss": math.nan}), "malformed"),
    "1e999": (json.dumps(LINE).replace("0.5", "1e999"), "out of range"),
    "an epoch without val_loss": (json.dumps({**LINE, "kind": "epoch"}), "required field"),
    "an epoch of no time": (json.dumps({**EPOCH, "seconds": 0}), "seconds: Expected `float` > 0"),
    "a list in it": (json.dumps({**LINE, "more": [1]}), "got `array`"),
    "nested deeply": ('{"kind": ' + "[" * 100_000, "line 1 is damaged: "),
}


@pytest.mark.parametrize(("line", "cause"), METRICS.values(), ids=METRICS)
def test_a_line_of_metrics_that_is_not_ours_is_named_before_anything_is_trained(
    phantom_shards: ShardFolder, run: RunDirectory, line: str, cause: str
) -> None:
    run.metrics.write_text(line + "\n" + run.metrics.read_text())
    with pytest.raises(BadData, match=r"metrics\.jsonl, line 1 is damaged: .*; delete that line") as found:
        run.read_metrics()
    assert cause in found.value.message
    assert cause in refusal(phantom_shards, run, 3)


@pytest.mark.parametrize(
    ("name", "text", "cause"),
    [
        ("config.json", "[" * 100_000, "config.json is damaged: Expected `object`"),
        ("config.json", '{"x": ' + '{"a":' * 100_000, "config.json is damaged: it is nested"),
        ("config.json", '{"arch": {"value": 7}}', "config.json, arch is damaged: value: Expected `str`"),
        ("config.json", '{"lr": {"value": [7]}}', "config.json, lr is damaged: value: Expected"),
        ("config.json", '{"lr": 0.1}', "config.json, lr is damaged: Expected `object`"),
        ("config.json", '{"lr": {"value": 1e999}}', "config.json is damaged: "),
        ("config.json", " " * (2**20 + 1), "config.json has more than 1,048,576 bytes"),
        ("environment.json", '{"cores": "2"}', "environment.json is damaged: cores: Expected `int`"),
        ("environment.json", '{"versions": [1]}', "environment.json is damaged: versions: Expected `object`"),
        ("environment.json", '{"x": ' + "[" * 100_000, "environment.json is damaged: it is nested"),
    ],
    ids=range(10),
)
def test_a_record_of_a_run_that_is_not_ours_is_named_with_its_field(
    phantom_shards: ShardFolder, run: RunDirectory, name: str, text: str, cause: str
) -> None:
    (run.path / name).write_text(text)
    assert cause in refusal(phantom_shards, run, 3)


@pytest.mark.parametrize(
    ("key", "value", "cause"),
    [
        ("cache", "x", "'x' is not one of"),
        ("cache", "auto", "a run has on or off"),
        ("loader", "web", "'web' is not one of"),
    ],
)
def test_an_option_on_record_that_auto_goes_by_is_checked_as_on_the_command_line(
    phantom_shards: ShardFolder, run: RunDirectory, key: str, value: Any, cause: str
) -> None:
    record = json.loads(run.config.read_text())
    record[key]["value"] = value
    run.config.write_text(json.dumps(record))
    options = {**OPTIONS, key: "auto"}
    done = train(phantom_shards, run.path.parent, run.name, **options)
    assert done.exit_code == 3, done.exception
    assert f"config.json, {key} is damaged: {cause}" in done.stderr


@pytest.mark.parametrize("key", ["cache", "loader"])
def test_a_record_without_what_auto_came_to_is_damaged(
    phantom_shards: ShardFolder, run: RunDirectory, key: str
) -> None:
    record = json.loads(run.config.read_text())
    del record[key]
    run.config.write_text(json.dumps(record))
    done = train(phantom_shards, run.path.parent, run.name, **{**OPTIONS, key: "auto"})
    assert done.exit_code == 3, done.exception
    assert f"config.json is damaged: it has no {key}" in done.stderr


def test_a_run_older_than_an_option_resumes_where_that_has_its_default(
    phantom_shards: ShardFolder, run: RunDirectory
) -> None:
    record = json.loads(run.config.read_text())
    del record["label_smoothing"]
    run.config.write_text(json.dumps(record))
    refused = train(phantom_shards, run.path.parent, run.name, **OPTIONS, label_smoothing=0.1)
    assert refused.exit_code == 5, refused.exception
    assert "label_smoothing was 0.0, is now 0.1" in refused.stderr
    resumed = train(phantom_shards, run.path.parent, run.name, **OPTIONS)
    assert resumed.exit_code == 0, resumed.output


def test_a_run_resumes_on_its_device_by_another_name(phantom_shards: ShardFolder, run: RunDirectory) -> None:
    assert run.read_config()["device"] == "auto"
    device = run.read_environment()["device_type"]
    resumed = train(phantom_shards, run.path.parent, run.name, **OPTIONS, device=device)
    assert resumed.exit_code == 0, resumed.output
