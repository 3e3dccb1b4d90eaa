"""A frozen network run once: its features, kept in memory and saved on the way."""
