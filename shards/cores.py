"""The number of CPU cores this process may use."""

import os


def available_cores() -> int:
    """Return the number of cores that this process is allowed to run on, at least 1.

    On Linux that respects taskset and containers' core sets; elsewhere it is the machine's count.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
