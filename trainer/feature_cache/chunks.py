"""Features saved while they are computed, so that an interrupted start resumes."""

import hashlib
import itertools
import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from shards.errors import CannotResume, ResourceMissing
from shards.files import hash_file
from trainer.logging.checkpoints import load_checkpoint, save_checkpoint

log = logging.getLogger("cxrapid.trainer")
SAVE_EVERY = 60.0
"""Seconds of computing between two saves. Features that take less in all are not saved."""
SHARE_OF_DISK = 0.1
"""Of what is free on the disk, what the features of a split may take there."""
_LARGEST = 256 * 2**20  # bytes of one file, which goes through memory

Tensors = Mapping[str, Tensor]
"""The features of a split by name, [images, ...] each, `rows` among them; they are computed in this order."""


class FeatureChunks:
    """One rank's features of one split on disk, in files of consecutive images.

    `load` returns the very bits that were saved under the same identity, from the first image on and without
    a gap. Files that are damaged or of another identity are removed, with all that follow. Each is written
    atomically, with its SHA-256 beside it. A full disk ends the saving, not the run.
    """

    def __init__(self, folder: Path, name: str, identity: str) -> None:
        """Open `folder/NAME-*.pt`, with an identity that names everything the features depend on."""
        self._folder = folder
        self._name = name
        self._identity = identity
        self._saved = 0
        self._may_save: bool | None = None
        self._begun = self._last = time.monotonic()
        self.loaded = 0
        """Images that `load` found."""

    def load(self, features: Tensors) -> int:
        """Fill in the first images of the features; return how many."""
        taken: set[Path] = set()
        while (path := self._path(self._saved)).is_file():
            try:
                self._saved += self._read(path, features)
            except CannotResume:
                break
            taken |= {path, hash_file(path)}
        for path in {*self._folder.glob(f"{self._name}-*")} - taken:
            path.unlink()
        self.loaded = self._saved
        self._begun = self._last = time.monotonic()
        return self.loaded

    def save_if_due(self, features: Tensors, images: int) -> None:
        """Save the new ones of the first `images`, if the last save was a minute ago."""
        if time.monotonic() - self._last >= SAVE_EVERY:
            self._save(features, images)

    def save_rest(self, features: Tensors, images: int) -> None:
        """Save the new ones of the first `images`, if all take over a minute at the rate so far."""
        computed, needed = images - self.loaded, len(features["rows"]) - self.loaded
        if self._saved or (time.monotonic() - self._begun) * needed >= SAVE_EVERY * computed:
            self._save(features, images)

    def _save(self, features: Tensors, images: int) -> None:
        if self._may_save is None:
            self._may_save = self._has_room(features)
        step = max(_LARGEST // sum(part[0].nbytes for part in features.values()), 1)
        while self._may_save and self._saved < images:
            chunk = slice(self._saved, min(self._saved + step, images))
            # Cloned: torch would save the whole storage of a view.
            parts = {
                name: part[chunk].cpu().clone(memory_format=torch.contiguous_format) for name, part in features.items()
            }
            try:
                save_checkpoint(self._path(chunk.start), {"identity": self._identity, **parts})
            except ResourceMissing as error:
                log.info(f"features are not saved any more while they are computed: {error.message}")
                self._may_save = False
            else:
                self._saved = chunk.stop
        self._last = time.monotonic()

    def _has_room(self, features: Tensors) -> bool:
        needed = sum(part[self._saved :].nbytes for part in features.values())
        room = SHARE_OF_DISK * shutil.disk_usage(self._folder.parent).free
        if needed > room:
            log.info(
                f"features are not saved while they are computed: {needed / 2**30:.2f} GiB are more than "
                f"{SHARE_OF_DISK:.0%} of what is free in {self._folder.parent}, {room / 2**30:.2f} GiB"
            )
        return needed <= room

    def _read(self, path: Path, features: Tensors) -> int:
        """Fill in what a file holds; return its images, at least one. CannotResume if it does not fit."""
        state = load_checkpoint(path)
        identity, rows = state.get("identity"), state.get("rows")
        images = len(rows) if isinstance(rows, Tensor) and rows.dim() else 0
        own = {name: part[self._saved : self._saved + images] for name, part in features.items()}
        fits = images > 0 and isinstance(identity, str) and identity == self._identity
        for name, part in own.items():
            saved = state.get(name)
            fits = fits and isinstance(saved, Tensor) and (saved.shape, saved.dtype) == (part.shape, part.dtype)
        if not fits:
            raise CannotResume(f"{path} holds other features")
        for name, part in own.items():
            part.copy_(state[name])
        return images

    def _path(self, first: int) -> Path:
        return self._folder / f"{self._name}-{first:08d}.pt"


def digest_of_frozen(model: nn.Module, trained: nn.Module) -> str:
    """Return the SHA-256 of all weights and buffers of a model outside its trainable head."""
    left_out = {id(tensor) for tensor in itertools.chain(trained.parameters(), trained.buffers())}
    digest = hashlib.sha256()
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if id(tensor) not in left_out:
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
