"""The report of an evaluation: one page that needs nothing else, and the files beside it."""

from eval.report.files import metrics_record, thresholds_record, write_report, write_scores
from eval.report.page import render

__all__ = ["metrics_record", "render", "thresholds_record", "write_report", "write_scores"]
