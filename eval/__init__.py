"""Score trained runs: predictions, thresholds, metrics with confidence intervals, reports."""
