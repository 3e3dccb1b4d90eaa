"""The report of an evaluation: one page that needs nothing else, and the files beside it."""

from eval.report.files import write_report, write_scores
from eval.report.page import render
from eval.report.records import metrics_record, thresholds_record

__all__ = ["metrics_record", "render", "thresholds_record", "write_report", "write_scores"]
