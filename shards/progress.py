"""Progress bars: a bar on a terminal, a line every 15 seconds elsewhere."""

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(total: int, description: str, unit: str, **options: Any) -> "tqdm[Any]":
    """Return a tqdm bar on stderr with rate and ETA; in a log file, one line every 15 seconds."""
    if sys.stderr.isatty():
        return tqdm(total=total, desc=description, unit=unit, dynamic_ncols=True, **options)
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        mininterval=15,
        maxinterval=60,
        bar_format="{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]\n",
        **options,
    )
