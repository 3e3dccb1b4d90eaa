"""Memory of a GPU and of the host: how much is free, where something fits, and what processes share by name."""

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from shards.errors import ResourceMissing

_CGROUP = Path("/sys/fs/cgroup")
_CPU = torch.device("cpu")
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_FILLED = b"\1"  # the last byte of a shared file that was filled to its end


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


class SharedMemory:
    """uint8 `memory` [size] under this name, the same for all processes of this user on this machine.

    One process calls `fill` with it while the others wait; where it raises, the next one tries. They wait
    on a lock file beside it, which is empty and stays. Raises ResourceMissing where there is no room;
    without the check a process dies at its first page.

    It is a file in /dev/shm on which every user holds a shared lock. The kernel ends a lock with its process,
    however that ends, so a file without a lock was left by a killed run: it is reused or removed. Neither
    multiprocessing.shared_memory nor torch's knows whether anybody still uses a name.
    """

    def __init__(self, name: str, size: int, fill: Callable[[npt.NDArray[np.uint8]], None]) -> None:
        self._path = _path(name)
        lock_file = os.open(_folder() / f"cxrapid-gate-{os.getuid()}-{name}", _FLAGS, 0o600)
        with open(lock_file, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._fd = _open_locked(self._path)
            try:
                if os.pread(self._fd, 1, size) != _FILLED:
                    os.ftruncate(self._fd, 0)
                    self._allocate(size)
                    fill(self._map(size))
                    os.pwrite(self._fd, _FILLED, size)
            except BaseException:
                self.close()
                raise
        self.memory = self._map(size)

    def close(self) -> None:
        """Unlock the file, and remove it if nobody else uses it; mapped memory stays usable."""
        if self._fd >= 0:
            self.memory = np.empty(0, np.uint8)
            _remove_if_stale(self._path, self._fd)
            os.close(self._fd)
            self._fd = -1

    def _allocate(self, size: int) -> None:
        try:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(self._fd, 0, size + len(_FILLED))
            else:
                os.ftruncate(self._fd, size + len(_FILLED))
        except OSError as error:
            raise ResourceMissing(
                f"{self._path.parent} has no room for {size:,} bytes that ranks share ({error.strerror}); "
                "take --loader dali"
            ) from error

    def _map(self, size: int) -> npt.NDArray[np.uint8]:
        with open(self._fd, "r+b", closefd=False) as file:
            return np.memmap(file, np.uint8, "r+", shape=(size,))


def remove_stale(keep: str) -> None:
    """Remove the shared files that nobody uses, except those whose name begins with `keep`."""
    for path, fd in _other_files(keep):
        _remove_if_stale(path, fd)


def stale_bytes(keep: str) -> int:
    """Return what `remove_stale` would free; removes nothing."""
    return sum(os.fstat(fd).st_size for _, fd in _other_files(keep) if _lock_alone(fd))


def shared_bytes(name: str) -> int:
    """Return how much memory the file of this name takes."""
    path = _path(name)
    return path.stat().st_size if path.is_file() else 0


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


def _other_files(keep: str) -> Iterator[tuple[Path, int]]:
    for path in set(_folder().glob(_path("*").name)) - set(_folder().glob(_path(f"{keep}*").name)):
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # gone meanwhile, or not ours
        yield path, fd
        os.close(fd)


def _open_locked(path: Path) -> int:
    # The file, with a shared lock.
    while True:
        fd = os.open(path, _FLAGS, 0o600)
        fcntl.flock(fd, fcntl.LOCK_SH)
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)  # removed by somebody between the two calls


def _lock_alone(fd: int) -> bool:
    # Whether nobody else has a lock on the file; it is locked until it is closed.
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_if_stale(path: Path, fd: int) -> None:
    if not _lock_alone(fd):
        fcntl.flock(fd, fcntl.LOCK_UN)
    elif os.fstat(fd).st_nlink:
        path.unlink(missing_ok=True)


def _path(name: str) -> Path:
    return _folder() / f"cxrapid-{os.getuid()}-{name}"


def _folder() -> Path:
    memory = Path("/dev/shm")
    return memory if memory.is_dir() else Path(tempfile.gettempdir())
