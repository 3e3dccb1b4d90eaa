"""Predictions of any model, read from CSV and scored by the same protocol; no torch."""
