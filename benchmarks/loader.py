"""How fast batches come, with nothing to train: `python -m benchmarks.loader`.

Side by side on the same images, in turns: `limit`, Pillow's libjpeg-turbo decoding in as many
processes as there are cores, which no loader on this CPU can pass by much; `dali`, whole
batches with random flips; `report`, the PNG files and plain DataLoader this project started
from. The figure is images/s over epochs of train.
"""

import concurrent.futures
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benchmarks.harness import interleave, summary, write_result
from benchmarks.report_path import report_loader, unpack
from loaders import LoaderSpec, make_loader
from shards.cores import available_cores
from shards.findings import FINDINGS
from shards.folder import ShardFolder, SplitReader, open_shards
from shards.pixels import decode_sample


@click.command(context_settings={"show_default": True, "max_content_width": 110})
@click.option(
    "--shards",
    type=click.Path(path_type=Path),
    default="data/shards",
    metavar="FOLDER",
    help="Packed shards to load.",
)
@click.option("--batch-size", type=click.IntRange(1), default=128, metavar="IMAGES", help="Images a batch.")
@click.option(
    "--threads",
    type=click.IntRange(1),
    default=available_cores(),
    metavar="N",
    help="Threads or processes each contender gets.",
)
@click.option("--runs", type=click.IntRange(1), default=5, metavar="N", help="Counted rounds.")
def main(shards: Path, batch_size: int, threads: int, runs: int) -> None:
    """Measure loaders side by side and write benchmarks/results/loader_*.json."""
    folder = open_shards(shards)
    spec = LoaderSpec(
        folder, "train", batch_size, torch.device("cpu"), training=True, flip="random", threads=threads
    )
    with ExitStack() as stack:
        dali = stack.enter_context(make_loader("dali", spec))
        pool = stack.enter_context(_pool(threads))
        files = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "png"
        unpack(folder, "train", files)
        labels = folder.entries.loc[folder.rows("train"), list(FINDINGS)].to_numpy(dtype=np.uint8)
        report = report_loader(files, labels, batch_size, threads)
        contenders: dict[str, Callable[[], float]] = {
            "limit": lambda: _limit(folder, pool, threads),
            "dali": lambda: _rate(dali, dali.samples),
            "report": lambda: _rate(report, dali.samples),
        }
        figures = interleave(contenders, runs)
    results = {name: summary(values) for name, values in figures.items()}
    record: dict[str, Any] = {
        "images": dali.samples,
        "batch_size": batch_size,
        "threads": threads,
        "images_per_second": results,
    }
    click.echo(f"{'loader':12} {'images/s':>10} {'of limit':>9} {'x report':>9}")
    for name, result in results.items():
        median = result["median"]
        of_limit, of_report = median / results["limit"]["median"], median / results["report"]["median"]
        click.echo(f"{name:12} {median:10.0f} {of_limit:9.2f} {of_report:9.2f}")
    click.echo(write_result("loader", record))


def _rate(batches: Iterable[Any], samples: int) -> float:
    # Whole epochs, for at least two seconds: a small set would measure the start of an epoch.
    epochs, start = 0, time.perf_counter()
    while time.perf_counter() - start < 2:
        for _ in batches:
            pass
        epochs += 1
    return epochs * samples / (time.perf_counter() - start)


def _pool(processes: int) -> concurrent.futures.ProcessPoolExecutor:
    return concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))


def _limit(folder: ShardFolder, pool: concurrent.futures.ProcessPoolExecutor, processes: int) -> float:
    # The pure decoding time of the slowest process counts, not its start or its reading.
    times = list(
        pool.map(_decode_share, [folder.path] * processes, range(processes), [processes] * processes)
    )
    return sum(count for count, _ in times) / max(seconds for _, seconds in times)


def _decode_share(path: Path, share: int, shares: int) -> tuple[int, float]:
    reader = SplitReader(open_shards(path), "train")
    encoded = [image.tobytes() for image in reader.read(range(share, len(reader), shares)).images]
    start = time.perf_counter()
    for data in encoded:
        decode_sample(data)
    return len(encoded), time.perf_counter() - start


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.loader")
