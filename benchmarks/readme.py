"""The README's tables of figures, made from the newest JSON files: `python -m benchmarks.readme`.

Each stands between the comments <!-- NAME --> and <!-- end -->, so no figure is copied by hand.
"""

if __name__ == "__main__":
    import shards.startup  # noqa: F401  first: Ctrl-C ends in one line while the rest is imported

import re
from pathlib import Path
from typing import Any

import click

from benchmarks.epoch import EPOCHS
from benchmarks.harness import RESULTS
from benchmarks.loader import SIDE_QUESTIONS
from shards.console import Command
from shards.documents import read_json
from shards.files import atomic_write_text

README = Path(__file__).parents[1] / "README.md"


def with_tables(text: str) -> str:
    """Return the README's text with every table as the newest results make it."""
    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", lambda found: _section(found[1]), text, flags=re.DOTALL)


def _section(name: str) -> str:
    path = sorted(RESULTS.glob(f"{name}_*.json"), key=lambda each: (each.stem.rpartition("_")[2], each.stem))[-1]
    record = read_json(path, dict[str, Any])
    parts = [_TABLES[name](record), f"`{record['command']}`, {path.name}"]
    if (plot := path.with_suffix(".png")).is_file():
        parts.append(f"![{_PLOTS[name]}]({plot.relative_to(README.parent)})")
    return "\n".join([f"<!-- {name} -->", "\n\n".join(parts), "<!-- end -->"])


def _loader(record: dict[str, Any]) -> str:
    rates = {name: one["images_per_second"] for name, one in record["loaders"].items()}
    rows = [
        {
            "loader": name,
            "images/s": f"{rates[name]['median']:,.0f}",
            "95 % interval": "{:,.0f} to {:,.0f}".format(*rates[name]["interval95"]),
            "of the limit": f"{rates[name]['median'] / rates['limit']['median']:.2f}",
            "times the baseline paper's": f"{rates[name]['median'] / rates['report']['median']:.1f}",
            "CPU s per 1,000": f"{one['cpu_seconds_per_1000_images']:.3f}",
            "memory, MiB": f"{one['memory_mib']:,.0f}",
            "s to first batch": f"{one['first_batch_seconds']:.2f}",
            "mean displacement": "" if one["displacement"] is None else f"{one['displacement']:.3f} N",
        }
        for name, one in record["loaders"].items()
    ]
    parts = [_table(rows)]
    for title, key in SIDE_QUESTIONS.items():
        if figures := record.get(key):
            medians = ", ".join(f"{name} {one['median']:,.0f}" for name, one in figures.items())
            parts.append(f"{title}: {medians}")
    return "\n\n".join(parts)


def _packing(record: dict[str, Any]) -> str:
    cells = {
        name: [f"{one[rate]['median']:.1f}" for rate in ("images_per_second", "images_per_core_second")]
        for name, one in record["throughput"].items()
    }
    cells |= {name: [f"{ratio:.2f}", ""] for name, ratio in record["ratios"].items()}
    return _table(
        [{"": name, "images/s": wall, "images per core-second": core} for name, (wall, core) in cells.items()]
    )


def _epoch(record: dict[str, Any]) -> str:
    rows = []
    for arch, loaders in record["archs"].items():
        for name, one in loaders.items():
            row = {
                "arch": arch,
                "loader": name,
                "images/s": f"{one['images_per_second']['median']:,.1f}",
                "utilisation": f"{one['utilisation']:.3f}",
                "data wait": f"{one['data_wait']:.2%}",
                "step p50, ms": f"{one['step_ms_p50']:,.0f}",
                "p99, ms": f"{one['step_ms_p99']:,.0f}",
                "peak memory, MiB": f"{one['memory_mib']:,.0f}",
            }
            for what, images in EPOCHS.items():
                row[f"minutes, {what} ({images:,} images)"] = f"{one['epoch_seconds'][what] / 60:,.1f}"
            rows.append(row)
    parts = [_table(rows)]
    if "ladder" in record:
        medians = {name: one["median"] for name, one in record["ladder"]["rungs"].items()}
        first = next(iter(medians.values()))
        variants = [
            {
                f"{record['ladder']['arch']}, each variant adds": name,
                "images/s": f"{rate:,.1f}",
                "gain": f"{rate / before:.2f}",
                "in all": f"{rate / first:.2f}",
            }
            for (name, rate), before in zip(medians.items(), [first, *medians.values()], strict=False)
        ]
        parts.append(_table(variants))
    return "\n\n".join(parts)


def _frozen(record: dict[str, Any]) -> str:
    one = record["frozen"]
    rows = [
        {
            "": name,
            "an epoch, s": f"{one[f'{way}_seconds']:{digits}}",
            "final val loss": f"{one[f'{way}_val_loss']:.6f}",
        }
        for name, way, digits in (
            ("the frozen network in every epoch", "streamed", ".2f"),
            ("its cached output", "cached", ".4f"),
        )
    ]
    title = (
        f"{one['arch']}, `--freeze {one['freeze']}`, {one['images']} images and {one['val_images']} of val: "
        f"{one['speedup']:,.0f} times faster, after caching once in {one['caching_seconds']:.0f} s."
    )
    return f"{title}\n\n{_table(rows)}"


_PLOTS = {"loader": "images/s of every loader", "epoch": "images/s of every arch, loader and variant"}
_TABLES = {"loader": _loader, "packing": _packing, "epoch": _epoch, "frozen": _frozen}


def _table(rows: list[dict[str, str]]) -> str:
    # The keys, the same in every row, are the head.
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


@click.command(cls=Command)
def main() -> None:
    """Write the tables of README.md anew."""
    atomic_write_text(README, with_tables(README.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.readme")
