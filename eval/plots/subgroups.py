"""The macro AUROC of every group of patients, with its interval."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from eval.plots.canvas import COLOURS, new_figure, write


def draw_subgroups(macro: pd.DataFrame, overall: float, title: str, path: Path) -> Figure:
    """Write a dot per group to the PNG `path`; return the figure.

    `macro` has one row a group, in the order to draw: attribute, group, images, auroc, and where
    they are known auroc_low and auroc_high (a bar through the dot). `overall` is the AUROC of all
    images, a dotted line. A group whose AUROC is NaN keeps its line, which says so. The file
    appears whole or not at all.
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
                overall, place, "too few to score", ha="center", va="center", fontsize=8, color="0.4",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )  # fmt: skip
    axes.set_yticks(places, [f"{row.group}  ({row.images:,})" for row in macro.itertuples()], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("Macro AUROC")
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside right upper", fontsize=9)
    write(figure, path)
    return figure
