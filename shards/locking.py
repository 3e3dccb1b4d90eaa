"""One command at a time in one folder."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from shards.console import echo
from shards.errors import BadData, ResourceMissing

_LOOK_AGAIN = 0.1
"""Seconds between two looks at a lock that another command holds."""


@contextlib.contextmanager
def exclusive_lock(folder: Path, *, wait: float = 0) -> Iterator[None]:
    """Make `folder` if need be and keep every other command that asks for it out of it.

    The lock is on the folder itself, so it leaves no file behind and ends with the process,
    however that ends. Another command that holds it is waited for, for up to `wait` seconds, which
    a line on stderr says. Whoever takes several locks takes them in the order of their resolved paths: else
    two commands could wait for each other.

    Raises ResourceMissing where another command still holds the lock or the folder cannot be made, BadData
    where a file stands there. File systems that cannot lock a folder (NFS) go without.
    """
    if folder.exists() and not folder.is_dir():
        raise BadData(f"{folder} is a file, where a folder is needed")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ResourceMissing(f"cannot write {folder}: {error.strerror}; give another folder") from error
    try:
        with contextlib.suppress(OSError):
            _lock(handle, folder, wait)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path, wait: float) -> None:
    deadline = time.monotonic() + wait
    waiting = False
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                what = (
                    f"still at work in {folder} after {wait:g} s; run this one again when it has ended"
                    if wait
                    else f"at work in {folder}; wait for it, or give another folder"
                )
                raise ResourceMissing(f"another command is {what}") from None
        if not waiting:
            waiting = True
            echo(f"waiting up to {wait:g} s for another command at work in {folder}", err=True)
        time.sleep(_LOOK_AGAIN)
