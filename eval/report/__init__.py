"""The report of an evaluation: one self-contained page, and the files beside it."""

from eval.report.files import metrics_record, thresholds_record, write_report, write_scores
from eval.report.page import render

__all__ = ["metrics_record", "render", "thresholds_record", "write_report", "write_scores"]
