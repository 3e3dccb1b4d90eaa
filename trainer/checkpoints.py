"""Checkpoints: everything with a state in one file, written whole, proved by a hash beside it."""

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import torch

from shards.errors import CannotResume
from shards.publishing import publish, publish_text, sha256_of


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) to `path`, and its SHA-256 to `path.sha256`.

    The hash file is published first and holds the new hash and that of the checkpoint which
    still has the name, so kills at any moments leave a checkpoint with a hash that fits it.
    Raises ResourceMissing where the disk is full; the checkpoint before then stands.
    """
    before = [sha256_of(path)] if path.is_file() else []
    # Through memory, because torch.save() hides a full disk behind an error of its own.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    with publish(path) as partial:
        partial.write_bytes(content)
        publish_text(_hash_file(path), "\n".join([hashlib.sha256(content).hexdigest(), *before]) + "\n")


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
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CannotResume(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    return state


def _hash_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
