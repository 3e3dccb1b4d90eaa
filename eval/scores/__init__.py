"""Metrics from labels and probabilities: thresholds, calibration, confidence intervals; no torch."""
