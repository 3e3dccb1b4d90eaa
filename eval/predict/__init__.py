"""From a run and shards that belong together to probabilities, made once and kept with their proof."""
