"""Shards and an architecture in, a run folder out."""
