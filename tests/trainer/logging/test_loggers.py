"""What a run shows of itself: mirrors of metrics.jsonl, and its curves."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shards.folder import ShardFolder
from tests.trainer.running import metrics, train
from trainer import loop


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_shows_what_metrics_jsonl_holds(phantom_shards: ShardFolder, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = train(phantom_shards, tmp_path, "shown", epochs=2, monitor="auroc", log_to="tensorboard")
    assert done.exit_code == 0, done.stderr
    events = EventAccumulator(str(tmp_path / "shown" / "tensorboard"))
    events.Reload()
    for name in ("train_loss", "val_loss", "val_auroc", "lr", "step_ms_p50", "step_ms_p99"):
        shown = [(event.step, event.value) for event in events.Scalars(f"epoch/{name}")]
        assert shown == [
            (line["step"], pytest.approx(line[name], rel=1e-6)) for line in metrics(tmp_path / "shown", "epoch")
        ]
    assert len(events.Scalars("step/grad_norm")) == len(metrics(tmp_path / "shown", "step"))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_is_exit_4_with_the_way_to_get_it(
    phantom_shards: ShardFolder, tmp_path: Path, name: str
) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed: that it is missed is not tested here")
    done = train(phantom_shards, tmp_path, "hidden", log_to=name)
    assert done.exit_code == 4
    assert f"pip install -e '.[{name}]'" in done.stderr


@pytest.mark.parametrize(("monitor", "panels"), [("loss", 2), ("auroc", 3)])
def test_the_curves_are_drawn_with_a_panel_for_each_thing_watched(
    phantom_shards: ShardFolder, tmp_path: Path, monitor: str, panels: int
) -> None:
    done = train(phantom_shards, tmp_path, "drawn", epochs=2, monitor=monitor)
    assert done.exit_code == 0, done.stderr
    with Image.open(tmp_path / "drawn" / "curves.png") as image:
        assert image.format == "PNG"
        assert image.height == pytest.approx(120 * (1.5 + 2.2 * panels), abs=1)


@pytest.mark.parametrize(("every", "drawings"), [(0.0, 3), (3600.0, 1)])
def test_the_curves_are_drawn_now_and_then_and_at_the_end(
    phantom_shards: ShardFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: float, drawings: int
) -> None:
    draw, drawn = loop.draw_curves, []

    def counted(lines: list[dict[str, Any]], title: str, path: Path) -> None:
        drawn.append(len(lines))
        draw(lines, title, path)

    monkeypatch.setattr(loop, "draw_curves", counted)
    monkeypatch.setattr(loop, "CURVES_EVERY", every)
    assert train(phantom_shards, tmp_path, "drawn", epochs=2).exit_code == 0
    assert len(drawn) == drawings
    assert drawn[-1] == len((tmp_path / "drawn" / "metrics.jsonl").read_text().splitlines())
