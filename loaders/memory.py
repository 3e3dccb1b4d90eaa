"""How much memory is free on a GPU and on the host, and where something fits."""

import os
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")
_CPU = torch.device("cpu")


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process may still take on a GPU or, for `cpu`, on the host.

    On Linux the host's figure is what the kernel calls available, or what the control group of a
    container leaves where that is less; elsewhere it is half of the physical memory.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    (available,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return min(available, _left_in_container(available))


def pick_device(
    needed: int, device: torch.device, share: float, *, processes: int = 1, reclaimable: int = 0
) -> tuple[torch.device | None, str]:
    """Return where so many bytes fit, the device, else the host, else None; and the figures in words.

    They fit where they take at most this share of the free memory. On the host so many `processes` each
    take them, and `reclaimable` bytes count as free though they are in use. Changes nothing.
    """
    figures = f"takes {_gib(needed)}"
    for each in dict.fromkeys((device, _CPU)):
        free = (free_memory(each) + reclaimable) / processes if each == _CPU else free_memory(each)
        figures += f", {share:.0%} of what is free on {each} are {_gib(share * free)}"
        if needed <= share * free:
            return each, figures
    return None, figures


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _left_in_container(otherwise: int) -> int:
    # Control groups, version 2; "max" is no limit.
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        counted = dict(line.split() for line in (_CGROUP / "memory.stat").read_text("ascii").splitlines())
    except OSError:
        return otherwise
    if limit == "max":
        return otherwise
    # Files in the page cache count as used, but give way.
    cached = int(counted["inactive_file"]) + int(counted["active_file"])
    return max(int(limit) - used + cached, 0)
