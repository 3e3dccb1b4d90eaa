"""Numbers from labels and probabilities: measures, thresholds, calibration, intervals; no torch."""
