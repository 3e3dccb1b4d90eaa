"""One command at a time in one folder."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from shards.errors import BadData, ResourceMissing


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Make `folder` if need be and keep every other command that asks for it out of it.

    The lock is on the folder itself, so it leaves no file behind and ends with the process,
    however that ends. Raises ResourceMissing where another command holds it or the folder
    cannot be made, BadData where a file stands there. File systems that cannot lock a folder
    (NFS) go without.
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
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ResourceMissing(
                    f"another command is at work in {folder}; wait for it, or give another folder"
                ) from None
        yield
    finally:
        os.close(handle)
