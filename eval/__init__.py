"""A run in, scores out, each with its split and its rule."""
