"""The AUROC of several runs on each finding, side by side."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from eval.plots.canvas import COLOURS, new_figure, readable, write

_SPREAD = 0.5  # of the distance between two findings, which their runs share


def draw_comparison(auroc: pd.DataFrame, runs: Sequence[str], title: str, path: Path) -> Figure:
    """Write a dot per run and finding with its interval to the PNG `path`; return the figure.

    `auroc` has the columns run, finding, value, low and high; its findings are drawn in their order.
    A value that is NaN has no dot. The file appears whole or not at all.
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
        axes.scatter(
            mine["value"], places, color=colour, marker="osD^v"[number % 5], s=28, zorder=3, label=run
        )
    axes.set_yticks(range(len(rows)), [readable(str(row)) for row in rows], fontsize=9)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.invert_yaxis()
    axes.set_xlabel("AUROC with its 95 % interval")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside right upper", fontsize=9)
    write(figure, path)
    return figure
