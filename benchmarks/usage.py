"""What a process and its children have used: processor time and memory, as Linux counts them."""

import os
from pathlib import Path
from typing import NamedTuple

_TICKS = os.sysconf("SC_CLK_TCK")


class Usage(NamedTuple):
    """Of a process and of all that descend from it and are alive."""

    cpu_seconds: float
    """User and system time so far, ended children that were waited for included."""
    memory: int
    """Bytes held now besides files: a page that several processes share counts once."""


def usage_of(pid: int) -> Usage:
    """Return the usage of a process tree now."""
    fields = {int(path.name): _stat(path) for path in Path("/proc").iterdir() if path.name.isdigit()}
    family, grown = {pid}, True
    while grown:
        children = {child for child, stat in fields.items() if stat and int(stat[1]) in family}
        grown = not children <= family
        family |= children
    # utime, stime, cutime, cstime: fields 14 to 17 of /proc/PID/stat, which begins here with field 3.
    ticks = sum(int(number) for member in family if (stat := fields.get(member)) for number in stat[11:15])
    return Usage(ticks / _TICKS, sum(memory_of(member) for member in family))


def _stat(process: Path) -> list[str]:
    try:
        # The second field is the command in brackets, which may hold anything.
        return (process / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def memory_of(pid: int) -> int:
    """Return the memory of one process, counted as in Usage; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    kinds = ("Pss_Anon:", "Pss_Shmem:")
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(kinds))
