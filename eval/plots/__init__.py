"""The pictures of an evaluation, each a function from numbers to one PNG."""

from eval.plots.comparison import draw_comparison
from eval.plots.confusion import draw_confusion
from eval.plots.curves import draw_precision_recall, draw_roc
from eval.plots.prevalence import draw_prevalence
from eval.plots.reliability import draw_reliability
from eval.plots.subgroups import draw_subgroups
from eval.plots.training import draw_training

__all__ = [
    "draw_comparison",
    "draw_confusion",
    "draw_precision_recall",
    "draw_prevalence",
    "draw_reliability",
    "draw_roc",
    "draw_subgroups",
    "draw_training",
]
