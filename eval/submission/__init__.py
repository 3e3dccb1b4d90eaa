"""Predictions of any model, read and scored by the protocol; no torch."""
