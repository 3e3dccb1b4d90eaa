"""What a run leaves and shows of itself: checkpoints, curves, mirrors, times."""
