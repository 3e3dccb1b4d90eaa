"""Verify a shard folder: every byte against its manifest, every label against entries.csv."""

import hashlib
import io
import mmap
import tarfile
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image

from shards.boxes import BOXES, read_boxes
from shards.console import progress_bar
from shards.csv_tables import PACKED_CRC32, largest_table, parse_entries
from shards.documents import read_bytes
from shards.errors import BadData, ResourceMissing
from shards.files import sha256_of
from shards.folder import ENTRIES, REJECTS, restore_index
from shards.index import index_tar
from shards.manifest import NAME, Manifest, ShardRecord, SplitRecord, describe_split, read_manifest
from shards.packing.resume import WORK
from shards.packing.shard import tar_header
from shards.processes import map_in_processes
from shards.splits import SPLITS, verify_disjoint

MOST_FAULTS = 20  # of one shard; what is wrong after so many is seldom news
_FORMAT = {"jpg": "JPEG", "png": "PNG"}


@dataclass(frozen=True)
class Verification:
    """What was verified of a shard folder, or why it cannot be."""

    shards: int
    samples: int
    bytes: int
    """Of the tars."""
    patients: dict[str, int]
    """Per split, counted in entries.csv. A patient in two splits is a fault."""
    faults: tuple[str, ...]
    """Each names a file, the sample where it is one's, and the cause; none if all is verified. At most MOST_FAULTS
    of a shard."""
    warnings: tuple[str, ...]
    """What is odd but no fault: an index that was built again, a rest of packing."""


@dataclass(frozen=True)
class _Expected:
    """What the manifest and entries.csv say of one shard."""

    tar: Path
    record: ShardRecord
    extension: str
    """Of the image members, `jpg` or `png`."""
    size: int
    """Height and width of every image in pixels."""
    rows: list[int]
    """Of entries.csv, in the order of the samples."""
    findings: tuple[str, ...]
    labels: npt.NDArray[np.uint8]
    """[samples, F] in their order."""
    crc32s: list[int] | list[None]
    """Of the image members; None where entries.csv has no such column."""


class _UnreadableError(Exception):
    """A fault behind which the tar's members cannot be told apart any more."""


def verify_shards(path: Path, *, jobs: int = 1) -> Verification:
    """Verify a shard folder in `jobs` processes, or name what is wrong with it.

    Nothing in the manifest is believed: sizes and hashes are those of the files, counts and the disjointness of the
    splits those of entries.csv; no file may be missing, nor be there without being named. Each tar is, byte for byte,
    the USTAR headers that packing writes, the members that entries.csv asks for in its order, and zeros; every label
    and row byte is that of entries.csv; every image decodes to uint8 [size, size] and has the CRC-32 that entries.csv
    gives it. The only file ever written is an index that was missing. Raises BadData where the manifest itself cannot
    be read or names what is no shard; everything else is collected in `faults`.
    """
    manifest = read_manifest(path)
    faults, notes = _file_faults(path, manifest)
    patients = dict.fromkeys(SPLITS, 0)
    shards: list[_Expected] = []
    try:
        csv, rows = path / ENTRIES, sum(split.images for split in manifest.splits.values())
        entries = parse_entries(read_bytes(csv, largest_table(rows)), manifest.findings, csv)
        counted = {split: describe_split(entries[entries["split"] == split], manifest.findings) for split in SPLITS}
        patients = {split: record.patients for split, record in counted.items()}
        faults += _count_faults(path, manifest, entries, counted)
        faults += _box_faults(path, manifest, entries)
        shards = _expected(path, manifest, entries)
    except BadData as error:
        faults.append(f"{error.message}; so no shard can be compared with it")
    samples = sum(shard.samples for shard in manifest.shards)
    with progress_bar(samples, "verifying", "img") as bar:
        for shard, (found, mended) in map_in_processes(_inspect, shards, jobs):
            faults += found
            notes += mended
            bar.update(shard.record.samples)
    return Verification(
        shards=len(manifest.shards),
        samples=samples,
        bytes=sum(shard.bytes for shard in manifest.shards),
        patients=patients,
        faults=tuple(faults),
        warnings=tuple(notes),
    )


def _file_faults(path: Path, manifest: Manifest) -> tuple[list[str], list[str]]:
    # And what is no fault.
    faults, notes = [], []
    tables = {ENTRIES: manifest.entries_sha256, REJECTS: manifest.rejects_sha256}
    if manifest.boxes_sha256 is not None:
        tables[BOXES] = manifest.boxes_sha256
    for name, sha256 in tables.items():
        if not (path / name).is_file():
            faults.append(f"{path / name} is missing")
        elif sha256_of(path / name) != sha256:
            faults.append(f"{path / name} is not the file that was packed (SHA-256 differs); pack or fetch it again")
    tars = [shard.name for shard in manifest.shards]
    named = {NAME, *tables, *tars, *(Path(tar).with_suffix(".idx").name for tar in tars)}
    for found in sorted(path.iterdir()):
        if found.name == WORK:  # of a pack that was killed after its last step
            notes.append(f"{found} is a rest of packing; packing again removes it, and nothing reads it")
        elif found.name not in named:
            faults.append(f"{found} is in the folder, but the manifest does not name it; remove it")
    return faults, notes


def _count_faults(path: Path, manifest: Manifest, entries: pd.DataFrame, counted: dict[str, SplitRecord]) -> list[str]:
    faults = []
    try:
        verify_disjoint(entries, entries["split"].to_numpy(dtype="<U5"))
    except BadData as error:
        faults.append(f"{path / ENTRIES}: {error.message}")
    if manifest.patients_in_two_splits:
        faults.append(f"{path / NAME} itself says that {manifest.patients_in_two_splits} patients are in two splits")
    for split, found in counted.items():
        recorded = manifest.splits[split]
        counts: list[tuple[str, float | None, float | None]] = [
            ("images", recorded.images, found.images),
            ("patients", recorded.patients, found.patients),
        ]
        for finding in manifest.findings:
            counts.append((finding, recorded.positives[finding], found.positives[finding]))
            counts.append((f"the prevalence of {finding}", recorded.prevalence[finding], found.prevalence[finding]))
        faults += [
            f"{path / NAME} says {before} for {what} of {split}, {ENTRIES} has {now}"
            for what, before, now in counts
            if before != now
        ]
    return faults


def _box_faults(path: Path, manifest: Manifest, entries: pd.DataFrame) -> list[str]:
    # A file that is missing is named with the others.
    if manifest.boxes_sha256 is None or not (path / BOXES).is_file():
        return []
    try:
        rows = read_boxes(path / BOXES, manifest.findings)["row"]
    except BadData as error:
        return [error.message]
    stray = rows[~rows.isin(entries.index)]
    return [f"{path / BOXES} has a box of row {row}, which {ENTRIES} has not" for row in stray.unique()]


def _expected(path: Path, manifest: Manifest, entries: pd.DataFrame) -> list[_Expected]:
    expected = []
    for split in SPLITS:
        places = np.flatnonzero(entries["split"] == split)
        shards = manifest.shards_of(split)
        ends = np.cumsum([shard.samples for shard in shards], dtype=np.int64)
        for shard, mine in zip(shards, np.split(places, ends[:-1]), strict=True) if shards else ():
            table = entries.iloc[mine]
            rows, labels = table.index.tolist(), table[list(manifest.findings)].to_numpy(dtype=np.uint8)
            crc32s = table[PACKED_CRC32].tolist() if PACKED_CRC32 in table else [None] * len(table)
            tar = path / shard.name
            expected.append(
                _Expected(tar, shard, manifest.extension, manifest.size, rows, manifest.findings, labels, crc32s)
            )
    return expected


def _inspect(shard: _Expected) -> tuple[list[str], list[str]]:
    # In a worker process: the faults of one tar and its index, those that name a sample first, and what was mended.
    faults: list[str] = []
    mended: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of what a forged image claims: it ends as a fault
            for fault in _member_faults(shard):
                faults.append(fault)
                if len(faults) == MOST_FAULTS - 2:  # room for one of the tar and one of the index
                    break
        if sha256_of(shard.tar) != shard.record.sha256:
            faults.append(f"{shard.tar} is not the tar that was packed (SHA-256 differs); pack or fetch it again")
        if not faults and restore_index(shard.tar, shard.record):
            mended = [f"{shard.tar.with_suffix('.idx')} was missing and is built again"]
        faults.extend(_index_faults(shard, whole_tar=not faults))
    except PermissionError as error:
        raise ResourceMissing(f"{error.filename or shard.tar}: {error.strerror}; allow it to be read") from error
    except OSError as error:
        faults.append(f"{shard.tar}: cannot be read: {error.strerror or error}")
    except (BadData, ResourceMissing) as error:
        faults.append(error.message)
    return faults, mended


def _index_faults(shard: _Expected, *, whole_tar: bool) -> Iterator[str]:
    idx = shard.tar.with_suffix(".idx")
    if not idx.is_file():
        yield f"{idx} is missing"
    elif sha256_of(idx) != shard.record.idx_sha256:
        yield f"{idx} is not the index that was packed; delete it and it is built again"
    elif whole_tar and hashlib.sha256(index_tar(shard.tar).encode()).hexdigest() != shard.record.idx_sha256:
        yield f"{idx} does not say where the members of {shard.tar.name} lie"


def _member_faults(shard: _Expected) -> Iterator[str]:
    if not shard.tar.is_file():
        yield f"{shard.tar} is missing"
        return
    found = shard.tar.stat().st_size
    if found != shard.record.bytes:
        yield f"{shard.tar} has {found} bytes, the manifest says {shard.record.bytes}"
    if found == 0:  # cannot be mapped, and there is nothing to say of its members
        return
    with shard.tar.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            offset = 0
            for row, labels, crc32 in zip(shard.rows, shard.labels, shard.crc32s, strict=True):
                sample = f"{shard.tar}, sample {row:08d}"
                members: list[bytes] = []
                for suffix in (shard.extension, "labels", "row"):
                    content, offset = _member(data, offset, f"{row:08d}.{suffix}", sample)
                    members.append(content)
                causes = _content_faults(shard, row, labels, crc32, members)
                yield from (f"{sample}: {cause}" for cause in causes)
            _check_end(data, offset, shard)
        except _UnreadableError as error:
            yield str(error)


def _member(data: mmap.mmap, offset: int, name: str, sample: str) -> tuple[bytes, int]:
    # The content of the member at `offset`, which must be `name`, and where the next one begins.
    header = data[offset : offset + tarfile.BLOCKSIZE]
    try:
        member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise _UnreadableError(f"{sample}: no header of {name} at byte {offset} ({error})") from None
    if member.name != name:
        raise _UnreadableError(f"{sample}: the shard holds {member.name!a} where {name} belongs")
    if not 0 <= member.size <= len(data) or header != tar_header(name, member.size):
        raise _UnreadableError(
            f"{sample}: {name} is no plain USTAR file as packing writes it, but of type {member.type!a}, "
            f"time {member.mtime}, owner {member.uid}:{member.gid}, mode {member.mode:o}, "
            f"link {member.linkname!a}"
        )
    start = offset + tarfile.BLOCKSIZE
    end = start + member.size
    following = -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    if following > len(data):
        raise _UnreadableError(f"{sample}: the shard ends at byte {len(data)}, in the middle of {name}")
    if any(data[end:following]):
        raise _UnreadableError(f"{sample}: the padding behind {name} is not zero")
    return data[start:end], following


def _check_end(data: mmap.mmap, offset: int, shard: _Expected) -> None:
    # Two zero blocks end a tar, and zeros fill it up to a record.
    if any(data[offset : offset + tarfile.BLOCKSIZE]):
        try:
            name = tarfile.TarInfo.frombuf(data[offset : offset + tarfile.BLOCKSIZE], "utf-8", "surrogateescape").name
        except tarfile.HeaderError:
            name = "bytes that are no member"
        raise _UnreadableError(f"{shard.tar}: behind its {len(shard.rows)} samples it holds {name!a}")
    rest = data[offset:]
    if any(rest) or len(rest) < 2 * tarfile.BLOCKSIZE or len(data) % tarfile.RECORDSIZE:
        raise _UnreadableError(f"{shard.tar}: it does not end as a tar does, in zeros up to a whole record")


def _content_faults(
    shard: _Expected, row: int, expected: npt.NDArray[np.uint8], crc32: int | None, members: list[bytes]
) -> Iterator[str]:
    image, labels, stored = members
    if len(labels) != len(shard.findings):
        yield f".labels has {len(labels)} bytes, not {len(shard.findings)}"
    elif labels != expected.tobytes():
        first = next(n for n, label in enumerate(labels) if label != expected[n])
        yield f"the label of {shard.findings[first]} is {labels[first]}, entries.csv says {expected[first]}"
    if stored != np.array(row, dtype="<i4").tobytes():
        yield f".row holds {stored.hex(' ')}, not {row} as int32"
    try:
        with Image.open(io.BytesIO(image), formats=[_FORMAT[shard.extension]]) as opened:
            if (opened.mode, opened.size) != ("L", (shard.size, shard.size)):
                found = f"{opened.mode} {opened.width}x{opened.height}"
                yield f"the image is {found}, not gray {shard.size}x{shard.size}"
                return
            opened.load()
    except Exception as error:  # a forged image may break anything that a decoder relies on
        yield f"the image does not decode: {str(error).split(' <')[0]}"
        return
    if crc32 is not None and zlib.crc32(image) != crc32:
        yield "the image decodes but is not the one that was packed (CRC-32 differs)"
