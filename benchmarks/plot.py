"""Draw what was measured: `python -m benchmarks.plot` redraws every result that has a plot."""

if __name__ == "__main__":
    import shards.startup  # noqa: F401  first: Ctrl-C ends in one line while the rest is imported

from pathlib import Path
from typing import Any

import click
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import RESULTS
from shards.console import Command, echo
from shards.documents import read_json


def plot_loader(record: dict[str, Any], path: Path) -> Path:
    """Draw the images/s of every contender with its interval, and return the path of the PNG."""
    loaders = record["loaders"]
    names = sorted(loaders, key=lambda name: loaders[name]["images_per_second"]["median"])
    rates = {name: loaders[name]["images_per_second"] for name in names}
    figure = Figure(figsize=(7, 0.4 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots()
    _bars(axes, rates, [f"{one['median']:,.0f}" for one in rates.values()])
    axes.set_xscale("log")
    axes.set_xlabel(f"images/s ({record['size']} px, batches of {record['batch_size']})")
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return path


def plot_epoch(record: dict[str, Any], path: Path) -> Path:
    """Draw the images/s of every arch and loader, and of each variant of the ablation; return the PNG's path."""
    panels = []
    for arch, loaders in record["archs"].items():
        rates = {name: one["images_per_second"] for name, one in loaders.items()}
        panels.append((arch, rates, rates["synthetic"]["median"]))
    if "ladder" in record:
        rates = record["ladder"]["rungs"]
        title = f"{record['ladder']['arch']}, each variant adds"
        panels.append((title, rates, next(iter(rates.values()))["median"]))
    heights = [len(rates) + 1 for _, rates, _ in panels]
    figure = Figure(figsize=(7, 0.35 * sum(heights) + 0.6), layout="constrained")
    subplots = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, rates, base) in zip(subplots, panels, strict=True):
        labels = [f"{one['median']:,.1f} ({one['median'] / base:.2f})" for one in rates.values()]
        _bars(axes, rates, labels)
        axes.invert_yaxis()
        axes.set_title(title, loc="left", fontsize=10)
    subplots[-1].set_xlabel(
        f"images/s end to end ({record['size']} px, batches of {record['batch_size']}, {record['precision']});\n"
        "in brackets: of the ceiling, synthetic, or times the first variant"
    )
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return path


def _bars(axes: Axes, rates: dict[str, Any], labels: list[str]) -> None:
    medians = [one["median"] for one in rates.values()]
    spread = [
        [one["median"] - one["interval95"][0] for one in rates.values()],
        [one["interval95"][1] - one["median"] for one in rates.values()],
    ]
    bars = axes.barh(list(rates), medians, xerr=spread, color="tab:blue", ecolor="black", capsize=3)
    axes.bar_label(bars, labels, padding=6)
    axes.margins(x=0.25)


PLOTS = {"loader": plot_loader, "epoch": plot_epoch}
"""What a result's file name begins with -> what draws it."""


@click.command(cls=Command)
def main() -> None:
    """Redraw the plots in benchmarks/results from their JSON files."""
    for name, draw in PLOTS.items():
        for path in sorted(RESULTS.glob(f"{name}_*.json")):
            echo(draw(read_json(path, dict[str, Any]), path.with_suffix(".png")))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.plot")
