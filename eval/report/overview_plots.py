"""Plots of a whole evaluation: subgroups, prevalence, compared runs, training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from eval.report.canvas import COLOURS, new_figure, readable, write
from shards.findings import FINDINGS


def draw_subgroups(macro: pd.DataFrame, overall: float, title: str, path: Path) -> Figure:
    """Write a dot per group to the PNG `path`; return the figure.

    `macro` has one row a group, in the order to draw: attribute, group, images, auroc, and where
    they are known auroc_low and auroc_high (a bar through the dot). `overall` is the AUROC of all
    images, a dotted line. A group whose AUROC is NaN keeps its line, which says so. The file
    is written atomically.
    """
    attributes = list(dict.fromkeys(macro["attribute"]))
    # One free line between attributes sets them apart.
    places = np.arange(len(macro)) + macro["attribute"].map(attributes.index).to_numpy()
    figure = new_figure(9, 1.4 + 0.3 * (places[-1] + 1 if len(places) else 1))
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.axvline(overall, color="grey", linestyle=":", linewidth=1.2, label=f"all images, {overall:.3f}")
    low = macro["auroc_low"] if "auroc_low" in macro else macro["auroc"]
    high = macro["auroc_high"] if "auroc_high" in macro else macro["auroc"]
    for number, attribute in enumerate(attributes):
        colour = COLOURS[number % len(COLOURS)]
        here = (macro["attribute"] == attribute).to_numpy()
        known = here & macro["auroc"].notna().to_numpy()
        axes.hlines(places[known], low[known], high[known], color=colour, linewidth=2, alpha=0.5)
        axes.scatter(macro["auroc"][known], places[known], color=colour, s=42, zorder=3, label=attribute)
        for place in places[here & ~known]:
            axes.text(
                overall,
                place,
                "too few to score",
                ha="center",
                va="center",
                fontsize=8,
                color="0.4",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )
    axes.set_yticks(places, [f"{row.group}  ({row.images:,})" for row in macro.itertuples()], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("Macro AUROC")
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside right upper", fontsize=9)
    write(figure, path)
    return figure


def draw_prevalence(
    prevalence: Mapping[str, Sequence[float | None]], images: Mapping[str, int], title: str, path: Path
) -> Figure:
    """Write a line a finding with a dot per split to the PNG `path`; return the figure.

    `prevalence` gives each split's shares 0..1 in the order of FINDINGS; `images` its size, for
    the legend. A split without images has no dots. The file is written atomically.
    """
    figure = new_figure(9, 1.2 + 0.28 * len(FINDINGS))
    axes = figure.add_subplot()
    axes.set_title(title)
    for number, (split, shares) in enumerate(prevalence.items()):
        known = [(share, place) for place, share in enumerate(shares) if share is not None]
        axes.scatter(
            [100 * share for share, _ in known],
            [place for _, place in known],
            color=COLOURS[number],
            marker="osD^v"[number % 5],
            s=38,
            alpha=0.8,
            label=f"{split}  ({images[split]:,})",
        )
    axes.set_yticks(range(len(FINDINGS)), [readable(finding) for finding in FINDINGS], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("Images that show the finding, %")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside right upper", fontsize=9, title="Split  (images)")
    write(figure, path)
    return figure


_SPREAD = 0.5  # of the distance between two findings, which their runs share


def draw_comparison(auroc: pd.DataFrame, runs: Sequence[str], title: str, path: Path) -> Figure:
    """Write a dot per run and finding with its interval to the PNG `path`; return the figure.

    `auroc` has the columns run, finding, value, low and high; its findings are drawn in their order.
    A value that is NaN has no dot. The file is written atomically.
    """
    rows = list(dict.fromkeys(auroc["finding"]))
    figure = new_figure(9, 1.2 + (0.2 + 0.14 * len(runs)) * len(rows))
    axes = figure.add_subplot()
    axes.set_title(title)
    offsets = np.linspace(-_SPREAD / 2, _SPREAD / 2, len(runs))
    for number, (run, offset) in enumerate(zip(runs, offsets, strict=True)):
        mine = auroc[auroc["run"] == run].set_index("finding").loc[rows]
        places = np.arange(len(rows)) + offset
        colour = COLOURS[number % len(COLOURS)]
        axes.hlines(places, mine["low"], mine["high"], color=colour, linewidth=2, alpha=0.4)
        axes.scatter(mine["value"], places, color=colour, marker="osD^v"[number % 5], s=28, zorder=3, label=run)
    axes.set_yticks(range(len(rows)), [readable(str(row)) for row in rows], fontsize=9)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.invert_yaxis()
    axes.set_xlabel("AUROC, 95 % confidence interval")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside right upper", fontsize=9)
    write(figure, path)
    return figure


def draw_training(epochs: Sequence[Mapping[str, Any]], title: str, path: Path) -> Figure:
    """Write three panels over the epochs to the PNG `path`; return the figure.

    `epochs` are the lines of metrics.jsonl of kind `epoch`, in order: train and val loss with the
    best epoch marked, seconds an epoch, and the share of them spent waiting for the loader in
    percent. The file is written atomically.
    """
    figure = new_figure(9, 6)
    losses, seconds, wait = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1, 1))
    numbers = [line["epoch"] for line in epochs]
    losses.set_title(title)
    for name, colour, label in (("train_loss", COLOURS[0], "train, while it learns"), ("val_loss", COLOURS[1], "val")):
        losses.plot(numbers, [line[name] for line in epochs], color=colour, marker="o", markersize=4, label=label)
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
