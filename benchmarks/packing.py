"""How fast X-rays are packed: `python -m benchmarks.packing`.

On real PNGs, in turns: `pack`, make_shards' own work with 1, 2, .. jobs; `decode`, the limit:
reading and decoding the same files with the fastest decoder at hand and nothing else, in as
many threads (isal + pillow is packing's own); `plain`, what one would write without thinking:
Pillow opens, converts to gray, resizes with Lanczos and saves a PNG, one file after the other.
Images/s are wall time; images per core-second are processor time, workers' included, which others
on the machine disturb less. Stages and decoders are measured one image at a time, resize filters
also by their distance to full Lanczos.
"""

if __name__ == "__main__":
    import shards.startup  # noqa: F401  first: Ctrl-C ends in one line while the rest is imported

import io
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_png

from benchmarks.harness import interleave, summary, write_result
from shards.console import JOBS, Command, echo
from shards.entries import find_images
from shards.packing.shard import Sample, make_fragment
from shards.pixels import REDUCING_GAP, PixelRecipe, encode, open_gray, resize
from shards.processes import available_cores

SIZE = 224
_LABELS = bytes(14)
_MEMORY_IMAGES = (2_000, 10_000)

# The whole command after its imports: metadata, split, pixels, tars, manifest, and its workers from their
# start; memory is the command's peak and its largest worker's. For a process of its own, whose workers do
# not import torch as this one's would.
_PACK = f"""
import json, os, resource, sys, time
from pathlib import Path
from shards.packing import SplitRecipe, make_plan, pack
from shards.pixels import PixelRecipe

tree, out, jobs = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
wall, processor = time.perf_counter(), sum(os.times()[:4])
pack(make_plan(tree, SplitRecipe("random")), out, PixelRecipe({SIZE}), jobs=jobs)
used = {{"wall": time.perf_counter() - wall, "processor": sum(os.times()[:4]) - processor}}
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
used["command"] = int(status["VmHWM"].split()[0]) / 1024  # ru_maxrss may be that of the process before exec
used["worker"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
print(json.dumps(used))
"""


@click.command(cls=Command, context_settings={"show_default": True, "max_content_width": 110})
@click.option(
    "--source",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default="../shared/data/nih_sample",
    metavar="FOLDER",
    help="An NIH tree; the images that are there are used.",
)
@click.option(
    "--images",
    type=click.IntRange(16),
    default=2400,
    metavar="N",
    help="Images packed a round; those of the tree, over again.",
)
@click.option("--jobs", type=JOBS, default=available_cores(), metavar="N", help="Most processes to try.")
@click.option("--runs", type=click.IntRange(1), default=3, metavar="N", help="Counted rounds.")
@click.option("--memory", is_flag=True, help="Also pack 2,000 and 10,000 images and say how much memory that takes.")
def main(source: Path, images: int, jobs: int, runs: int, memory: bool) -> None:
    """Measure packing side by side with its limit and write benchmarks/results/packing_*.json."""
    paths = sorted(source / folder / name for name, folder in find_images(source).items())
    decoders = _decoders()
    decoders_ms = _in_turn(decoders, paths)
    record: dict[str, Any] = {
        "source_images": len(paths),
        "source_bytes_per_image": statistics.mean(path.stat().st_size for path in paths),
        "images": images,
        "decoders_ms": decoders_ms,
        "stages_ms": _stages(paths),
        "filters": _filters(paths),
    }
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        enlarge(source, tree, images)
        fastest = min(decoders_ms, key=lambda name: decoders_ms[name])
        record["throughput"] = _throughput(tree, images, jobs, runs, decoders[fastest])
    if memory:
        record["peak_rss_mib"] = {str(n): _peak_memory(source, n, jobs) for n in _MEMORY_IMAGES}
    record["ratios"] = _ratios(record["throughput"], jobs)
    _show(record)
    echo(write_result("packing", record))


def enlarge(source: Path, tree: Path, images: int) -> None:
    """Make an NIH tree of `images` entries in `tree` by linking to those of `source` over again."""
    (csv,) = source.glob("Data_Entry_2017*.csv*")
    rows = pd.read_csv(csv, dtype=str, keep_default_na=False)
    folders = find_images(source)
    rows = rows[rows["Image Index"].isin(list(folders))]
    (tree / "images_001").mkdir(parents=True)
    copies = []
    for number, row in zip(range(images), itertools.cycle(rows.to_dict("records")), strict=False):
        name = f"{number:08d}_000.png"
        original = source.resolve() / folders[row["Image Index"]] / row["Image Index"]
        (tree / "images_001" / name).symlink_to(original)
        copies.append(row | {"Image Index": name, "Patient ID": str(number)})
    pd.DataFrame(copies).to_csv(tree / "Data_Entry_2017_v2020.csv", index=False)


def _decoders() -> dict[str, Callable[[Path], object]]:
    def isal_pillow(path: Path) -> object:
        return open_gray(path.read_bytes())

    def pillow(path: Path) -> object:
        with Image.open(io.BytesIO(path.read_bytes()), formats=["PNG"]) as image:
            image.load()
        return image

    def torchvision(path: Path) -> object:
        data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
        return decode_png(data, ImageReadMode.GRAY)

    decoders: dict[str, Callable[[Path], object]] = {
        "isal + pillow": isal_pillow,
        "pillow": pillow,
        "torchvision": torchvision,
    }
    try:
        from nvidia.dali import Pipeline, fn, types
    except ImportError:
        return decoders

    with Pipeline(
        batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_pipelined=False, exec_async=False
    ) as pipeline:
        encoded = fn.external_source(name="data", dtype=types.UINT8)
        pipeline.set_outputs(fn.decoders.image(encoded, device="cpu", output_type=types.GRAY))
    pipeline.build()

    def dali(path: Path) -> object:
        pipeline.feed_input("data", [np.frombuffer(path.read_bytes(), dtype=np.uint8)])
        return pipeline.run()

    return {**decoders, "dali": dali}


def _in_turn(contenders: dict[str, Callable[[Path], object]], paths: Sequence[Path]) -> dict[str, float]:
    # Image by image in turns; the mean over images of the best of three, in ms of processor time.
    torch.set_num_threads(1)
    best = {name: [float("inf")] * len(paths) for name in contenders}
    for _ in range(3):
        for number, path in enumerate(paths):
            for name, work in contenders.items():
                start = time.process_time()
                work(path)
                best[name][number] = min(best[name][number], 1000 * (time.process_time() - start))
    return {name: statistics.mean(figures) for name, figures in best.items()}


def _stages(paths: Sequence[Path]) -> dict[str, float]:
    # Each stage gets what the one before made; `write` is tar, hashes and sums: all the rest.
    data = {path: path.read_bytes() for path in paths}
    opened = {path: open_gray(data[path]) for path in paths}
    grays = {path: resize(opened[path], SIZE) for path in paths}
    stages: dict[str, Callable[[Path], object]] = {
        "read": lambda path: path.read_bytes(),
        "decode": lambda path: open_gray(data[path]),
        "resize": lambda path: resize(opened[path], SIZE),
        "encode": lambda path: encode(grays[path], "jpeg", 95),
        "all": lambda path: make_fragment(path.parent, [Sample(1, path.name, _LABELS)], PixelRecipe(SIZE)),
    }
    figures = _in_turn(stages, paths)
    total = figures.pop("all")
    return {**figures, "write": total - sum(figures.values()), "all": total}


def _filters(paths: Sequence[Path]) -> dict[str, dict[str, float]]:
    # Every resize that could be the default, with its mean distance to full Lanczos.
    opened = {path: open_gray(path.read_bytes()) for path in paths}

    def resized(path: Path, name: str, gap: float | None) -> npt.NDArray[np.uint8]:
        filter = Image.Resampling[name.upper()]
        return np.asarray(opened[path].resize((SIZE, SIZE), filter, reducing_gap=gap))

    def psnr(path: Path, choice: Callable[[Path], npt.NDArray[np.uint8]]) -> float:
        error = float(np.mean((choice(path).astype(float) - resized(path, "lanczos", None)) ** 2))
        return float(10 * np.log10(255**2 / max(error, 1e-5)))

    choices = {
        f"{name}{'' if gap is None else f', gap {gap:g}'}": partial(resized, name=name, gap=gap)
        for name in ("lanczos", "bicubic", "hamming", "bilinear", "box")
        for gap in (None, 2.0, REDUCING_GAP)
    }
    milliseconds = _in_turn(dict(choices), paths)
    return {
        name: {"ms": milliseconds[name], "psnr_to_lanczos": statistics.mean(psnr(path, choice) for path in paths)}
        for name, choice in choices.items()
    }


def _throughput(
    tree: Path, images: int, jobs: int, runs: int, decoder: Callable[[Path], object]
) -> dict[str, dict[str, Any]]:
    counts = sorted({1, *(2**n for n in range(jobs.bit_length()) if 2**n <= jobs), jobs})
    paths = sorted((tree / "images_001").iterdir())
    work: dict[str, Callable[[], dict[str, float]]] = {"plain": partial(_timed, partial(_plain, paths))}
    for n in counts:
        work[f"decode, {n} jobs"] = partial(_timed, partial(_decode, paths, decoder, n))
        work[f"pack, {n} jobs"] = partial(_pack, tree, n)
    used: dict[str, list[float]] = {name: [] for name in work}

    def rate(name: str) -> float:
        seconds = work[name]()
        used[name].append(images / seconds["processor"])
        return images / seconds["wall"]

    figures = interleave({name: partial(rate, name) for name in work}, runs)
    return {
        name: {"images_per_second": summary(figures[name]), "images_per_core_second": summary(used[name][1:])}
        for name in work
    }


def _timed(work: Callable[[], object]) -> dict[str, float]:
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}


def _plain(paths: Sequence[Path]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for path in paths:
            with Image.open(path) as image:
                small = image.convert("L").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            small.save(Path(folder) / path.name)


def _decode(paths: Sequence[Path], decode: Callable[[Path], object], jobs: int) -> None:
    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(decode, paths):
            pass


def _pack(tree: Path, jobs: int) -> dict[str, float]:
    # Seconds, as `_timed`, and MiB of memory.
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-c", _PACK, str(tree), out, str(jobs)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    used: dict[str, float] = json.loads(done.stdout)
    return used


def _peak_memory(source: Path, images: int, jobs: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        enlarge(source, tree, images)
        used = _pack(tree, jobs)
    return {name: used[name] for name in ("command", "worker")}


def _ratios(throughput: dict[str, dict[str, Any]], jobs: int) -> dict[str, float]:
    def ratio(one: str, other: str, unit: str = "second") -> float:
        # The median of the ratios of each round: what slows a round down slows both.
        figures = [throughput[name][f"images_per_{unit}"]["runs"] for name in (one, other)]
        return float(statistics.median(a / b for a, b in zip(*figures, strict=True)))

    pack, decode = f"pack, {jobs} jobs", f"decode, {jobs} jobs"
    return {
        "of the decode limit": ratio(pack, decode),
        "of the decode limit, per core-second": ratio(pack, decode, "core_second"),
        f"{jobs} jobs to one": ratio(pack, "pack, 1 jobs"),
        f"{jobs} threads to one, decoding alone": ratio(decode, "decode, 1 jobs"),
        "to the plain way, per core-second": ratio(pack, "plain", "core_second"),
    }


def _show(record: dict[str, Any]) -> None:
    for title in ("decoders_ms", "stages_ms"):
        cells = "  ".join(f"{name} {figure:.2f}" for name, figure in record[title].items())
        echo(f"{title.removesuffix('_ms')}, ms an image: {cells}")
    echo(f"\n{'resize':18} {'ms':>6} {'dB to full Lanczos':>20}")
    for name, choice in record["filters"].items():
        echo(f"{name:18} {choice['ms']:6.2f} {choice['psnr_to_lanczos']:20.1f}")
    echo(f"\n{'':18} {'images/s':>9} {'images/core-s':>14}")
    for name, figures in record["throughput"].items():
        wall, core = figures["images_per_second"]["median"], figures["images_per_core_second"]["median"]
        echo(f"{name:18} {wall:9.1f} {core:14.1f}")
    echo("\n" + "\n".join(f"{name:38} {ratio:.2f}" for name, ratio in record["ratios"].items()))
    if "peak_rss_mib" in record:
        echo(f"peak memory, MiB, by images: {record['peak_rss_mib']}")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.packing")
