"""Checkpoints: everything with a state in one file, written atomically, verified by a hash beside it."""

import hashlib
import io
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch

from shards.errors import CannotResume
from shards.files import atomic_write, atomic_write_text, sha256_of

log = logging.getLogger("cxrapid.trainer")


def save_checkpoint(path: Path, state: dict[str, Any], keep_as: Path | None = None) -> None:
    """Write `state` (tensors and plain values) to `path`, and its SHA-256 to `path.sha256`.

    With `keep_as` the checkpoint that had the name before is kept under that one.

    Hash files are published before the checkpoints they are of, and hold the new hash and that of the
    checkpoint which still has the name, so kills at any moments leave checkpoints with a hash that fits
    them: at least one of the two names then holds a whole one, or `path` alone does.
    Raises ResourceMissing where the disk is full; the checkpoint before then stands.
    """
    before = [sha256_of(path)] if path.is_file() else []
    # Through memory, because torch.save() hides a full disk behind an error of its own.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    with atomic_write(path) as partial:
        partial.write_bytes(content)
        if keep_as is not None and before:
            kept = [sha256_of(keep_as)] if keep_as.is_file() else []
            atomic_write_text(_hash_file(keep_as), "\n".join([*before, *kept]) + "\n")
        atomic_write_text(_hash_file(path), "\n".join([hashlib.sha256(content).hexdigest(), *before]) + "\n")
        if keep_as is not None and before:
            path.replace(keep_as)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in it is executed.

    Raises CannotResume where it is missing, not the file its hash is of, or holds anything but
    tensors and plain values.
    """
    recorded = _hash_file(path)
    if not path.is_file() or not recorded.is_file():
        raise CannotResume(f"no checkpoint {path} with its {recorded.name}")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() not in recorded.read_text(encoding="ascii", errors="replace").split():
        raise CannotResume(f"{path} is damaged: its SHA-256 is not in {recorded.name}")
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # of which torch promises no kind for a file that is none
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise CannotResume(f"{path} cannot be read: {reason}") from error
    if not isinstance(state, dict):
        raise CannotResume(f"{path} holds a {type(state).__name__}, not the state of a run")
    return state


def load_newest(paths: list[Path]) -> dict[str, Any]:
    """Load the first of these checkpoints that is intact, and log which were not.

    Raises CannotResume naming what is wrong with each where none is: a run never starts anew silently.
    """
    problems: list[str] = []
    for path in paths:
        try:
            state = load_checkpoint(path)
        except CannotResume as error:
            problems.append(error.message)
            continue
        if problems:
            log.info(f"{'; '.join(problems)}: going on from the one before, {path.name}")
        return state
    raise CannotResume(
        f"{'; '.join(problems)}. Give another --name, or remove {paths[0].parent} to start this run anew"
    )


@contextmanager
def restoring(folder: Path) -> Iterator[None]:
    """Turn what goes wrong in restoring an intact checkpoint into CannotResume."""
    try:
        yield
    except (click.ClickException, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # what is in a file may break anything that restoring relies on
        reason = (str(error).splitlines() or [""])[0][:300]
        raise CannotResume(
            f"the checkpoints in {folder} are damaged, or of another version of CXRapid "
            f"({type(error).__name__}: {reason}); give another --name"
        ) from error


# Of the time, what checkpoints may take if epochs are shorter than saving.
_SHARE_OF_TIME = 0.1


class CheckpointTimer:
    """When the next checkpoint within an epoch is due: after so many minutes, or so many steps."""

    def __init__(self, minutes: float, steps: int) -> None:
        self._seconds = 60 * minutes
        self._steps = steps
        self.restart(0.0)

    def restart(self, took: float) -> None:
        """Count the time from now on, after a checkpoint that took so many seconds."""
        self._begun = time.monotonic()
        self._took = took

    def is_worthwhile(self) -> bool:
        """Return whether saving now, and so on, takes at most a tenth of the time."""
        return _SHARE_OF_TIME * (time.monotonic() - self._begun) >= self._took

    def is_due(self, step: int) -> bool:
        """Return whether to save after this step; 0 minutes and 0 steps are never."""
        late = bool(self._seconds) and time.monotonic() - self._begun >= self._seconds
        return late or (bool(self._steps) and step % self._steps == 0)


def _hash_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
