"""A run's epochs: losses, time, and how long it waited for data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eval.plots.canvas import COLOURS, new_figure, write


def draw_training(epochs: Sequence[Mapping[str, Any]], title: str, path: Path) -> Figure:
    """Write three panels over the epochs to the PNG `path`; return the figure.

    `epochs` are the lines of metrics.jsonl of kind `epoch`, in order: train and val loss with the
    best epoch marked, seconds an epoch, and the share of them spent waiting for the loader in
    percent. The file appears whole or not at all.
    """
    figure = new_figure(9, 6)
    losses, seconds, wait = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1, 1))
    numbers = [line["epoch"] for line in epochs]
    losses.set_title(title)
    for name, colour, label in (
        ("train_loss", COLOURS[0], "train, while it learns"),
        ("val_loss", COLOURS[1], "val"),
    ):
        losses.plot(
            numbers, [line[name] for line in epochs], color=colour, marker="o", markersize=4, label=label
        )
    best = [line["epoch"] for line in epochs if line.get("best")]
    if best:
        losses.axvline(best[-1], color="grey", linestyle=":", linewidth=1, label=f"best, epoch {best[-1]}")
    losses.set_ylabel("Loss")
    losses.legend(fontsize=9)
    seconds.bar(numbers, [line["seconds"] for line in epochs], color=COLOURS[4], width=0.7)
    seconds.set_ylabel("Seconds")
    wait.bar(numbers, [100 * line["data_wait"] for line in epochs], color=COLOURS[3], width=0.7)
    wait.set_ylabel("Data wait, %")
    wait.set_xlabel("Epoch")
    wait.set_xlim(min(numbers) - 0.6, max(numbers) + 0.6)
    wait.xaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in (losses, seconds, wait):
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    write(figure, path)
    return figure
