"""What a GPU reaches: `python -m benchmarks.gpu STAGE`, beside what was estimated for an H200 and an H100.

ceilings    what the card can do at all: copy bandwidth, TFLOP/s of a matrix product by dtype
matrix      archs x precision x compiled x batch, end to end with `auto` and on one fixed batch; a cached head
dali        training on `dali`, the loaders side by side, DALI's decoders one by one
profile     the slowest kernels of each arch
final       what the estimates are about, measured longer, and the time that a checkpoint takes from the loop

Every cell is a process of its own with a time limit, the most important ones first. One that fails or is late
is recorded, and the others go on. The JSON file of a stage is written anew after every cell, so nothing
measured is lost. --tiny rehearses each stage on any machine with phantoms, two steps and batches of two: it
shows that everything runs, and its figures mean nothing.

With a GPU for a quarter of an hour, in this order, each only if the one before it passed (DALI need not be
installed before the fourth):

    export CXRAPID_GPU=1
    python -m pytest -m cuda tests/gpu -k smoke                           # 1 minute
    python -m pytest -m cuda tests/gpu --ignore tests/gpu/test_dali.py    # 4 minutes
    python -m benchmarks.gpu matrix --minutes 4
    python -m pytest -m cuda tests/gpu/test_dali.py                       # 1 minute
    python -m benchmarks.gpu dali --minutes 2
    python -m benchmarks.gpu final --minutes 3                            # then profile and ceilings

A change is measured beside what it changes, in one call; `--only resnet50` takes the cells with that in their
names. To try there, since no CPU can tell: compiling ViT's twelve equal blocks once (regional compilation), the
whole step of a cached head as one CUDA graph, and attention that copies neither its input nor its output.
"""

if __name__ == "__main__":
    import shards.startup  # noqa: F401  first: Ctrl-C ends in one line while the rest is imported

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from benchmarks.bench_shards import make_bench_shards
from benchmarks.gpu_plan import ESTIMATES, STAGES, Cell, plan
from benchmarks.harness import RESULTS, result_path, write_result
from shards.console import PATH, Command, FiniteRange, echo
from shards.folder import ShardFolder, open_shards
from shards.packing import SplitRecipe, make_plan, pack
from shards.phantoms import make_phantoms
from shards.pixels import PixelRecipe
from shards.processes import graceful_exit
from trainer.devices import DEVICE_CHOICES, choose_device

OUT = Path("data/gpu-shards")
IMAGES = 16_384
"""Of train: 64 batches of 256 and 16 of 1,024, so that the short last one costs about what it costs on all of NIH."""
TINY_OUT = Path("data/gpu-tiny")
_TINY_IMAGES = 96


def run_cell(cell: Cell, shards: Path, device: str, seconds: float) -> dict[str, Any]:
    """Measure a cell in a process of its own that is ended after so many seconds; return what is recorded of it."""
    task = {"kind": cell.kind, "shards": str(shards), "device": device, "options": cell.options}
    command = [sys.executable, "-m", "benchmarks.gpu_cells", json.dumps(task)]
    result: dict[str, Any] = {"name": cell.name, "kind": cell.kind, "options": cell.options}
    start = time.monotonic()
    # Files, since a pipe would be waited for as long as any process that the cell has started holds it.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, start_new_session=True)
        try:
            code = process.wait(seconds)
            status = "failed" if code else "done"
        except subprocess.TimeoutExpired:
            status = "late"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        result |= {"status": status, "seconds": round(time.monotonic() - start, 1)}
        out.seek(0)
        errors.seek(0)
        if status == "done":
            return {**result, "figures": json.loads(out.read())}
        return {**result, "error": [line.rstrip() for line in errors.read().splitlines() if line.strip()][-20:]}


def measure(
    stage: str, cells: list[Cell], shards: ShardFolder, device: str, path: Path, deadline: float, *, tiny: bool
) -> list[dict[str, Any]]:
    """Measure the cells of a stage, print a line for each, write all so far to `path` after each; return them.

    Those that time.monotonic() has no time left for are recorded as left out.
    """
    record: dict[str, Any] = {
        "stage": stage,
        "tiny": tiny,
        "device": device,
        "size": shards.manifest.size,
        "images": shards.manifest.splits["train"].images,
        "cells": [],
    }
    for cell in cells:
        left = deadline - time.monotonic()
        if left > 0:
            result = run_cell(cell, shards.path, device, min(cell.limit, left))
        else:
            result = {
                "name": cell.name,
                "kind": cell.kind,
                "options": cell.options,
                "status": "left out",
                "seconds": 0.0,
            }
        record["cells"].append(result)
        write_result(stage, record, path)
        echo(_line(stage, result))
    results: list[dict[str, Any]] = record["cells"]
    return results


def _line(stage: str, result: dict[str, Any]) -> str:
    if result["status"] == "done":
        shown = {
            key.replace("_", " "): value
            for key, value in result["figures"].items()
            if not isinstance(value, list | dict)
        }
        words = [
            f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
        ]
        text = ", ".join([*words, *result["figures"].get("log", [])])
    else:
        text = f"{result['status'].upper()}: {(result.get('error') or ['-'])[-1]}"
    return f"{stage:8} {result['seconds']:5.0f} s  {result['name']}: {text}"


def _show_estimates(results: list[dict[str, Any]]) -> None:
    echo(f"\n{'':38} {'reached':>12} {'H200, estimated':>18} {'H100, estimated':>18}  cell")
    for one in ESTIMATES:
        found = one.best(results)
        reached, name = ("-", "not measured") if found is None else (f"{found[0]:,.4g}", found[1])
        echo(f"{one.what:38} {reached:>12} {one.h200:>18} {one.h100:>18}  {name}")


@contextlib.contextmanager
def _shards(given: Path | None, tiny: bool) -> Iterator[ShardFolder]:
    if given is not None or not tiny:
        yield open_shards(given) if given is not None else make_bench_shards(OUT, IMAGES)
        return
    with tempfile.TemporaryDirectory() as folder:
        tree, out = Path(folder) / "tree", Path(folder) / "shards"
        make_phantoms(tree, images=_TINY_IMAGES, size=128, seed=0)
        pack(make_plan(tree, SplitRecipe(val_fraction=0.2)), out, PixelRecipe(size=64))
        yield open_shards(out)


@click.command(cls=Command, context_settings={"show_default": True, "max_content_width": 110})
@click.argument("stage", type=click.Choice([*STAGES, "all"]))
@click.option(
    "--shards",
    type=PATH,
    metavar="FOLDER",
    help=f"Packed shards to train on.  [default: a set of {IMAGES:,} images that is made in {OUT}]",
)
@click.option("--device", default="auto", metavar=DEVICE_CHOICES)
@click.option("--only", default="", metavar="TEXT", help="Only cells whose name, as printed, contains this.")
@click.option(
    "--minutes",
    type=FiniteRange(0, min_open=True),
    metavar="N",
    help="End after so long; what is left then is recorded as left out.  [default: never]",
)
@click.option("--tiny", is_flag=True, help="Rehearse: phantoms, two steps, batches of two.")
@click.option(
    "--out",
    type=PATH,
    metavar="FOLDER",
    help=f"Where the JSON files go.  [default: benchmarks/results, {TINY_OUT} if tiny]",
)
def main(
    stage: str, shards: Path | None, device: str, only: str, minutes: float | None, tiny: bool, out: Path | None
) -> None:
    """Measure what a GPU reaches: STAGE is ceilings, matrix, dali, profile, final or all of them in this order."""
    where = str(choose_device(device))
    folder = out or (TINY_OUT if tiny else RESULTS)
    chosen = [stage] if stage != "all" else list(STAGES)
    results: list[dict[str, Any]] = []
    with graceful_exit(f"the cells measured so far are in {folder}"), _shards(shards, tiny) as packed:
        deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
        for each in chosen:
            cells = [cell for cell in plan(each, tiny=tiny) if only in cell.name]
            path = result_path(each, where, folder)
            results += measure(each, cells, packed, where, path, deadline, tiny=tiny)
            echo(path)
    if {"matrix", "final"} & set(chosen):
        _show_estimates(results)
    echo(f"{sum(one['status'] == 'done' for one in results)} of {len(results)} cells measured")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.gpu")
