"""The NIH download in, packed, indexed and proved shards out. Never imports torch."""
