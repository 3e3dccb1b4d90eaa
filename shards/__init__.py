"""Pack the NIH download into indexed, verified shards; never imports torch."""
