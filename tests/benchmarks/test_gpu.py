"""`python -m benchmarks.gpu`: every kind of cell on a CPU, and what happens to cells that fail or take too long."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.gpu import main, measure
from benchmarks.gpu_cells import KINDS
from benchmarks.gpu_cells import measure as measure_here
from benchmarks.gpu_plan import ESTIMATES, STAGES, Cell, plan
from shards.folder import ShardFolder

COPY = Cell("copy", {"mib": 1, "repeats": 1}, 120)


def test_a_stage_is_rehearsed_from_the_command_line(phantom_shards: ShardFolder, tmp_path: Path) -> None:
    options = {"--device": "cpu", "--shards": phantom_shards.path, "--out": tmp_path, "--only": "copy"}
    pairs = [str(text) for pair in options.items() for text in pair]
    done = CliRunner().invoke(main, ["ceilings", "--tiny", *pairs])
    assert done.exit_code == 0, done.output
    assert "1 of 1 cells measured" in done.output
    (path,) = tmp_path.glob("ceilings_cpu*.json")
    record = json.loads(path.read_text())
    assert [cell["status"] for cell in record["cells"]] == ["done"]
    assert record["cells"][0]["figures"]["gb_per_second"] > 0
    assert record["tiny"]


def rehearsed() -> list[Any]:
    cells = {cell.kind: cell for stage in STAGES for cell in plan(stage, tiny=True)}
    return [pytest.param(cell, id=kind) for kind, cell in cells.items()]


@pytest.mark.parametrize("cell", rehearsed())
def test_every_kind_of_cell_measures_something_on_a_cpu(phantom_shards: ShardFolder, cell: Cell) -> None:
    if cell.kind in ("loaders", "decoder"):
        pytest.importorskip("nvidia.dali", exc_type=ImportError)
    options = {**cell.options, "compiled": False} if "compiled" in cell.options else cell.options
    figures = json.loads(json.dumps(measure_here(cell.kind, phantom_shards.path, "cpu", options)))
    numbers = [value for value in figures.values() if isinstance(value, float)]
    assert numbers
    assert all(math.isfinite(number) and number >= 0 for number in numbers)
    assert any(number > 0 for number in numbers)


def test_every_kind_is_in_a_stage_and_the_names_of_a_stage_are_different() -> None:
    kinds = set()
    for stage in STAGES:
        for tiny in (False, True):
            cells = plan(stage, tiny=tiny)
            kinds |= {cell.kind for cell in cells}
            assert len({cell.name for cell in cells}) == len(cells)
    assert kinds == set(KINDS)


def test_the_matrix_begins_with_what_was_estimated_and_holds_every_combination() -> None:
    cells = plan("matrix")
    assert [cell.name for cell in cells[:3]] == [
        "train resnet50 fp16 compiled 256 auto",
        "train vit_b_16 fp16 compiled 256 auto",
        "train custom_cnn fp16 compiled 1024 auto",
    ]
    assert sum(cell.kind == "train" for cell in cells) == 3 * 3 * 2 * 3  # archs, batches, compiled or not, precisions


def test_each_estimate_is_compared_with_the_best_cell_of_the_stage_final() -> None:
    done = [{"name": cell.name, "kind": cell.kind, "options": cell.options, "status": "done"} for cell in plan("final")]
    for one in ESTIMATES:
        results = [{**cell, "figures": {one.figure: float(number)}} for number, cell in enumerate(done)]
        fitting = [cell["name"] for cell in results if one.best([cell])]
        assert len(fitting) == 1
        worse = [{**cell, "figures": {one.figure: 100.0 if "seconds" in one.figure else -1.0}} for cell in results]
        best = one.best([*worse, *results])
        assert best is not None
        assert 0 <= best[0] < len(done)
        assert one.best([{**cell, "status": "late"} for cell in results]) is None


def test_a_cell_that_fails_or_is_late_is_recorded_and_the_others_go_on(
    phantom_shards: ShardFolder, tmp_path: Path
) -> None:
    path = tmp_path / "cells.json"
    cells = [Cell("matmul", {"dtype": "fp7", "side": 8, "repeats": 1}, 120), Cell("copy", COPY.options, 0.1), COPY]
    results = measure("ceilings", cells, phantom_shards, "cpu", path, math.inf, tiny=True)
    assert [cell["status"] for cell in results] == ["failed", "late", "done"]
    assert results[0]["error"][-1] == "KeyError: 'fp7'"
    assert json.loads(path.read_text())["cells"] == results


def test_what_there_is_no_time_left_for_is_left_out_and_on_record(phantom_shards: ShardFolder, tmp_path: Path) -> None:
    path = tmp_path / "cells.json"
    results = measure("ceilings", [COPY], phantom_shards, "cpu", path, time.monotonic(), tiny=True)
    assert [cell["status"] for cell in json.loads(path.read_text())["cells"]] == ["left out"]
    assert "figures" not in results[0]
