"""The confusion matrices of all findings at their thresholds."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.plots.canvas import new_panels, readable, write

_DARK = 0.62  # share from which white digits are easier to read on the blue


def draw_confusion(per_finding: pd.DataFrame, title: str, path: Path) -> Figure:
    """Write one 2 x 2 matrix per finding to the PNG `path`; return the figure.

    `per_finding` is the table of Scores: index finding, columns tp, fp, fn, tn and threshold. A
    row is the label, a column the decision. The colour, and the percentage under each count, is
    the share of its row: sensitivity and specificity lie on the diagonal. A finding without a
    threshold keeps its panel, which says so. The file appears whole or not at all.
    """
    figure, axes, key = new_panels(len(per_finding), title)
    for finding, panel in zip(per_finding.index, axes, strict=True):
        row = per_finding.loc[finding]
        panel.set_title(readable(str(finding)), fontsize=10)
        if pd.isna(row["threshold"]) or pd.isna(row["tp"]):
            panel.set_axis_off()
            panel.text(0.5, 0.5, "no threshold", ha="center", va="center", color="0.4")
            continue
        counts = np.array([[row["tn"], row["fp"]], [row["fn"], row["tp"]]], dtype=np.int64)
        _draw_matrix(panel, counts)
        panel.set_xlabel(f"at {row['threshold']:.3g}", fontsize=8, labelpad=1)
    key.text(
        0.0,
        0.5,
        "rows: the label\ncolumns: the decision\nat the threshold below\n\n"
        "%: share of the row,\nso the lower right is\nthe sensitivity, the\nupper left the specificity",
        va="center",
        fontsize=8.5,
        color="0.25",
        transform=key.transAxes,
    )
    write(figure, path)
    return figure


def _draw_matrix(panel: Axes, counts: np.ndarray[tuple[int, int], np.dtype[np.int64]]) -> None:
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    panel.imshow(shares, cmap="Blues", vmin=0, vmax=1.15)
    panel.set_xticks([0, 1], ["no", "yes"], fontsize=8)
    panel.set_yticks([0, 1], ["no", "yes"], fontsize=8)
    panel.tick_params(length=0)
    for label in range(2):
        for decision in range(2):
            panel.text(
                decision,
                label,
                f"{counts[label, decision]:,}\n{shares[label, decision]:.0%}",
                ha="center",
                va="center",
                fontsize=8.5,
                color="white" if shares[label, decision] > _DARK else "black",
            )
