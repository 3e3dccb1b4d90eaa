"""The report of an evaluation: one self-contained page, and the files beside it."""

from eval.report.files import metrics_record, write_report, write_scores
from eval.report.page import render

__all__ = ["metrics_record", "render", "write_report", "write_scores"]
