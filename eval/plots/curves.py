"""The ROC and the precision-recall curves of all findings on one split."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from eval.plots.canvas import COLOURS, STYLES, new_figure, write
from eval.scores.metrics import two_classes
from eval.scores.thresholds import Floats, paired


def draw_roc(
    labels: npt.NDArray[Any],
    probabilities: npt.NDArray[Any],
    findings: Sequence[str],
    title: str,
    path: Path,
) -> Figure:
    """Write the ROC curves, one per finding, to the PNG `path`; return the figure.

    `labels` is 0 or 1 and `probabilities` a float in [0, 1], both [N, F] in the order of `findings`.
    `title` names the run and the split; the number of images is put behind it. The legend gives each
    AUROC and number of positives, and names the findings with one class only, which have no curve.
    The file appears whole or not at all. Raises ValueError for bad arrays, ResourceMissing from the disk.
    """
    figure, axes, curves = _prepare(labels, probabilities, findings, title)
    for finding, truth, scores, look in curves:
        false_alarms, recall, _ = roc_curve(truth, scores)
        entry = _entry(finding, roc_auc_score(truth, scores), truth)
        axes.plot(false_alarms, recall, label=entry, **look)
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1, label="chance, 0.500")
    axes.set(xlabel="False positive rate (1 - specificity)", ylabel="Recall (sensitivity)")
    _add_legend(figure, axes, "AUROC", labels, findings)
    write(figure, path)
    return figure


def draw_precision_recall(
    labels: npt.NDArray[Any],
    probabilities: npt.NDArray[Any],
    findings: Sequence[str],
    title: str,
    path: Path,
) -> Figure:
    """Write the precision-recall curves, one per finding, to the PNG `path`; return the figure.

    Arguments and errors are those of `draw_roc`. The legend gives each average precision (AP), the
    area under the steps as drawn. A dotted line in a finding's colour is its prevalence: the
    precision of a model that knows nothing.
    """
    figure, axes, curves = _prepare(labels, probabilities, findings, title)
    for finding, truth, scores, look in curves:
        precision, recall, _ = precision_recall_curve(truth, scores, drop_intermediate=True)
        entry = _entry(finding, average_precision_score(truth, scores), truth)
        axes.plot(recall, precision, label=entry, drawstyle="steps-post", **look)
        axes.axhline(truth.mean(), color=look["color"], linestyle=":", linewidth=0.7, alpha=0.6)
    axes.plot([], [], color="grey", linestyle=":", linewidth=1, label="chance: the prevalence")
    axes.set(xlabel="Recall (sensitivity)", ylabel="Precision (positive predictive value)")
    _add_legend(figure, axes, "AP", labels, findings)
    write(figure, path)
    return figure


Curve = tuple[str, npt.NDArray[np.bool_], Floats, dict[str, Any]]
"""A finding, its labels and probabilities (both [N]), and the colour and style of its line."""


def _prepare(
    labels: npt.NDArray[Any], probabilities: npt.NDArray[Any], findings: Sequence[str], title: str
) -> tuple[Figure, Axes, list[Curve]]:
    """Return square axes without curves, and what the curve of each scored finding needs."""
    truth, probabilities = paired(labels, probabilities)
    if truth.shape[1] != len(findings):
        raise ValueError(f"expected one column for each of {len(findings)} findings, got {truth.shape[1]}")
    figure = new_figure(9, 5.8)
    axes = figure.add_subplot(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axes.set_title(f"{title}, {len(truth):,} images")
    axes.grid(alpha=0.25)
    # The look goes by position: a finding keeps it in both pictures, and when others are left out.
    looks = cycle({"color": colour, "linestyle": style} for style in STYLES for colour in COLOURS)
    columns = zip(findings, truth.T, probabilities.T, looks, strict=False)  # the looks never end
    return figure, axes, [curve for curve, drawn in zip(columns, two_classes(truth), strict=True) if drawn]


def _entry(finding: str, area: float, truth: npt.NDArray[np.bool_]) -> str:
    return f"{finding}  {area:.3f}  ({int(truth.sum()):,})"


def _add_legend(
    figure: Figure, axes: Axes, measure: str, labels: npt.NDArray[Any], findings: Sequence[str]
) -> None:
    """Name every line beside the axes, and under them the findings that have none."""
    for finding, scored in zip(findings, two_classes(labels), strict=True):
        if not scored:
            axes.plot([], [], linestyle="none", label=f"{finding}  not scored: one class only")
    # Outside the axes: fourteen entries would cover the curves.
    figure.legend(title=f"Finding  {measure}  (positives)", loc="outside right upper", fontsize=9)
