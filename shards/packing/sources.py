"""Check that the source images are still those that were packed.

As `make` does, this trusts times: a file whose status last changed before it was read is not
read again. The status time, unlike the modification time, cannot be set back by copying or
unpacking an older file over a newer one. Files that changed later are compared by SHA-256.
"""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from shards.console import progress_bar
from shards.errors import CannotResume
from shards.files import sha256_of

# Clocks of file systems are coarse (2 s on FAT), and a server's may differ from this machine's.
_SLACK_NS = 2_000_000_000
# Images that are read again without a progress bar: a second's worth.
_SILENT = 1000


class Packed(NamedTuple):
    """A source image as it was when it was packed or rejected."""

    image: str
    """Path relative to the source folder."""
    sha256: str
    """Of the file; empty where it could not be read."""
    read_ns: int
    """A time before it was read, in nanoseconds since 1970."""


def verify_unchanged(source: Path, packed: Iterable[Packed], jobs: int) -> None:
    """Raise CannotResume naming the first image that is not the file that was packed."""
    suspects = [image for image in packed if _changed_after(source / image.image, image.read_ns)]
    changed = []
    with (
        ThreadPoolExecutor(jobs) as pool,
        progress_bar(len(suspects), "reading images again", "img", disable=len(suspects) < _SILENT) as bar,
    ):
        for image, sha256 in zip(suspects, pool.map(lambda i: _sha256(source / i.image), suspects), strict=True):
            bar.update()
            if sha256 != image.sha256:
                changed.append(image.image)
    if changed:
        others = f", nor are {len(changed) - 1} others what they were" if len(changed) > 1 else ""
        raise CannotResume(
            f"{source / changed[0]} is not the file that was packed{others}; put back what was there, "
            "or give another folder for the shards"
        )


def verify_same_images(out: Path, packed: Sequence[str], planned: Sequence[str]) -> None:
    """Raise CannotResume naming the first image by which two lists differ."""
    if packed == planned:
        return
    gone, new = sorted({*packed} - {*planned}), sorted({*planned} - {*packed})
    named = [f"{images[0]} {what}" for images, what in ((gone, "is gone"), (new, "is new")) if images]
    raise CannotResume(
        f"{out} was packed from other images: {' and '.join(named) or 'their order differs'}; "
        "give another folder for these"
    )


def _changed_after(path: Path, time_ns: int) -> bool:
    try:
        return os.stat(path).st_ctime_ns > time_ns - _SLACK_NS
    except OSError:
        return True


def _sha256(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError:
        return ""
