"""The NIH download in, packed, indexed and proved shards out; never imports torch."""
