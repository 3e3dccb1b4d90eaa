"""Reliability diagrams of all findings: what a probability said against what was there."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.plots.canvas import COLOURS, new_panels, readable, write
from eval.scores.metrics import ECE_BINS, calibration_bins, expected_calibration_error
from eval.scores.thresholds import Floats, paired

_LARGEST = 130.0  # points², the dot of a bin that holds all images


def draw_reliability(
    labels: npt.NDArray[Any],
    probabilities: npt.NDArray[Any],
    calibrated: npt.NDArray[Any] | None,
    findings: Sequence[str],
    title: str,
    path: Path,
) -> Figure:
    """Write one reliability diagram per finding to the PNG `path`; return the figure.

    `labels` is 0 or 1, `probabilities` and `calibrated` (None: not drawn) floats in [0, 1], all
    [N, F] in the order of `findings`. A dot is one of the 15 bins of the ECE that holds an image: the
    mean probability in it against the share of its images that show the finding, its area growing
    with the bin's share of the images. A calibrated model has its dots on the diagonal. Each panel
    gives the ECE, before and after. A finding of one class has its dots all the same. The file
    appears whole or not at all. Raises ValueError for bad arrays.
    """
    truth, raw = paired(labels, probabilities)
    curves = [("as predicted", COLOURS[1], raw)]
    if calibrated is not None:
        curves.append(("calibrated on val", COLOURS[0], paired(labels, calibrated)[1]))
    figure, axes, key = new_panels(len(findings), f"{title}, {len(truth):,} images")
    arrow = " \N{RIGHTWARDS ARROW} "
    for column, (finding, panel) in enumerate(zip(findings, axes, strict=True)):
        _prepare(panel, readable(finding))
        errors = [expected_calibration_error(truth[:, column], values[:, column]) for *_, values in curves]
        panel.text(
            0.98,
            0.03,
            "ECE " + arrow.join(f"{error:.3f}" for error in errors),
            ha="right",
            fontsize=7.5,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1},
        )
        for label, colour, values in curves:
            mean, observed, share = bin_reliability(truth[:, column], values[:, column])
            panel.plot(mean, observed, color=colour, linewidth=1, alpha=0.6)
            panel.scatter(mean, observed, s=6 + _LARGEST * share, color=colour, alpha=0.6, linewidth=0)
            key.plot([], [], color=colour, marker="o", label=label if column == 0 else "")
    key.plot([], [], color="grey", linestyle=":", label="a calibrated model")
    key.legend(loc="center left", frameon=False, fontsize=9, title="dot area: share of\nimages in the bin")
    figure.supxlabel("Mean probability in the bin", fontsize=10, y=0.01)
    figure.supylabel("Share of its images that show the finding", fontsize=10, x=0.008)
    write(figure, path)
    return figure


def bin_reliability(truth: npt.NDArray[np.bool_], probabilities: Floats) -> tuple[Floats, Floats, Floats]:
    """Return mean probability, share of positives and share of all images of each bin with an image.

    `truth` and `probabilities` are [N]; each result is float64 [B], B <= 15, lowest bin first. The
    bins are those of the ECE: closed above, and 0 is in the first.
    """
    bins = calibration_bins(probabilities)
    images = np.bincount(bins, minlength=ECE_BINS)
    used = images > 0
    mean = np.bincount(bins, weights=probabilities, minlength=ECE_BINS)[used] / images[used]
    observed = np.bincount(bins, weights=truth, minlength=ECE_BINS)[used] / images[used]
    return mean, observed, images[used] / len(truth)


def _prepare(panel: Axes, title: str) -> None:
    panel.set_title(title, fontsize=10)
    panel.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), aspect="equal")
    panel.set_xticks([0, 0.5, 1])
    panel.set_yticks([0, 0.5, 1])
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.25)
    panel.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
