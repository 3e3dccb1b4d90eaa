"""A frozen network run once: its features, and the heads trained on them."""
