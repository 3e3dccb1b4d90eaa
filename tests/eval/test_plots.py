"""The pictures draw every finding that can be scored and name those that cannot."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from eval.plots import draw_precision_recall, draw_roc
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
    assert entries(figure)[-2:] == [
        "Atelectasis  not scored: one class only",
        "Hernia  not scored: one class only",
    ]


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
    with pytest.raises(ValueError, match="each of 3 findings, got 14"):
        draw(*split(), FINDINGS[:3], "demo", tmp_path / "curves.png")


def test_scoring_and_drawing_import_neither_torch_nor_pyplot():
    code = "import sys, eval.plots; print({'torch', 'matplotlib.pyplot'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
