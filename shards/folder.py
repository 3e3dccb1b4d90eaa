"""Open a finished shard folder: manifest, entries, and samples by position."""

import contextlib
import errno
import hashlib
import os
import tarfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from isal import isal_zlib

from shards.boxes import BOXES, MOST_BOXES, parse_boxes
from shards.console import echo
from shards.csv_tables import PACKED_CRC32, largest_table, parse_entries
from shards.documents import read_bytes
from shards.errors import BadData, ResourceMissing
from shards.files import atomic_write_text
from shards.index import index_tar, largest_index, read_index
from shards.manifest import NAME, Manifest, ShardRecord, read_manifest

ENTRIES = "entries.csv"
REJECTS = "rejects.csv"
_ROW_BYTES = 4
# Bytes of a shard that are asked for at once, as by a page fault in a mapped file. In random order a cold disk has
# 540 requests for 67 MB with it, not 3,000.
_CHUNK = 128 * 2**10


@dataclass(frozen=True)
class ShardFolder:
    """A shard folder that passed the quick check: manifest, sizes and index hashes agree."""

    path: Path
    manifest: Manifest
    digest: str
    """SHA-256 of manifest.json, which through its hashes names every byte of the folder."""

    @cached_property
    def entries(self) -> pd.DataFrame:
        """entries.csv as `csv_tables.parse_entries` returns it, checked against the manifest's hash."""
        path = self.path / ENTRIES
        rows = sum(split.images for split in self.manifest.splits.values())
        return parse_entries(read_packed(path, self.manifest.entries_sha256, rows), self.manifest.findings, path)

    @cached_property
    def boxes(self) -> pd.DataFrame | None:
        """boxes.csv as `boxes.read_boxes` returns it, checked against the manifest's hash; None without boxes."""
        if self.manifest.boxes_sha256 is None:
            return None
        path = self.path / BOXES
        return parse_boxes(read_packed(path, self.manifest.boxes_sha256, MOST_BOXES), self.manifest.findings, path)

    def rows(self, split: str) -> npt.NDArray[np.int32]:
        """Return int32 [samples]: the rows of a split in ascending order, as they lie in its shards."""
        return self.entries.index[self.entries["split"] == split].to_numpy(dtype=np.int32)

    def labels(self, split: str) -> npt.NDArray[np.uint8]:
        """Return uint8 [samples, F] in the manifest's order: the labels of a split, in the order of its rows."""
        entries = self.entries
        return entries.loc[entries["split"] == split, list(self.manifest.findings)].to_numpy(dtype=np.uint8)

    def crc32s(self, split: str) -> npt.NDArray[np.int64] | None:
        """Return int64 [samples]: the CRC-32 of each image of a split; None where entries.csv has none."""
        entries = self.entries
        if PACKED_CRC32 not in entries:
            return None
        return entries.loc[entries["split"] == split, PACKED_CRC32].to_numpy(dtype=np.int64, copy=True)


def read_packed(path: Path, sha256: str, rows: int) -> bytes:
    """Return the bytes of a table of at most so many rows; BadData where it is not the one of this hash."""
    if path.is_file():
        data = read_bytes(path, largest_table(rows))
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
    raise BadData(f"{path} is missing or not the file that was packed; pack again")


def open_shards(path: Path) -> ShardFolder:
    """Open a shard folder after a quick check (under a second for the whole of NIH).

    Checks that the manifest is whole, that every tar has its recorded size, and every index its recorded hash and
    number of samples. A missing index is built again, which is said on stderr. Raises BadData naming the first file
    that differs (`scripts/verify_shards.py` is the thorough check), ResourceMissing where no index can be written.
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

    It is written only if it is byte for byte the one that was packed: else the tar is damaged, which raises BadData.
    Raises ResourceMissing where it cannot be written.
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
        atomic_write_text(idx, text)
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
    """The encoded bytes of each image; read-only."""
    labels: npt.NDArray[np.uint8]
    """[N, F] in the manifest's order."""
    rows: npt.NDArray[np.int32]
    """[N], the rows of entries.csv."""


class SplitReader:
    """Random access to the samples of one split.

    Position p is the p-th sample of the split in row order. Reading touches only the bytes of that sample, so any
    order costs the same once the shards are in the page cache. When a sample is read first, its row, its labels and,
    where entries.csv has it, the CRC-32 of its image are compared with entries.csv. So only the packed image reaches a
    decoder; DALI's may crash on anything else. The CRC-32 takes 3 of the 170 microseconds in which an image is decoded.
    The shards stay open as long as the reader. They are read, not memory-mapped: where a shard got shorter meanwhile,
    a read is short, but a touch of the mapped page ends the process with SIGBUS.

    Raises BadData where an index does not fit the manifest or entries.csv, or a shard is missing;
    ResourceMissing where a shard cannot be opened.
    """

    def __init__(self, folder: ShardFolder, split: str) -> None:
        self.rows = folder.rows(split)
        self.labels = folder.labels(split)
        """[samples, F] in the manifest's order, from entries.csv."""
        self._findings = folder.manifest.findings
        self._crc32s = folder.crc32s(split)
        shards = folder.manifest.shards_of(split)
        members = (folder.manifest.extension, "labels", "row")
        self._tars = [folder.path / shard.name for shard in shards]
        self._files: list[int] = []
        weakref.finalize(self, _close, self._files)
        for tar in self._tars:
            self._files.append(_open(tar))
        places = [
            _read_offsets(tar, shard, members, len(self._findings))
            for tar, shard in zip(self._tars, shards, strict=True)
        ]
        self._shard = np.repeat(np.arange(len(shards)), [len(place) for place in places])
        self._places = np.concatenate(places) if places else np.empty((0, 3, 2), dtype=np.int64)
        self._verified = np.zeros(len(self._places), dtype=np.bool_)
        if len(self._places) != len(self.rows):
            raise BadData(
                f"{folder.path}: the indexes of {split} hold {len(self._places)} samples, {ENTRIES} {len(self.rows)}"
            )
        self._read_chunks: set[tuple[int, int]] = set()

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, position: int) -> str:
        """Return `SHARD, sample KEY` for messages about one sample."""
        return f"{self._tars[self._shard[position]]}, sample {self.rows[position]:08d}"

    def read(self, positions: Sequence[int] | npt.NDArray[np.int64]) -> Samples:
        """Return the samples at these positions.

        Raises BadData naming shard and sample where a shard has become shorter, or where a row, a label or an
        image in it is not that of entries.csv; ResourceMissing where the disk does not give what it holds.
        """
        positions = np.asarray(positions, dtype=np.int64)
        new = ~self._verified[positions]
        starts, sizes = self._places[positions, 0].T
        # A sample that is read first is read to the end of its row, which is its last member.
        ends = np.where(new, self._places[positions, 2].sum(axis=1), starts + sizes)
        spans = (positions, self._shard[positions], starts, ends - starts)
        if new.any():
            self._read_ahead(positions[new])
        data = [self._bytes(*span) for span in zip(*(each.tolist() for each in spans), strict=True)]
        if new.any():
            self._verify(positions[new], [data[place] for place in new.nonzero()[0]])
        images = [np.frombuffer(whole, np.uint8, size) for whole, size in zip(data, sizes.tolist(), strict=True)]
        return Samples(images, self.labels[positions], self.rows[positions])

    def _read_ahead(self, positions: npt.NDArray[np.int64]) -> None:
        # A slow disk is asked for everything before the first answer is waited for.
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        chunks = (self._shard[positions].tolist(), (self._places[positions, 0, 0] // _CHUNK).tolist())
        new = {*zip(*chunks, strict=True)} - self._read_chunks
        self._read_chunks |= new
        with contextlib.suppress(OSError):  # reading then says what is wrong
            for shard, chunk in new:
                os.posix_fadvise(self._files[shard], chunk * _CHUNK, _CHUNK, os.POSIX_FADV_WILLNEED)

    def _bytes(self, position: int, shard: int, start: int, size: int) -> bytes:
        try:
            data = os.pread(self._files[shard], size, start)
        except OSError as error:
            raise ResourceMissing(
                f"{self.name(position)} cannot be read: {error.strerror}; check the disk, or copy the shards to another"
            ) from error
        if len(data) < size:
            raise BadData(f"{self.name(position)} is cut off, the shard has become shorter; pack again")
        return data

    def _verify(self, positions: npt.NDArray[np.int64], data: list[bytes]) -> None:
        # The data of each reaches from its image to the end of its row.
        labels_at = (self._places[positions, 1, 0] - self._places[positions, 0, 0]).tolist()
        labels = b"".join(whole[at : at + len(self._findings)] for whole, at in zip(data, labels_at, strict=True))
        rows = np.frombuffer(b"".join(whole[-_ROW_BYTES:] for whole in data), "<i4")
        for place in (rows != self.rows[positions]).nonzero()[0]:
            raise BadData(f"{self.name(positions[place])}: the shard holds row {rows[place]} there")
        stored = np.frombuffer(labels, np.uint8).reshape(-1, len(self._findings))
        for place in (stored != self.labels[positions]).any(axis=1).nonzero()[0]:
            check_labels(self.name(positions[place]), self._findings, stored[place], self.labels[positions[place]])
        if self._crc32s is not None:  # folders packed before entries.csv had them are read without
            sizes = self._places[positions, 0, 1].tolist()
            found = [isal_zlib.crc32(memoryview(whole)[:size]) for whole, size in zip(data, sizes, strict=True)]
            # NumPy clears the vector registers that ISA-L leaves in use; see pixels.pixels_only.
            for place in (np.array(found) != self._crc32s[positions]).nonzero()[0]:
                raise BadData(f"{self.name(positions[place])} does not hold the image that was packed; pack again")
        self._verified[positions] = True


def check_labels(
    name: str, findings: Sequence[str], stored: npt.NDArray[np.uint8], expected: npt.NDArray[np.uint8]
) -> None:
    """Raise BadData naming the first finding whose label in a shard is not that of entries.csv."""
    for finding in (stored != expected).nonzero()[0]:
        raise BadData(
            f"{name}: {findings[finding]} is {stored[finding]} in the shard and {expected[finding]} in "
            f"{ENTRIES}; pack again"
        )


def _read_offsets(tar: Path, shard: ShardRecord, members: tuple[str, str, str], findings: int) -> npt.NDArray[np.int64]:
    # Of image, labels and row, which follow each other within the shard; the last two have a fixed size.
    idx = tar.with_suffix(".idx")
    places = read_index(idx, members)
    starts, sizes = places[..., 0], places[..., 1]
    ends = starts + sizes
    if not (
        (sizes[:, 1:] == (findings, _ROW_BYTES)).all()
        and (ends[:, :-1] <= starts[:, 1:]).all()
        and (ends[:, -1] <= shard.bytes).all()
    ):
        raise BadData(
            f"{idx} does not fit its shard of {shard.bytes} bytes, or the members of a sample do not follow "
            "each other; pack again"
        )
    return places


def _open(tar: Path) -> int:
    try:
        return os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise BadData(f"{tar} is missing; pack again") from error
    except OSError as error:
        many = error.errno in (errno.EMFILE, errno.ENFILE)
        way_out = "; every shard is a file: raise the limit with ulimit -n 4096" if many else ""
        raise ResourceMissing(f"{tar} cannot be opened: {error.strerror}{way_out}") from error


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)
