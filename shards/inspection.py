"""Inspect one shard in one worker: account for every byte of the tar against entries.csv."""

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
from PIL import Image

from shards.errors import BadData, ResourceMissing
from shards.files import sha256_of
from shards.findings import FINDINGS
from shards.folder import restore_index
from shards.index import index_tar
from shards.manifest import ShardRecord

MOST_FAULTS = 20  # of one shard; what is wrong after so many is seldom news
_FORMAT = {"jpg": "JPEG", "png": "PNG"}


@dataclass(frozen=True)
class ShardInspection:
    """What a worker needs to inspect one shard."""

    tar: Path
    record: ShardRecord
    extension: str
    """Of the image members, `jpg` or `png`."""
    size: int
    """Height and width of every image in pixels."""
    rows: npt.NDArray[np.int32]
    """[samples], what entries.csv has in this shard, in order."""
    labels: npt.NDArray[np.uint8]
    """[samples, 14] in FINDINGS order."""
    crc32s: npt.NDArray[np.int64] | None = None
    """[samples], of the image members; None where entries.csv has no such column."""


@dataclass(frozen=True)
class Inspected:
    """What was found in one shard."""

    faults: tuple[str, ...]
    """Each names the shard, the sample where it is one's, and the cause; at most MOST_FAULTS."""
    warnings: tuple[str, ...]
    """What was mended, so that it is no fault any more."""


class _UnreadableError(Exception):
    """A fault behind which the tar's members cannot be told apart any more."""


def inspect_shard(task: ShardInspection) -> Inspected:
    """Compare one tar and its index with the manifest and entries.csv; runs in a worker process.

    Proves that the tar is, byte for byte, the USTAR headers that packing writes, the members
    that entries.csv asks for in its order, and zeros; that every label and row byte is that of
    entries.csv; that every image decodes to uint8 [size, size] and has the CRC-32 that entries.csv
    gives it; and that both files have their recorded SHA-256. The faults that name a sample come
    first. A missing index is built again.
    """
    faults: list[str] = []
    notes: tuple[str, ...] = ()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of what a forged image claims: it ends as a fault
            for fault in _member_faults(task):
                faults.append(fault)
                if len(faults) == MOST_FAULTS - 1:
                    break
        if sha256_of(task.tar) != task.record.sha256:
            faults.append(f"{task.tar} is not the tar that was packed (SHA-256 differs); pack or fetch it again")
        if not faults and restore_index(task.tar, task.record):
            notes = (f"{task.tar.with_suffix('.idx')} was missing and is built again",)
        faults.extend(_index_faults(task, whole_tar=not faults))
    except PermissionError as error:
        raise ResourceMissing(f"{error.filename or task.tar}: {error.strerror}; allow it to be read") from error
    except OSError as error:
        faults.append(f"{task.tar}: cannot be read: {error.strerror or error}")
    except (BadData, ResourceMissing) as error:
        faults.append(error.message)
    return Inspected(tuple(faults), notes)


def _index_faults(task: ShardInspection, *, whole_tar: bool) -> Iterator[str]:
    idx = task.tar.with_suffix(".idx")
    if not idx.is_file():
        yield f"{idx} is missing"
    elif sha256_of(idx) != task.record.idx_sha256:
        yield f"{idx} is not the index that was packed; delete it and it is built again"
    elif whole_tar and hashlib.sha256(index_tar(task.tar).encode()).hexdigest() != task.record.idx_sha256:
        yield f"{idx} does not say where the members of {task.tar.name} lie"


def _member_faults(task: ShardInspection) -> Iterator[str]:
    if not task.tar.is_file():
        yield f"{task.tar} is missing"
        return
    found = task.tar.stat().st_size
    if found != task.record.bytes:
        yield f"{task.tar} has {found} bytes, the manifest says {task.record.bytes}"
    if found == 0:  # cannot be mapped, and there is nothing to say of its members
        return
    with task.tar.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            offset = 0
            crc32s = [None] * len(task.rows) if task.crc32s is None else task.crc32s.tolist()
            for row, labels, crc32 in zip(task.rows.tolist(), task.labels, crc32s, strict=True):
                sample = f"{task.tar}, sample {row:08d}"
                members: list[bytes] = []
                for suffix in (task.extension, "labels", "row"):
                    content, offset = _member(data, offset, f"{row:08d}.{suffix}", sample)
                    members.append(content)
                causes = _content_faults(task, row, labels, crc32, *members)
                yield from (f"{sample}: {cause}" for cause in causes)
            _check_end(data, offset, task)
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
    # TarInfo's defaults: a regular file, time 0, owner 0, no name of an owner, no target of a link.
    plain = tarfile.TarInfo(name)
    plain.size, plain.mode = member.size, 0o444
    if not 0 <= member.size <= len(data) or header != plain.tobuf(tarfile.USTAR_FORMAT):
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


def _check_end(data: mmap.mmap, offset: int, task: ShardInspection) -> None:
    # Two zero blocks end a tar, and zeros fill it up to a record.
    if any(data[offset : offset + tarfile.BLOCKSIZE]):
        try:
            name = tarfile.TarInfo.frombuf(data[offset : offset + tarfile.BLOCKSIZE], "utf-8", "surrogateescape").name
        except tarfile.HeaderError:
            name = "bytes that are no member"
        raise _UnreadableError(f"{task.tar}: behind its {len(task.rows)} samples it holds {name!a}")
    rest = data[offset:]
    if any(rest) or len(rest) < 2 * tarfile.BLOCKSIZE or len(data) % tarfile.RECORDSIZE:
        raise _UnreadableError(f"{task.tar}: it does not end as a tar does, in zeros up to a whole record")


def _content_faults(
    task: ShardInspection,
    row: int,
    expected: npt.NDArray[np.uint8],
    crc32: int | None,
    image: bytes,
    labels: bytes,
    stored: bytes,
) -> Iterator[str]:
    if len(labels) != len(FINDINGS):
        yield f".labels has {len(labels)} bytes, not {len(FINDINGS)}"
    elif labels != expected.tobytes():
        finding, was, should = next(
            (finding, was, should)
            for finding, was, should in zip(FINDINGS, labels, expected.tolist(), strict=True)
            if was != should
        )
        yield f"the label of {finding} is {was}, entries.csv says {should}"
    if stored != np.array(row, dtype="<i4").tobytes():
        yield f".row holds {stored.hex(' ')}, not {row} as int32"
    try:
        with Image.open(io.BytesIO(image), formats=[_FORMAT[task.extension]]) as opened:
            if (opened.mode, opened.size) != ("L", (task.size, task.size)):
                found = f"{opened.mode} {opened.width}x{opened.height}"
                yield f"the image is {found}, not gray {task.size}x{task.size}"
                return
            opened.load()
    except Exception as error:  # a forged image may break anything that a decoder relies on
        yield f"the image does not decode: {str(error).split(' <')[0]}"
        return
    if crc32 is not None and zlib.crc32(image) != crc32:
        yield "the image decodes but is not the one that was packed (CRC-32 differs)"
