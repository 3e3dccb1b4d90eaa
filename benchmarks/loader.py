"""How fast batches come, with nothing to train: `python -m benchmarks.loader`.

Side by side on the same images, in turns, each in a process of its own:

limit       the fastest decoder in the run and nothing else, in as many processes as there are cores:
            simplejpeg (a development extra) and torchvision's both take turns, and the record says which
            it is. Both are libjpeg-turbo; Pillow's is a third slower
dali, resident, webdataset, dataloader
            this project's loaders, whole batches with random flips; `dali light` and `dali strong`
            with augmentation. resident is measured from its second epoch on
plain webdataset
            the webdataset library's own pipeline over the same shards, as its documentation writes it
tuned       what a good engineer makes of torch's DataLoader: gray JPEG files, uint8 batches, pinned memory
report      the baseline paper's own way: RGB PNG files that were resized to 224 px ahead, ToTensor,
            Normalize, float32 batches, a plain DataLoader
raw         the same from the download's 1024 px files, resized each time they are read
"""

if __name__ == "__main__":
    import shards.startup  # noqa: F401  first: Ctrl-C ends in one line while the rest is imported

import math
import os
import statistics
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from benchmarks.bench_shards import IMAGES, OUT, default_shards
from benchmarks.contenders import Contender, Task, contend, usable_decoders
from benchmarks.harness import interleave, summary, write_result
from benchmarks.plot import plot_loader
from loaders import LOADERS
from shards.console import PATH, Command, echo
from shards.folder import open_shards
from shards.processes import available_cores
from trainer.devices import DEVICE_CHOICES, choose_device

_LOADERS = ("dali", "dali light", "dali strong", "resident", "webdataset", "dataloader")
CONTENDERS = ("limit", *_LOADERS, "plain webdataset", "tuned", "report", "raw")
_RAW = Path("../shared/data/nih_sample")
_COLD = ("dali", "webdataset")
SIDE_QUESTIONS = {
    "limit by decoder": "limit_decoders",
    "dali by threads": "threads_of_dali",
    "First epoch from a cold page cache": "cold_page_cache",
}
"""What is printed below the table -> where the record has it, if it was measured."""
_FEW_RUNS = 3  # of the side questions: threads, cold cache


@click.command(cls=Command, context_settings={"show_default": True, "max_content_width": 110})
@click.option(
    "--shards",
    type=PATH,
    metavar="FOLDER",
    help=f"Packed shards to load.  [default: data/shards, or a set of {IMAGES:,} images that is made in {OUT}]",
)
@click.option("--batch-size", type=click.IntRange(1), default=256, metavar="IMAGES", help="Images a batch.")
@click.option(
    "--threads",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Threads or processes of each; 0: each loader's own choice, and one a core for the others.",
)
@click.option(
    "--device", default="auto", metavar=DEVICE_CHOICES, help="Where batches go; auto: to a GPU if there is one."
)
@click.option("--runs", type=click.IntRange(1), default=5, metavar="N", help="Counted rounds.")
@click.option("--limit", type=click.IntRange(0), default=0, metavar="IMAGES", help="Images a measurement; 0: an epoch.")
@click.option("--loaders", default=",".join(CONTENDERS), metavar="NAMES", help="Who takes part, separated by commas.")
@click.option("--scaling/--no-scaling", default=True, help="Measure dali by the number of its threads, too.")
@click.option("--cold/--no-cold", default=True, help="Measure a first epoch from a cold page cache, too.")
@click.option(
    "--raw",
    type=PATH,
    default=_RAW,
    metavar="FOLDER",
    help="An NIH tree of full-size images, for raw; left out where it is not there.",
)
@click.option(
    "--json",
    "out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where the figures go, and beside it the plot.  [default: in benchmarks/results, if everything is measured]",
)
def main(
    shards: Path | None,
    batch_size: int,
    threads: int,
    device: str,
    runs: int,
    limit: int,
    loaders: str,
    scaling: bool,
    cold: bool,
    raw: Path,
    out: Path | None,
) -> None:
    """Measure loaders side by side and write benchmarks/results/loader_*.json and .png."""
    chosen = list(dict.fromkeys(name.strip() for name in loaders.split(",")))
    if unknown := [name for name in chosen if name not in CONTENDERS and name not in LOADERS]:
        raise click.UsageError(
            f"--loaders names {unknown[0]!r}; known are {', '.join(dict.fromkeys((*CONTENDERS, *LOADERS)))}"
        )
    if not raw.is_dir():
        chosen = [name for name in chosen if name != "raw"]
    where = str(choose_device(device))
    path = shards or default_shards()
    manifest = open_shards(path).manifest
    cores = threads or available_cores()

    def task(name: str, count: int = threads) -> Task:
        own = name.partition(" ")[0] in LOADERS
        return Task(name, str(path), count if own else count or cores, batch_size, where, str(raw), limit)

    decoders = usable_decoders(manifest.extension)
    if "limit" in chosen and "simplejpeg" not in decoders:
        echo("note: the limit is torchvision's decoder; simplejpeg, which may be faster, is not installed", err=True)
    limits = [f"limit {name}" for name in decoders] if "limit" in chosen else []
    raced = _race([task(name) for name in (*limits, *chosen) if name != "limit"], runs)
    record: dict[str, Any] = {
        "images": manifest.splits["train"].images,
        "size": manifest.size,
        "bytes_per_image": sum(s.bytes for s in manifest.shards) / sum(s.samples for s in manifest.shards),
        "batch_size": batch_size,
        "threads": threads,
        "device": where,
        "loaders": {name: one for name, one in raced.items() if name not in limits},
    }
    if limits:
        record |= fastest_limit({name.removeprefix("limit "): raced[name] for name in limits})
        record["loaders"] = {"limit": raced[f"limit {record['limit_decoder']}"], **record["loaders"]}
    if scaling and "dali" in chosen:
        counts = sorted({1, *(2**n for n in range(cores.bit_length()) if 2**n <= cores), cores, cores + 1})
        record["threads_of_dali"] = {
            str(n): _race([task("dali", n)], _FEW_RUNS)["dali"]["images_per_second"] for n in counts
        }
    if cold:
        record["cold_page_cache"] = {
            name: summary([_cold(replace(task(name), limit=record["images"]), path) for _ in range(_FEW_RUNS)])
            for name in _COLD
            if name in chosen
        }
    _show(record)
    if out is None and not (scaling and cold and not limit and {*chosen, "raw"} == set(CONTENDERS)):
        return  # a partial result is saved only where --json names a file
    written = write_result("loader", record, out)
    echo(f"{written}\n{plot_loader(record, written.with_suffix('.png'))}")


def fastest_limit(raced: dict[str, Any]) -> dict[str, Any]:
    """Return which of the decoders is the limit, and what each of them does, of the results by decoder."""
    rates = {name: one["images_per_second"] for name, one in raced.items()}
    fastest = max(rates, key=lambda name: float(rates[name]["median"]))
    return {"limit_decoder": fastest, "limit_decoders": rates}


def _race(tasks: list[Task], runs: int) -> dict[str, Any]:
    details: dict[str, list[dict[str, float]]] = defaultdict(list)

    def rate(contender: Contender) -> float:
        figures = contender.measure()
        details[contender.task.name].append(figures)
        return figures["images"] / figures["seconds"]

    with contend(tasks) as contenders:
        sweeps = {name: one.sweep_seconds for name, one in contenders.items()}
        rates = interleave({name: partial(rate, one) for name, one in contenders.items()}, runs)
    result = {}
    for name, figures in rates.items():
        warm_up, *counted = details[name]
        cpu = statistics.median(1000 * one["cpu_seconds"] / one["images"] for one in counted)
        displacement = statistics.mean(one["displacement"] for one in counted)
        result[name] = {
            "images_per_second": summary(figures),
            "images_per_core_second": 1000 / cpu,
            "cpu_seconds_per_1000_images": cpu,
            "memory_mib": max(one["memory"] for one in details[name]) / 2**20,
            "first_batch_seconds": warm_up["first_batch"],
            "decoder_sweep_seconds": sweeps[name],
            "displacement": None if math.isnan(displacement) else displacement,
        }
    return result


def _cold(task: Task, shards: Path) -> float:
    # The first epoch of a new process, with no page of the shards in memory.
    with contend([task]) as contenders:
        for tar in shards.glob("*.tar"):
            with tar.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        figures = contenders[task.name].measure()
    return figures["images"] / figures["seconds"]


def _show(record: dict[str, Any]) -> None:
    medians = {name: one["images_per_second"]["median"] for name, one in record["loaders"].items()}
    limit, report = (medians.get(name, math.nan) for name in ("limit", "report"))
    echo(
        f"{'':16} {'images/s':>9} {'95 % interval':>17} {'of limit':>9} {'x report':>9} {'cpu s/1000':>11} "
        f"{'MiB':>6} {'first s':>8} {'sweep s':>8} {'shuffle':>8}"
    )
    for name, one in record["loaders"].items():
        rate = one["images_per_second"]
        low, high = rate["interval95"]
        shuffle = "" if one["displacement"] is None else f"{one['displacement']:.3f}"
        echo(
            f"{name:16} {rate['median']:9.0f} {low:8.0f}..{high:<7.0f} {rate['median'] / limit:9.2f} "
            f"{rate['median'] / report:9.1f} {one['cpu_seconds_per_1000_images']:11.3f} "
            f"{one['memory_mib']:6.0f} {one['first_batch_seconds']:8.2f} {one['decoder_sweep_seconds']:8.2f} "
            f"{shuffle:>8}"
        )
    for title, key in SIDE_QUESTIONS.items():
        if figures := record.get(key):
            echo(f"{title}: " + "  ".join(f"{name}: {one['median']:.0f}" for name, one in figures.items()))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.loader")
