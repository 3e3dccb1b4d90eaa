"""Draw what was measured: `python -m benchmarks.plot` redraws every result that has a plot."""

import json
from pathlib import Path
from typing import Any

import click
from matplotlib.figure import Figure

from benchmarks.harness import RESULTS


def plot_loader(record: dict[str, Any], path: Path) -> Path:
    """Draw the images/s of every contender with its interval, and return the path of the PNG."""
    loaders = record["loaders"]
    names = sorted(loaders, key=lambda name: loaders[name]["images_per_second"]["median"])
    medians = [loaders[name]["images_per_second"]["median"] for name in names]
    bounds = [loaders[name]["images_per_second"]["interval95"] for name in names]
    figure = Figure(figsize=(7, 0.4 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots()
    spread = [
        [middle - low for middle, (low, _) in zip(medians, bounds, strict=True)],
        [high - middle for middle, (_, high) in zip(medians, bounds, strict=True)],
    ]
    bars = axes.barh(names, medians, xerr=spread, color="tab:blue", ecolor="black", capsize=3)
    axes.bar_label(bars, [f"{median:,.0f}" for median in medians], padding=6)
    axes.set_xscale("log")
    axes.set_xlabel(f"images/s ({record['size']} px, batches of {record['batch_size']})")
    axes.margins(x=0.15)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return path


@click.command()
def main() -> None:
    """Redraw the plots in benchmarks/results from their JSON files."""
    for path in sorted(RESULTS.glob("loader_*.json")):
        click.echo(plot_loader(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".png")))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.plot")
