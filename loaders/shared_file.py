"""Memory that the processes of one machine share under a name, filled by the first that comes.

A file in /dev/shm, with a shared lock of everyone who uses it. The kernel ends a lock with its process,
however that ends, so a file that nobody holds was left by a killed run: it is taken up again or removed.
"""

import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shards.errors import ResourceMissing

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_WHOLE = b"\1"  # the last byte of a file that was filled to its end


class SharedFile:
    """uint8 `memory` [size] of this name, the same for all processes of this user on this machine.

    `fill` is called with it in one process, while the others wait; where it raises, the next one tries.
    They wait at a file of its own beside it, which is empty and stays.
    Raises ResourceMissing for memory that cannot be had, of which a process else dies page by page.
    """

    def __init__(self, name: str, size: int, fill: Callable[[npt.NDArray[np.uint8]], None]) -> None:
        self._path = _path(name)
        gate = os.open(_folder() / f"cxrapid-gate-{os.getuid()}-{name}", _FLAGS, 0o600)
        with open(gate, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._held = _opened(self._path)
            try:
                if os.pread(self._held, 1, size) != _WHOLE:
                    os.ftruncate(self._held, 0)
                    self._take(size)
                    fill(self._mapped(size))
                    os.pwrite(self._held, _WHOLE, size)
            except BaseException:
                self.close()
                raise
        self.memory = self._mapped(size)

    def close(self) -> None:
        """Let go of the file, and remove it if nobody else holds it; mapped memory stays usable."""
        if self._held >= 0:
            self.memory = np.empty(0, np.uint8)
            _remove_if_unheld(self._path, self._held)
            os.close(self._held)
            self._held = -1

    def _take(self, size: int) -> None:
        try:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(self._held, 0, size + len(_WHOLE))
            else:
                os.ftruncate(self._held, size + len(_WHOLE))
        except OSError as error:
            raise ResourceMissing(
                f"{self._path.parent} has no room for {size:,} bytes that ranks share ({error.strerror}); "
                "take --loader dali"
            ) from error

    def _mapped(self, size: int) -> npt.NDArray[np.uint8]:
        with open(self._held, "r+b", closefd=False) as file:
            return np.memmap(file, np.uint8, "r+", shape=(size,))


def remove_unheld(prefix: str) -> None:
    """Remove the files that nobody holds, but for those whose name begins with this."""
    for other in set(_folder().glob(_path("*").name)) - set(_folder().glob(_path(f"{prefix}*").name)):
        try:
            held = os.open(other, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # gone meanwhile, or not ours
        _remove_if_unheld(other, held)
        os.close(held)


def shared_bytes(name: str) -> int:
    """Return how much memory the file of this name takes."""
    path = _path(name)
    return path.stat().st_size if path.is_file() else 0


def _opened(path: Path) -> int:
    # The file, with a shared lock.
    while True:
        held = os.open(path, _FLAGS, 0o600)
        fcntl.flock(held, fcntl.LOCK_SH)
        if os.fstat(held).st_nlink:
            return held
        os.close(held)  # removed by somebody between the two calls


def _remove_if_unheld(path: Path, held: int) -> None:
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        fcntl.flock(held, fcntl.LOCK_UN)
        return
    if os.fstat(held).st_nlink:
        path.unlink(missing_ok=True)


def _path(name: str) -> Path:
    return _folder() / f"cxrapid-{os.getuid()}-{name}"


def _folder() -> Path:
    memory = Path("/dev/shm")
    return memory if memory.is_dir() else Path(tempfile.gettempdir())
