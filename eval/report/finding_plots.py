"""Plots with a curve or a panel per finding: ROC, precision-recall, confusion matrix, reliability."""

from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from eval.report.canvas import COLOURS, STYLES, new_figure, new_panels, readable, write
from eval.scores.metrics import ECE_BINS, calibration_bins, expected_calibration_error, two_classes
from eval.scores.thresholds import Floats, paired
from shards.findings import FINDINGS


def draw_roc(labels: npt.NDArray[Any], probabilities: npt.NDArray[Any], title: str, path: Path) -> Figure:
    """Write the ROC curves, one per finding, to the PNG `path`; return the figure.

    `labels` is 0 or 1 and `probabilities` a float in [0, 1], both [N, F] in the order of FINDINGS.
    `title` names the run and the split; the number of images is put behind it. The legend gives each
    AUROC and number of positives, and names the findings with one class only, which have no curve.
    The file is written atomically. Raises ValueError for bad arrays, ResourceMissing from the disk.
    """
    figure, axes, curves = _start_curves(labels, probabilities, title)
    for finding, truth, scores, look in curves:
        false_alarms, recall, _ = roc_curve(truth, scores)
        entry = _entry(finding, roc_auc_score(truth, scores), truth)
        axes.plot(false_alarms, recall, label=entry, **look)
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1, label="chance, 0.500")
    axes.set(xlabel="False positive rate (1 - specificity)", ylabel="Recall (sensitivity)")
    _add_legend(figure, axes, "AUROC", labels)
    write(figure, path)
    return figure


def draw_precision_recall(labels: npt.NDArray[Any], probabilities: npt.NDArray[Any], title: str, path: Path) -> Figure:
    """Write the precision-recall curves, one per finding, to the PNG `path`; return the figure.

    Arguments and errors are those of `draw_roc`. The legend gives each average precision (AP), the
    area under the steps as drawn. A dotted line in a finding's colour is its prevalence: the
    precision of a model that knows nothing.
    """
    figure, axes, curves = _start_curves(labels, probabilities, title)
    for finding, truth, scores, look in curves:
        precision, recall, _ = precision_recall_curve(truth, scores, drop_intermediate=True)
        entry = _entry(finding, average_precision_score(truth, scores), truth)
        axes.plot(recall, precision, label=entry, drawstyle="steps-post", **look)
        axes.axhline(truth.mean(), color=look["color"], linestyle=":", linewidth=0.7, alpha=0.6)
    axes.plot([], [], color="grey", linestyle=":", linewidth=1, label="chance: the prevalence")
    axes.set(xlabel="Recall (sensitivity)", ylabel="Precision (positive predictive value)")
    _add_legend(figure, axes, "AP", labels)
    write(figure, path)
    return figure


Curve = tuple[str, npt.NDArray[np.bool_], Floats, dict[str, Any]]
"""A finding, its labels and probabilities (both [N]), and the colour and style of its line."""


def _start_curves(
    labels: npt.NDArray[Any], probabilities: npt.NDArray[Any], title: str
) -> tuple[Figure, Axes, list[Curve]]:
    """Return square axes without curves, and what the curve of each scored finding needs."""
    truth, probabilities = paired(labels, probabilities)
    if truth.shape[1] != len(FINDINGS):
        raise ValueError(f"expected one column for each of {len(FINDINGS)} findings, got {truth.shape[1]}")
    figure = new_figure(9, 5.8)
    axes = figure.add_subplot(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axes.set_title(f"{title}, {len(truth):,} images")
    axes.grid(alpha=0.25)
    # The look goes by position: a finding keeps it in both pictures, and when others are left out.
    looks = cycle({"color": colour, "linestyle": style} for style in STYLES for colour in COLOURS)
    columns = zip(FINDINGS, truth.T, probabilities.T, looks, strict=False)  # the looks never end
    return figure, axes, [curve for curve, drawn in zip(columns, two_classes(truth), strict=True) if drawn]


def _entry(finding: str, area: float, truth: npt.NDArray[np.bool_]) -> str:
    return f"{finding}  {area:.3f}  ({int(truth.sum()):,})"


def _add_legend(figure: Figure, axes: Axes, measure: str, labels: npt.NDArray[Any]) -> None:
    """Name every line beside the axes, and under them the findings that have none."""
    for finding, scored in zip(FINDINGS, two_classes(labels), strict=True):
        if not scored:
            axes.plot([], [], linestyle="none", label=f"{finding}  not scored: one class only")
    # Outside the axes: fourteen entries would cover the curves.
    figure.legend(title=f"Finding  {measure}  (positives)", loc="outside right upper", fontsize=9)


_DARK = 0.62  # share from which white digits are easier to read on the blue


def draw_confusion(per_finding: pd.DataFrame, title: str, path: Path) -> Figure:
    """Write one 2 x 2 matrix per finding to the PNG `path`; return the figure.

    `per_finding` is the table of Scores: index finding, columns tp, fp, fn, tn and threshold. A
    row is the label, a column the decision. The colour, and the percentage under each count, is
    the share of its row: sensitivity and specificity lie on the diagonal. A finding without a
    threshold keeps its panel, which says so. The file is written atomically.
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


_LARGEST = 130.0  # points², the dot of a bin that holds all images


def draw_reliability(
    labels: npt.NDArray[Any],
    probabilities: npt.NDArray[Any],
    calibrated: npt.NDArray[Any] | None,
    title: str,
    path: Path,
) -> Figure:
    """Write one reliability diagram per finding to the PNG `path`; return the figure.

    `labels` is 0 or 1, `probabilities` and `calibrated` (None: not drawn) floats in [0, 1], all
    [N, F] in the order of FINDINGS. A dot is one of the 15 bins of the ECE that holds an image: the
    mean probability in it against the share of its images that show the finding, its area growing
    with the bin's share of the images. A calibrated model has its dots on the diagonal. Each panel
    gives the ECE, before and after. A finding of one class has its dots all the same. The file
    is written atomically. Raises ValueError for bad arrays.
    """
    truth, raw = paired(labels, probabilities)
    curves = [("as predicted", COLOURS[1], raw)]
    if calibrated is not None:
        curves.append(("calibrated on val", COLOURS[0], paired(labels, calibrated)[1]))
    figure, axes, key = new_panels(len(FINDINGS), f"{title}, {len(truth):,} images")
    arrow = " \N{RIGHTWARDS ARROW} "
    for column, (finding, panel) in enumerate(zip(FINDINGS, axes, strict=True)):
        _style_panel(panel, readable(finding))
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


def _style_panel(panel: Axes, title: str) -> None:
    panel.set_title(title, fontsize=10)
    panel.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), aspect="equal")
    panel.set_xticks([0, 0.5, 1])
    panel.set_yticks([0, 0.5, 1])
    panel.tick_params(labelsize=8)
    panel.grid(alpha=0.25)
    panel.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
