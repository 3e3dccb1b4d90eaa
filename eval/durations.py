"""A time in words, the same in every table and on every page."""


def duration(seconds: float) -> str:
    """Return `12.3 s`, `4 min 5 s` or `2 h 10 min`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
