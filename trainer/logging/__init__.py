"""What a run writes: checkpoints, curves, copies of its metrics, times."""
