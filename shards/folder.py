"""A finished shard folder, opened: its manifest, its entries, and samples by position."""

import hashlib
import mmap
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from shards.boxes import BOXES, MOST_BOXES, parse_boxes
from shards.console import echo
from shards.csv_tables import largest_table, parse_entries
from shards.documents import read_bytes
from shards.errors import BadData, ResourceMissing
from shards.findings import FINDINGS
from shards.index import index_tar, largest_index, read_index
from shards.manifest import NAME, Manifest, ShardRecord, read_manifest
from shards.publishing import publish_text

ENTRIES = "entries.csv"
REJECTS = "rejects.csv"


@dataclass(frozen=True)
class ShardFolder:
    """A shard folder that passed the quick check: manifest, sizes and index hashes agree."""

    path: Path
    manifest: Manifest
    digest: str
    """SHA-256 of manifest.json, which through its hashes names every byte of the folder."""

    @cached_property
    def entries(self) -> pd.DataFrame:
        """entries.csv as `shards.csv_tables.parse_entries` returns it.

        Checked against the manifest's hash.
        """
        path = self.path / ENTRIES
        rows = sum(split.images for split in self.manifest.splits.values())
        return parse_entries(read_packed(path, self.manifest.entries_sha256, rows), path)

    @cached_property
    def boxes(self) -> pd.DataFrame | None:
        """boxes.csv as `shards.boxes.read_boxes` returns it; None where it was packed without boxes.

        Checked against the manifest's hash.
        """
        if self.manifest.boxes_sha256 is None:
            return None
        path = self.path / BOXES
        return parse_boxes(read_packed(path, self.manifest.boxes_sha256, MOST_BOXES), path)

    def rows(self, split: str) -> npt.NDArray[np.int32]:
        """Return int32 [samples]: the rows of a split in ascending order, as they lie in its shards."""
        return self.entries.index[self.entries["split"] == split].to_numpy(dtype=np.int32)


def read_packed(path: Path, sha256: str, rows: int) -> bytes:
    """Return the bytes of a table of at most so many rows; BadData where it is not the one of this hash."""
    if path.is_file():
        data = read_bytes(path, largest_table(rows))
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
    raise BadData(f"{path} is missing or not the file that was packed; pack again")


def open_shards(path: Path) -> ShardFolder:
    """Open a shard folder after a quick check (under a second for the whole of NIH).

    Checks that the manifest is whole, that every tar has its recorded size, and every index
    its recorded hash and number of samples. A missing index is built again, which is said on
    stderr. Raises BadData naming the first file that differs; `scripts/verify_shards.py` is
    the thorough check. Raises ResourceMissing where a missing index cannot be written.
    """
    manifest = read_manifest(path)
    for shard in manifest.shards:
        tar = path / shard.name
        size = tar.stat().st_size if tar.is_file() else None
        if size != shard.bytes:
            state = "is missing" if size is None else f"has {size} bytes"
            raise BadData(f"{tar} {state}, the manifest says {shard.bytes} bytes; pack again")
        idx = tar.with_suffix(".idx")
        if restore_index(tar, shard):
            echo(f"note: {idx} was missing and is built again", err=True)
        index = read_bytes(idx, largest_index(shard.samples))
        if hashlib.sha256(index).hexdigest() != shard.idx_sha256:
            raise BadData(f"{idx} is not the index that was packed; delete it and it is built again")
        samples = index.count(b"\n") - 1
        if samples != shard.samples:
            raise BadData(f"{idx} has {samples} samples, the manifest says {shard.samples}; pack again")
    return ShardFolder(path, manifest, hashlib.sha256((path / NAME).read_bytes()).hexdigest())


def restore_index(tar: Path, shard: ShardRecord) -> bool:
    """Build the index of a shard again where it is missing; return whether it was.

    It is written only if it is byte for byte the one that was packed: else the tar is
    damaged, which raises BadData. Raises ResourceMissing where it cannot be written.
    """
    idx = tar.with_suffix(".idx")
    if idx.exists():
        return False
    try:
        text = index_tar(tar)
    except (tarfile.TarError, UnicodeDecodeError) as error:
        raise BadData(f"{tar} is damaged: {error}; pack again") from error
    if hashlib.sha256(text.encode()).hexdigest() != shard.idx_sha256:
        raise BadData(f"{tar} is damaged: its members do not lie where they were packed; pack again")
    try:
        publish_text(idx, text)
    except ResourceMissing as error:
        raise ResourceMissing(
            f"{idx} is missing and cannot be built again in a folder that cannot be written to; run "
            f"`python scripts/verify_shards.py {tar.parent}` once as somebody who may write there, "
            "or use a copy of the folder"
        ) from error
    return True


class Samples(NamedTuple):
    """Some samples of a split, still encoded."""

    images: list[npt.NDArray[np.uint8]]
    """The encoded bytes of each image: views into the mapped shards, not copies."""
    labels: npt.NDArray[np.uint8]
    """[N, 14] in FINDINGS order."""
    rows: npt.NDArray[np.int32]
    """[N], the rows of entries.csv."""


class SplitReader:
    """Random access to the samples of one split through memory-mapped shards.

    Position p is the p-th sample of the split in row order. Reading touches only the pages
    of that sample, so any order costs the same once the shards are in the page cache. Labels
    and row are read, and the row proved, when a sample is read first, and remembered.
    """

    def __init__(self, folder: ShardFolder, split: str) -> None:
        self.split = split
        self.rows = folder.rows(split)
        shards = folder.manifest.shards_of(split)
        members = (folder.manifest.extension, "labels", "row")
        self._tars = [folder.path / shard.name for shard in shards]
        self._maps = [_map(tar) for tar in self._tars]
        places = [read_index(tar.with_suffix(".idx"), members) for tar in self._tars]
        self._shard = np.repeat(np.arange(len(shards)), [len(place) for place in places])
        self._places = np.concatenate(places) if places else np.empty((0, 3, 2), dtype=np.int64)
        self._labels = np.zeros((len(self._places), len(FINDINGS)), dtype=np.uint8)
        self._proved = np.zeros(len(self._places), dtype=np.bool_)
        if len(self._places) != len(self.rows):
            raise BadData(
                f"{folder.path}: the indexes of {split} hold {len(self._places)} samples, "
                f"{ENTRIES} {len(self.rows)}"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, position: int) -> str:
        """Return `SHARD, sample KEY` for messages about one sample."""
        return f"{self._tars[self._shard[position]]}, sample {self.rows[position]:08d}"

    def read(self, positions: Sequence[int] | npt.NDArray[np.int64]) -> Samples:
        """Return the samples at these positions; raise BadData where a stored row is not the expected."""
        positions = np.asarray(positions, dtype=np.int64)
        for position in positions[~self._proved[positions]].tolist():
            self._prove(position)
        starts, sizes = self._places[positions, 0].T
        images = [
            self._maps[shard][start : start + size]
            for shard, start, size in zip(
                self._shard[positions].tolist(), starts.tolist(), sizes.tolist(), strict=True
            )
        ]
        return Samples(images, self._labels[positions], self.rows[positions])

    def _prove(self, position: int) -> None:
        shard = self._maps[self._shard[position]]
        _, (labels_at, _), (row_at, _) = self._places[position].tolist()
        row = int(shard[row_at : row_at + 4].view("<i4")[0])
        if row != self.rows[position]:
            raise BadData(f"{self.name(position)}: the shard holds row {row} there")
        self._labels[position] = shard[labels_at : labels_at + len(FINDINGS)]
        self._proved[position] = True


def _map(tar: Path) -> npt.NDArray[np.uint8]:
    with tar.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
