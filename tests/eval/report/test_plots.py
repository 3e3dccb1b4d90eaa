"""The pictures draw every finding that can be scored and name those that cannot."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.calibration import calibration_curve
from sklearn.metrics import average_precision_score, roc_auc_score

from eval.report.plots import (
    bin_reliability,
    draw_comparison,
    draw_confusion,
    draw_precision_recall,
    draw_prevalence,
    draw_reliability,
    draw_roc,
    draw_subgroups,
    draw_training,
)
from eval.scores.metrics import ECE_BINS, expected_calibration_error, score
from shards.errors import ResourceMissing
from shards.findings import FINDINGS

BOTH = pytest.mark.parametrize("draw", [draw_roc, draw_precision_recall])


def split(n=1200):
    random = np.random.default_rng(3)
    labels = (random.random((n, len(FINDINGS))) < 0.2).astype(np.uint8)
    return labels, (0.7 * random.random(labels.shape) + 0.3 * labels).astype(np.float32)


def entries(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def curves(figure):
    """The drawn lines of findings, by name; a line without a legend entry is a chance line."""
    drawn = [line for line in figure.axes[0].get_lines() if line.get_linestyle() in ("-", "--")]
    return {line.get_label().split("  ")[0]: line for line in drawn}


@BOTH
def test_a_picture_is_a_png_and_nothing_else_is_left_beside_it(draw, tmp_path):
    draw(*split(), FINDINGS, "demo, test split", tmp_path / "curves.png")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG"
        image.load()
        assert image.width > 1000


@BOTH
def test_every_finding_has_a_curve_of_its_own_look_and_the_title_counts_the_images(draw, tmp_path):
    figure = draw(*split(), FINDINGS, "demo, test split", tmp_path / "curves.png")
    lines = curves(figure)
    assert list(lines) == list(FINDINGS)
    assert len({(line.get_color(), line.get_linestyle()) for line in lines.values()}) == len(FINDINGS)
    assert figure.axes[0].get_title() == "demo, test split, 1,200 images"


@pytest.mark.parametrize(
    ("draw", "area"), [(draw_roc, roc_auc_score), (draw_precision_recall, average_precision_score)]
)
def test_the_legend_gives_the_area_and_the_positives_of_every_finding(draw, area, tmp_path):
    labels, probabilities = split()
    expected = [
        f"{finding}  {area(labels[:, column], probabilities[:, column]):.3f}  ({labels[:, column].sum()})"
        for column, finding in enumerate(FINDINGS)
    ]
    figure = draw(labels, probabilities, FINDINGS, "demo", tmp_path / "curves.png")
    assert entries(figure)[: len(FINDINGS)] == expected
    assert entries(figure)[len(FINDINGS)].startswith("chance")


def test_the_precision_recall_steps_enclose_the_average_precision(tmp_path):
    labels, probabilities = split()
    figure = draw_precision_recall(labels, probabilities, FINDINGS, "demo", tmp_path / "pr.png")
    for column, line in enumerate(curves(figure).values()):
        assert line.get_drawstyle() == "steps-post"
        recall, precision = line.get_xdata(), line.get_ydata()
        area = np.sum(-np.diff(recall) * precision[:-1])
        assert area == pytest.approx(average_precision_score(labels[:, column], probabilities[:, column]))


@BOTH
def test_a_finding_of_one_class_has_no_curve_but_its_name_in_the_legend(draw, tmp_path):
    labels, probabilities = split()
    labels[:, 0], labels[:, 13] = 1, 0
    figure = draw(labels, probabilities, FINDINGS, "demo", tmp_path / "curves.png")
    assert list(curves(figure)) == list(FINDINGS[1:13])
    assert entries(figure)[-2:] == ["Atelectasis  not scored: one class only", "Hernia  not scored: one class only"]


@BOTH
def test_a_finding_keeps_its_look_when_another_is_left_out(draw, tmp_path):
    labels, probabilities = split()
    whole = curves(draw(labels, probabilities, FINDINGS, "demo", tmp_path / "whole.png"))
    labels[:, 0] = 0
    part = curves(draw(labels, probabilities, FINDINGS, "demo", tmp_path / "part.png"))
    for finding in FINDINGS[1:]:
        assert part[finding].get_color() == whole[finding].get_color()
        assert part[finding].get_linestyle() == whole[finding].get_linestyle()


@BOTH
def test_a_picture_that_cannot_be_written_leaves_the_folder_as_it_was(draw, tmp_path):
    (tmp_path / "curves.png").mkdir()
    with pytest.raises(ResourceMissing, match="directory"):
        draw(*split(), FINDINGS, "demo", tmp_path / "curves.png")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


@BOTH
def test_columns_that_do_not_fit_the_findings_are_refused(draw, tmp_path):
    with pytest.raises(ValueError, match="each of 14 findings, got 3"):
        draw(*(array[:, :3] for array in split()), FINDINGS, "demo", tmp_path / "curves.png")


def test_scoring_drawing_and_reporting_import_neither_torch_nor_pyplot():
    code = "import sys, eval.report; print({'torch', 'matplotlib.pyplot'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def texts(axes):
    return [text.get_text() for text in axes.texts]


def whole_png(path):
    with Image.open(path) as image:
        image.load()
        return image.format == "PNG" and image.width > 1000


def test_every_confusion_matrix_shows_its_counts_and_the_shares_of_its_rows(tmp_path):
    labels, probabilities = split()
    scores = score(labels, probabilities, np.full(len(FINDINGS), 0.5), FINDINGS).per_finding
    figure = draw_confusion(scores, "demo", tmp_path / "confusion.png")
    assert whole_png(tmp_path / "confusion.png")
    assert [panel.get_title() for panel in figure.axes[:-1]] == [name.replace("_", " ") for name in FINDINGS]
    for finding, panel in zip(FINDINGS, figure.axes, strict=False):
        tn, fp, fn, tp = (int(scores.at[finding, key]) for key in ("tn", "fp", "fn", "tp"))
        assert texts(panel) == [
            f"{count:,}\n{count / total:.0%}"
            for count, total in ((tn, tn + fp), (fp, tn + fp), (fn, fn + tp), (tp, fn + tp))
        ]


def test_a_finding_without_threshold_has_a_panel_that_says_so(tmp_path):
    labels, probabilities = split()
    thresholds = np.full(len(FINDINGS), 0.5)
    thresholds[3] = np.nan
    figure = draw_confusion(
        score(labels, probabilities, thresholds, FINDINGS).per_finding, "demo", tmp_path / "confusion.png"
    )
    assert texts(figure.axes[3]) == ["no threshold"]


def test_the_dots_of_a_reliability_diagram_are_those_of_scikit_learn():
    labels, probabilities = split()
    truth, values = labels[:, 0].astype(bool), probabilities[:, 0].astype(np.float64)
    mean, observed, share = bin_reliability(truth, values)
    expected, means = calibration_curve(truth, values, n_bins=ECE_BINS)
    np.testing.assert_allclose(mean, means, rtol=1e-12)
    np.testing.assert_allclose(observed, expected, rtol=1e-12)
    assert share.sum() == pytest.approx(1)
    assert share @ abs(mean - observed) == pytest.approx(expected_calibration_error(truth, values), abs=1e-12)


def test_a_reliability_diagram_gives_the_error_before_and_after(tmp_path):
    labels, probabilities = split()
    calibrated = probabilities.astype(np.float64) ** 2
    figure = draw_reliability(labels, probabilities, calibrated, FINDINGS, "demo", tmp_path / "after.png")
    before, after = (expected_calibration_error(labels[:, 0], values[:, 0]) for values in (probabilities, calibrated))
    assert texts(figure.axes[0]) == [f"ECE {before:.3f} \N{RIGHTWARDS ARROW} {after:.3f}"]
    alone = draw_reliability(labels, probabilities, None, FINDINGS, "demo", tmp_path / "before.png")
    assert texts(alone.axes[0]) == [f"ECE {before:.3f}"]
    assert whole_png(tmp_path / "before.png") and whole_png(tmp_path / "after.png")


def test_a_group_too_small_to_score_keeps_its_line(tmp_path):
    macro = pd.DataFrame(
        [("sex", "F", 1200, 0.8, 0.7, 0.9), ("sex", "M", 1300, 0.7, 0.6, 0.8), ("view", "AP", 3, *[np.nan] * 3)],
        columns=["attribute", "group", "images", "auroc", "auroc_low", "auroc_high"],
    )
    figure = draw_subgroups(macro, 0.75, "demo", tmp_path / "subgroups.png")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["F  (1,200)", "M  (1,300)", "AP  (3)"]
    assert texts(figure.axes[0]) == ["too few to score"]
    assert whole_png(tmp_path / "subgroups.png")


def test_prevalence_has_a_dot_for_each_split_with_images(tmp_path):
    shares = {split: dict.fromkeys(FINDINGS, share) for split, share in (("train", 0.1), ("val", None), ("test", 0.2))}
    images = {"train": 1000, "val": 0, "test": 200}
    figure = draw_prevalence(shares, images, "demo", tmp_path / "prevalence.png")
    dots = [len(collection.get_offsets()) for collection in figure.axes[0].collections]
    assert dots == [len(FINDINGS), 0, len(FINDINGS)]
    assert entries(figure) == ["train  (1,000)", "val  (0)", "test  (200)"]


def test_training_shows_losses_time_and_data_wait_of_every_epoch(tmp_path):
    epochs = [
        {"epoch": n, "train_loss": 1 / n, "val_loss": 1.2 / n, "seconds": 9.0, "data_wait": 0.02, "best": n < 3}
        for n in (1, 2, 3)
    ]
    figure = draw_training(epochs, "demo", tmp_path / "training.png")
    losses, seconds, wait = figure.axes
    assert [list(line.get_xdata()) for line in losses.get_lines()][:2] == [[1, 2, 3]] * 2
    assert [text.get_text() for text in losses.get_legend().get_texts()][-1] == "best, epoch 2"
    assert [bar.get_height() for bar in seconds.patches] == [9.0] * 3
    assert [bar.get_height() for bar in wait.patches] == pytest.approx([2.0] * 3)
    assert whole_png(tmp_path / "training.png")


def test_runs_stand_side_by_side_on_every_finding(tmp_path):
    rows = [(run, finding, 0.8, 0.7, 0.9) for run in ("one", "two") for finding in (*FINDINGS, "macro")]
    auroc = pd.DataFrame(rows, columns=["run", "finding", "value", "low", "high"])
    figure = draw_comparison(auroc, ["one", "two"], "demo", tmp_path / "comparison.png")
    assert entries(figure) == ["one", "two"]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [*(name.replace("_", " ") for name in FINDINGS), "macro"]
    assert whole_png(tmp_path / "comparison.png")
