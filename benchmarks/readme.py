"""The README's tables of figures, made from the newest JSON files: `python -m benchmarks.readme`.

Each stands between the comments <!-- NAME --> and <!-- end -->, so no figure is copied by hand.
"""

if __name__ == "__main__":
    import shards.startup  # noqa: F401  first: Ctrl-C ends in one line while the rest is imported

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from benchmarks.epoch import EPOCHS
from benchmarks.harness import RESULTS
from shards.console import Command
from shards.files import atomic_write_text

README = Path(__file__).parents[1] / "README.md"


def with_tables(text: str) -> str:
    """Return the README's text with every table as the newest results make it."""
    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", lambda found: _section(found[1]), text, flags=re.DOTALL)


def _section(name: str) -> str:
    path = sorted(RESULTS.glob(f"{name}_*.json"), key=lambda each: (each.stem.rpartition("_")[2], each.stem))[-1]
    record = json.loads(path.read_text(encoding="utf-8"))
    parts = [_TABLES[name](record), f"`{record['command']}`, {path.name}"]
    if (plot := path.with_suffix(".png")).is_file():
        parts.append(f"![{_PLOTS[name]}]({plot.relative_to(README.parent)})")
    return "\n".join([f"<!-- {name} -->", "\n\n".join(parts), "<!-- end -->"])


def _loader(record: dict[str, Any]) -> str:
    loaders = record["loaders"]
    limit, report = (loaders[name]["images_per_second"]["median"] for name in ("limit", "report"))
    rows = []
    for name, one in loaders.items():
        rate = one["images_per_second"]
        low, high = rate["interval95"]
        shuffle = "" if one["displacement"] is None else f"{one['displacement']:.3f} N"
        rows.append(
            [
                name,
                f"{rate['median']:,.0f}",
                f"{low:,.0f} to {high:,.0f}",
                f"{rate['median'] / limit:.2f}",
                f"{rate['median'] / report:.1f}",
                f"{one['cpu_seconds_per_1000_images']:.3f}",
                f"{one['memory_mib']:,.0f}",
                f"{one['first_batch_seconds']:.2f}",
                shuffle,
            ]
        )
    head = [
        "loader",
        "images/s",
        "95 % interval",
        "of the limit",
        "times the baseline paper's",
        "CPU s per 1,000",
        "memory, MiB",
        "s to first batch",
        "mean displacement",
    ]
    lines = [_table(head, rows)]
    for title, figures in (
        ("dali by threads", record["threads_of_dali"]),
        ("First epoch from a cold page cache", record["cold_page_cache"]),
    ):
        lines.append(f"{title}: " + ", ".join(f"{key} {one['median']:,.0f}" for key, one in figures.items()))
    return "\n\n".join(lines)


def _packing(record: dict[str, Any]) -> str:
    rows = [
        [name, f"{one['images_per_second']['median']:.1f}", f"{one['images_per_core_second']['median']:.1f}"]
        for name, one in record["throughput"].items()
    ]
    ratios = [[name, f"{ratio:.2f}", ""] for name, ratio in record["ratios"].items()]
    return _table(["", "images/s", "images per core-second"], rows + ratios)


def _epoch(record: dict[str, Any]) -> str:
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "images/s": lambda one: f"{one['images_per_second']['median']:,.1f}",
        "utilisation": lambda one: f"{one['utilisation']:.3f}",
        "data wait": lambda one: f"{one['data_wait']:.2%}",
        "step p50, ms": lambda one: f"{one['step_ms_p50']:,.0f}",
        "p99, ms": lambda one: f"{one['step_ms_p99']:,.0f}",
    }
    every = [(arch, name, one) for arch, loaders in record["archs"].items() for name, one in loaders.items()]
    if all("memory_mib" in one for *_, one in every):  # results until 2026-11-23 have no figure of each
        columns["peak memory, MiB"] = lambda one: f"{one['memory_mib']:,.0f}"
    for what, images in EPOCHS.items():
        columns[f"minutes, {what} ({images:,} images)"] = lambda one, what=what: (  # type: ignore[misc]
            f"{one['epoch_seconds'][what] / 60:,.1f}"
        )
    rows = [[arch, name, *(show(one) for show in columns.values())] for arch, name, one in every]
    lines = [_table(["arch", "loader", *columns], rows)]
    if "ladder" in record:
        medians = {name: one["median"] for name, one in record["ladder"]["rungs"].items()}
        first = next(iter(medians.values()))
        before = [first, *medians.values()]
        variants = [
            [name, f"{rate:,.1f}", f"{rate / last:.2f}", f"{rate / first:.2f}"]
            for (name, rate), last in zip(medians.items(), before, strict=False)
        ]
        lines.append(_table([f"{record['ladder']['arch']}, each variant adds", "images/s", "gain", "in all"], variants))
    return "\n\n".join(lines)


def _frozen(record: dict[str, Any]) -> str:
    one = record["frozen"]
    head = ["", "an epoch, s", "final val loss"]
    rows = [
        ["the frozen network in every epoch", f"{one['streamed_seconds']:.2f}", f"{one['streamed_val_loss']:.6f}"],
        ["its cached output", f"{one['cached_seconds']:.4f}", f"{one['cached_val_loss']:.6f}"],
    ]
    title = (
        f"{one['arch']}, `--freeze {one['freeze']}`, {one['images']} images and {one['val_images']} of val: "
        f"{one['speedup']:,.0f} times faster, after caching once in {one['caching_seconds']:.0f} s."
    )
    return f"{title}\n\n{_table(head, rows)}"


_PLOTS = {"loader": "images/s of every loader", "epoch": "images/s of every arch, loader and variant"}
_TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "loader": _loader,
    "packing": _packing,
    "epoch": _epoch,
    "frozen": _frozen,
}


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


@click.command(cls=Command)
def main() -> None:
    """Write the tables of README.md anew."""
    atomic_write_text(README, with_tables(README.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.readme")
