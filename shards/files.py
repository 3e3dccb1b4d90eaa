"""Atomic files, with a hash beside them on request, and exclusive folders, which one command writes."""

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from shards.console import echo
from shards.errors import BadData, ResourceMissing

PARTIAL = ".partial"
"""The end of a temporary file's name, which begins with a dot: by it what a kill leaves is known."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_LOCK_POLL = 0.1  # seconds between two looks at a lock that another command holds


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield an empty temporary file beside `path`; when the block ends well, rename it to `path`.

    The temporary file has a name of its own: of two processes or threads that write the same path the last to end
    wins. It is flushed to disk before the rename and the folder after it, so that after a kill or a power cut `path`
    holds either what it held before or the whole new content. When the block raises, the temporary file is removed;
    `remove_partials` removes what a kill leaves. Raises ResourceMissing when the disk is full or cannot be written to.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    with _advising(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Within: a signal may raise as soon as the file is there.
            os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
            yield partial
            _fsync(partial)
            partial.replace(path)
            _fsync(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


def atomic_write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path` through atomic_write()."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def remove_partials(folder: Path) -> None:
    """Remove the temporary files that killed processes left in `folder` itself; ResourceMissing from the disk.

    Only for whoever holds the lock of `folder`: those of a process that is at work would go, too.
    """
    try:
        for partial in folder.glob(f".*{PARTIAL}"):
            partial.unlink()
    except OSError as error:
        raise ResourceMissing(f"cannot write to {folder}: {error.strerror}") from error


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _advising(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceMissing(
            f"cannot write {path}: {error.strerror or error}; what was finished before is kept, "
            f"so {'make room' if error.errno in _FULL else 'allow it or name another folder'} and run the "
            "same command again"
        ) from error


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class HashingFile:
    """A file open for writing whose SHA-256 is known when it is written; what libraries need of a file to write to."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.error: OSError | None = None
        """The first one of `write`, which some libraries hide behind an error of their own."""

    def write(self, data: bytes | memoryview) -> int:
        """Write and hash all of `data`; OSError from the disk."""
        self._digest.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        """Do nothing: whoever opened the file flushes it."""

    def hexdigest(self) -> str:
        """Return the SHA-256 so far as 64 hex digits."""
        return self._digest.hexdigest()


def hash_file(path: Path) -> Path:
    """Return where the SHA-256 of a file stands: beside it, as model.safetensors.sha256."""
    return path.with_name(f"{path.name}.sha256")


def write_with_hash(
    path: Path,
    write: Callable[[HashingFile], object],
    keep_as: Path | None = None,
    *,
    digests: dict[Path, str] | None = None,
) -> None:
    """Write a file and its hash file; with `keep_as` the file that had the name before is kept under that one.

    `write` is given the file, which is hashed as it is written. Hash files are published before the files they are of,
    and hold the new hash and that of the file which still has the name. So kills at any moments leave files with a
    hash that fits them: at least one of the two names then holds an intact one, or `path` alone does. `digests`, kept
    by a caller who alone writes these files, saves reading the former ones to hash them. Raises ResourceMissing where
    the disk is full; the file before then stands.
    """
    known = {} if digests is None else digests
    before, kept = ([known.get(each) or sha256_of(each)] if each and each.is_file() else [] for each in (path, keep_as))
    with atomic_write(path) as partial:
        with partial.open("wb") as file:
            hashing = HashingFile(file)
            write(hashing)
        if keep_as is not None and before:
            atomic_write_text(hash_file(keep_as), "\n".join([*before, *kept]) + "\n")
        atomic_write_text(hash_file(path), "\n".join([hashing.hexdigest(), *before]) + "\n")
        if keep_as is not None and before:
            path.replace(keep_as)
            known[keep_as] = before[0]
    known[path] = hashing.hexdigest()


@contextlib.contextmanager
def exclusive_lock(folder: Path, *, wait: float = 0) -> Iterator[None]:
    """Make `folder` if need be and keep every other command that asks for it out of it.

    The lock is on the folder itself, so it leaves no file behind and ends with the process, however that ends. Another
    command that holds it is waited for, for up to `wait` seconds, which a line on stderr says. Whoever takes several
    locks takes them in the order of their resolved paths: else two commands could wait for each other.

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
            held = _lock(handle, 0)
            if wait and not held:
                echo(f"waiting up to {wait:g} s for another command at work in {folder}", err=True)
                held = _lock(handle, wait)
            if not held:
                what = (
                    f"still at work in {folder} after {wait:g} s; run this one again when it has ended"
                    if wait
                    else f"at work in {folder}; wait for it, or give another folder"
                )
                raise ResourceMissing(f"another command is {what}")
        yield
    finally:
        os.close(handle)


def _lock(handle: int, wait: float) -> bool:
    deadline = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
        time.sleep(_LOCK_POLL)
