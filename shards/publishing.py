"""Files that appear under their final name whole or not at all."""

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from shards.errors import ResourceMissing

PARTIAL = ".partial"
_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextlib.contextmanager
def publish(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, rename it to `path`.

    The file is flushed to disk before the rename and the folder after it, so that after a
    kill or a power cut `path` holds either what it held before or the whole new content.
    When the block raises, the temporary file is removed. Raises ResourceMissing when the
    disk is full or cannot be written to.
    """
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        _remove(partial)
        raise ResourceMissing(
            f"cannot write {path}: {error.strerror or error}; what was finished before is kept, "
            f"so {'make room' if error.errno in _FULL else 'allow it or name another folder'} and run the "
            "same command again"
        ) from error
    except BaseException:
        _remove(partial)
        raise


def publish_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path` through publish()."""
    with publish(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def _remove(partial: Path) -> None:
    with contextlib.suppress(OSError):  # it may not be there, nor its folder
        partial.unlink()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
