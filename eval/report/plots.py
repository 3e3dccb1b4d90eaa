"""The plots: curves and panels per finding, subgroups, prevalence, compared runs, training.

Each `draw_*` function writes the PNG `path` atomically and returns its figure. Raises ResourceMissing
from the disk.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from eval.report.html import readable
from eval.scores.metrics import ECE_BINS, calibration_bins, expected_calibration_error, two_classes
from eval.scores.thresholds import Floats, paired
from shards.files import atomic_write

# Seven colours that colour-blind readers tell apart: the palette of Okabe and Ito, "Color Universal
# Design", 2008, without its yellow, which is lost on white. Two line styles make fourteen curves.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_STYLES = ("-", "--")
_MARKERS = "osD^v"

_DOTS_PER_INCH = 150
_COLUMNS = 5  # fourteen findings and a key fill three rows
_DARK = 0.62  # share from which white digits are easier to read on the blue
_LARGEST = 130.0  # points², the dot of a bin that holds all images
_SPREAD = 0.5  # of the distance between two findings, which their runs share

Curve = tuple[str, npt.NDArray[np.bool_], Floats, dict[str, Any]]
"""A finding, its labels and probabilities (both [N]), and the colour and style of its line."""


def draw_roc(
    labels: npt.NDArray[Any], probabilities: npt.NDArray[Any], findings: Sequence[str], title: str, path: Path
) -> Figure:
    """Draw the ROC curves, one per finding.

    `labels` is 0 or 1 and `probabilities` a float in [0, 1], both [N, F] in the order of `findings`.
    `title` names the run and the split; the number of images is put behind it. The legend gives each
    AUROC and number of positives, and names the findings with one class only, which have no curve.
    Raises ValueError for bad arrays.
    """
    figure, axes, curves = _start_curves(labels, probabilities, findings, title)
    for finding, truth, scores, look in curves:
        false_positive_rate, recall, _ = roc_curve(truth, scores)
        label = f"{finding}  {roc_auc_score(truth, scores):.3f}  ({truth.sum():,})"
        axes.plot(false_positive_rate, recall, label=label, **look)
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1, label="chance, 0.500")
    axes.set(xlabel="False positive rate (1 - specificity)", ylabel="Recall (sensitivity)")
    _add_legend(figure, axes, "AUROC", labels, findings)
    return _write(figure, path)


def draw_precision_recall(
    labels: npt.NDArray[Any], probabilities: npt.NDArray[Any], findings: Sequence[str], title: str, path: Path
) -> Figure:
    """Draw the precision-recall curves, one per finding.

    Arguments and errors are those of `draw_roc`. The legend gives each average precision (AP), the
    area under the steps as drawn. A dotted line in a finding's colour is its prevalence: the
    precision of a random ranking.
    """
    figure, axes, curves = _start_curves(labels, probabilities, findings, title)
    for finding, truth, scores, look in curves:
        precision, recall, _ = precision_recall_curve(truth, scores, drop_intermediate=True)
        label = f"{finding}  {average_precision_score(truth, scores):.3f}  ({truth.sum():,})"
        axes.plot(recall, precision, label=label, drawstyle="steps-post", **look)
        axes.axhline(truth.mean(), color=look["color"], linestyle=":", linewidth=0.7, alpha=0.6)
    axes.plot([], [], color="grey", linestyle=":", linewidth=1, label="chance: the prevalence")
    axes.set(xlabel="Recall (sensitivity)", ylabel="Precision (positive predictive value)")
    _add_legend(figure, axes, "AP", labels, findings)
    return _write(figure, path)


def _start_curves(
    labels: npt.NDArray[Any], probabilities: npt.NDArray[Any], findings: Sequence[str], title: str
) -> tuple[Figure, Axes, list[Curve]]:
    """Return square axes without curves, and what the curve of each scored finding needs."""
    truth, probabilities = paired(labels, probabilities)
    if truth.shape[1] != len(findings):
        raise ValueError(f"expected one column for each of {len(findings)} findings, got {truth.shape[1]}")
    figure, axes = _new_axes(5.8, f"{title}, {len(truth):,} images")
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axes.grid(alpha=0.25)
    # The look goes by position: a finding keeps it in both pictures, and when others are left out.
    looks = cycle({"color": colour, "linestyle": style} for style in _STYLES for colour in _COLOURS)
    columns = zip(findings, truth.T, probabilities.T, looks, strict=False)  # the looks never end
    return figure, axes, [curve for curve, drawn in zip(columns, two_classes(truth), strict=True) if drawn]


def _add_legend(figure: Figure, axes: Axes, measure: str, labels: npt.NDArray[Any], findings: Sequence[str]) -> None:
    """Name every line beside the axes, and under them the findings that have none."""
    for finding, scored in zip(findings, two_classes(labels), strict=True):
        if not scored:
            axes.plot([], [], linestyle="none", label=f"{finding}  not scored: one class only")
    # Outside the axes: fourteen entries would cover the curves.
    figure.legend(title=f"Finding  {measure}  (positives)", loc="outside right upper", fontsize=9)


def draw_confusion(per_finding: pd.DataFrame, title: str, path: Path) -> Figure:
    """Draw one 2 x 2 matrix per finding.

    `per_finding` is the table of Scores: index finding, columns tp, fp, fn, tn and threshold. A
    row is the label, a column the decision. The colour, and the percentage under each count, is
    the share of its row: sensitivity and specificity lie on the diagonal. A finding without a
    threshold keeps its panel, which says so.
    """
    figure, axes, key = _new_panels(len(per_finding), title)
    for finding, panel in zip(per_finding.index, axes, strict=True):
        row = per_finding.loc[finding]
        panel.set_title(readable(str(finding)), fontsize=10)
        if pd.isna(row["threshold"]) or pd.isna(row["tp"]):
            panel.set_axis_off()
            panel.text(0.5, 0.5, "no threshold", ha="center", va="center", color="0.4")
            continue
        _draw_matrix(panel, np.array([[row["tn"], row["fp"]], [row["fn"], row["tp"]]], dtype=np.int64))
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
    return _write(figure, path)


def _draw_matrix(panel: Axes, counts: npt.NDArray[np.int64]) -> None:
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    panel.imshow(shares, cmap="Blues", vmin=0, vmax=1.15)
    panel.set_xticks([0, 1], ["no", "yes"], fontsize=8)
    panel.set_yticks([0, 1], ["no", "yes"], fontsize=8)
    panel.tick_params(length=0)
    for (label, decision), share in np.ndenumerate(shares):
        panel.text(
            decision,
            label,
            f"{counts[label, decision]:,}\n{share:.0%}",
            ha="center",
            va="center",
            fontsize=8.5,
            color="white" if share > _DARK else "black",
        )


def draw_reliability(
    labels: npt.NDArray[Any],
    probabilities: npt.NDArray[Any],
    calibrated: npt.NDArray[Any] | None,
    findings: Sequence[str],
    title: str,
    path: Path,
) -> Figure:
    """Draw one reliability diagram per finding.

    `labels` is 0 or 1, `probabilities` and `calibrated` (None: not drawn) floats in [0, 1], all
    [N, F] in the order of `findings`. A dot is one of the 15 bins of the ECE that holds an image: the
    mean probability in it against the share of its images that show the finding, its area growing
    with the bin's share of the images. A calibrated model has its dots on the diagonal. Each panel
    gives the ECE, before and after. A finding of one class has its dots all the same. Raises
    ValueError for bad arrays.
    """
    truth, raw = paired(labels, probabilities)
    curves = [("as predicted", _COLOURS[1], raw)]
    if calibrated is not None:
        curves.append(("calibrated on val", _COLOURS[0], paired(labels, calibrated)[1]))
    figure, axes, key = _new_panels(len(findings), f"{title}, {len(truth):,} images")
    for column, (finding, panel) in enumerate(zip(findings, axes, strict=True)):
        panel.set_title(readable(finding), fontsize=10)
        panel.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), aspect="equal")
        panel.set_xticks([0, 0.5, 1])
        panel.set_yticks([0, 0.5, 1])
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.25)
        panel.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
        errors = [expected_calibration_error(truth[:, column], values[:, column]) for *_, values in curves]
        panel.text(
            0.98,
            0.03,
            "ECE " + " \N{RIGHTWARDS ARROW} ".join(f"{error:.3f}" for error in errors),
            ha="right",
            fontsize=7.5,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1},
        )
        for _, colour, values in curves:
            mean, observed, share = bin_reliability(truth[:, column], values[:, column])
            panel.plot(mean, observed, color=colour, linewidth=1, alpha=0.6)
            panel.scatter(mean, observed, s=6 + _LARGEST * share, color=colour, alpha=0.6, linewidth=0)
    for label, colour, _ in curves:
        key.plot([], [], color=colour, marker="o", label=label)
    key.plot([], [], color="grey", linestyle=":", label="a calibrated model")
    key.legend(loc="center left", frameon=False, fontsize=9, title="dot area: share of\nimages in the bin")
    figure.supxlabel("Mean probability in the bin", fontsize=10, y=0.01)
    figure.supylabel("Share of its images that show the finding", fontsize=10, x=0.008)
    return _write(figure, path)


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


def draw_subgroups(macro: pd.DataFrame, overall: float, title: str, path: Path) -> Figure:
    """Draw a dot per group.

    `macro` has one row per group, in the order to draw: attribute, group, images, auroc, and where
    they are known auroc_low and auroc_high (a bar through the dot). `overall` is the AUROC of all
    images, a dotted line. A group whose AUROC is NaN keeps its line, which says so.
    """
    attributes = list(dict.fromkeys(macro["attribute"]))
    # One free line between attributes sets them apart.
    places = np.arange(len(macro)) + macro["attribute"].map(attributes.index).to_numpy()
    figure, axes = _new_axes(1.4 + 0.3 * (places[-1] + 1 if len(places) else 1), title)
    axes.axvline(overall, color="grey", linestyle=":", linewidth=1.2, label=f"all images, {overall:.3f}")
    low, high = (macro[end] if end in macro else macro["auroc"] for end in ("auroc_low", "auroc_high"))
    for number, attribute in enumerate(attributes):
        colour = _COLOURS[number % len(_COLOURS)]
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
    labels = [f"{row.group}  ({row.images:,})" for row in macro.itertuples()]
    axes.grid(axis="x", alpha=0.25)
    _finish_rows(figure, axes, places, labels, "Macro AUROC")
    return _write(figure, path)


def draw_prevalence(
    prevalence: Mapping[str, Mapping[str, float | None]], images: Mapping[str, int], title: str, path: Path
) -> Figure:
    """Draw one line per finding with a dot per split.

    `prevalence` gives the share 0..1 of each finding in each split, all in one order; `images` its size, for
    the legend. A split without images has no dots.
    """
    findings = list(next(iter(prevalence.values())))
    figure, axes = _new_axes(1.2 + 0.28 * len(findings), title)
    for number, (split, shares) in enumerate(prevalence.items()):
        known = [(100 * share, place) for place, share in enumerate(shares.values()) if share is not None]
        axes.scatter(
            [percent for percent, _ in known],
            [place for _, place in known],
            color=_COLOURS[number],
            marker=_MARKERS[number],
            s=38,
            alpha=0.8,
            label=f"{split}  ({images[split]:,})",
        )
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    labels = [readable(finding) for finding in findings]
    _finish_rows(figure, axes, range(len(labels)), labels, "Images that show the finding, %", "Split  (images)")
    return _write(figure, path)


def draw_comparison(auroc: pd.DataFrame, runs: Sequence[str], title: str, path: Path) -> Figure:
    """Draw a dot per run and finding with its interval.

    `auroc` has the columns run, finding, value, low and high; its findings are drawn in their order.
    A value that is NaN has no dot.
    """
    rows = list(dict.fromkeys(auroc["finding"]))
    figure, axes = _new_axes(1.2 + (0.2 + 0.14 * len(runs)) * len(rows), title)
    offsets = np.linspace(-_SPREAD / 2, _SPREAD / 2, len(runs))
    for number, (run, offset) in enumerate(zip(runs, offsets, strict=True)):
        mine = auroc[auroc["run"] == run].set_index("finding").loc[rows]
        places = np.arange(len(rows)) + offset
        colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
        axes.hlines(places, mine["low"], mine["high"], color=colour, linewidth=2, alpha=0.4)
        axes.scatter(mine["value"], places, color=colour, marker=marker, s=28, zorder=3, label=run)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.grid(alpha=0.25)
    _finish_rows(figure, axes, range(len(rows)), [readable(row) for row in rows], "AUROC, 95 % confidence interval")
    return _write(figure, path)


def draw_training(epochs: Sequence[Mapping[str, Any]], title: str, path: Path) -> Figure:
    """Draw three panels over the epochs.

    `epochs` are the lines of metrics.jsonl of kind `epoch`, in order: train and val loss with the
    best epoch marked, seconds per epoch, and the share of them spent waiting for the loader in percent.
    """
    figure = Figure((9, 6), _DOTS_PER_INCH, layout="constrained")
    losses, seconds, wait = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1, 1))
    numbers = [line["epoch"] for line in epochs]
    losses.set_title(title)
    for name, colour, label in (
        ("train_loss", _COLOURS[0], "train, while it learns"),
        ("val_loss", _COLOURS[1], "val"),
    ):
        losses.plot(numbers, [line[name] for line in epochs], color=colour, marker="o", markersize=4, label=label)
    best = [line["epoch"] for line in epochs if line.get("best")]
    if best:
        losses.axvline(best[-1], color="grey", linestyle=":", linewidth=1, label=f"best, epoch {best[-1]}")
    losses.set_ylabel("Loss")
    losses.legend(fontsize=9)
    seconds.bar(numbers, [line["seconds"] for line in epochs], color=_COLOURS[4], width=0.7)
    seconds.set_ylabel("Seconds")
    wait.bar(numbers, [100 * line["data_wait"] for line in epochs], color=_COLOURS[3], width=0.7)
    wait.set_ylabel("Data wait, %")
    wait.set_xlabel("Epoch")
    wait.set_xlim(min(numbers) - 0.6, max(numbers) + 0.6)
    wait.xaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in (losses, seconds, wait):
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    return _write(figure, path)


def _new_axes(height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure((9, height), _DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    return figure, axes


def _new_panels(count: int, title: str) -> tuple[Figure, list[Axes], Axes]:
    """Return a figure of `count` panels in rows of five, and axes without a frame for the key.

    The margins are set here: to find them by measuring every label takes three times as long.
    """
    rows = count // _COLUMNS + 1
    height = 0.75 + 2.3 * rows
    figure = Figure((11, height), _DOTS_PER_INCH)
    figure.suptitle(title, y=1 - 0.08 / height, va="top")
    figure.subplots_adjust(
        left=0.065, right=0.985, bottom=0.55 / height, top=1 - 0.6 / height, wspace=0.22, hspace=0.36
    )
    axes = [figure.add_subplot(rows, _COLUMNS, place) for place in range(1, count + 2)]
    axes[-1].set_axis_off()
    return figure, axes[:-1], axes[-1]


def _finish_rows(
    figure: Figure, axes: Axes, places: ArrayLike, names: Sequence[str], xlabel: str, legend: str | None = None
) -> None:
    """Name the rows of dots, the first on top, and add the legend (with this title)."""
    axes.set_yticks(places, names, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel(xlabel)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside right upper", fontsize=9, title=legend)


def _write(figure: Figure, path: Path) -> Figure:
    with atomic_write(path) as partial:
        # The fastest compression: the same pixels in a twelfth more bytes.
        figure.savefig(partial, format="png", pil_kwargs={"compress_level": 1})
    return figure
