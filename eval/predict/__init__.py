"""Probabilities of a run on its shards, computed once and cached."""
