"""Write one shard: its fragments in order, its index, its report."""

import dataclasses
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from shards.documents import read_json
from shards.errors import BadData, ResourceMissing
from shards.files import atomic_write, atomic_write_text, sha256_of
from shards.index import index_tar
from shards.manifest import ShardRecord
from shards.packing.fragment import Fragment, PixelStatistics, Sample


@dataclass(frozen=True)
class ShardTask:
    """One shard to be written."""

    tar: Path
    receipt: Path
    samples: list[Sample]


@dataclass(frozen=True)
class ShardReport:
    """What was found out about a shard while it was written."""

    shard: ShardRecord
    """With no samples where every image was rejected: then there is no tar."""
    sources: list[tuple[str, str]]
    """Image and SHA-256 of its file, of every sample of the task in order."""
    rejects: list[tuple[int, str]]
    """Row and reason of each image that does not decode."""
    packed: list[tuple[int, int]]
    """Row and CRC-32 of the image member of each image that was packed."""
    oddities: list[tuple[int, str]]
    """Row and kind (a key of `oddities.MESSAGES`) of each image that looks wrong though it decodes."""
    statistics: PixelStatistics
    read_ns: int
    """A time before the first source was read, in nanoseconds since 1970."""


def write_shard(task: ShardTask, fragments: Iterable[Fragment]) -> ShardReport:
    """Write one shard, its index and its receipt, each published whole, in this order.

    Raises ResourceMissing where the disk is full or cannot be written to.
    """
    sources: list[tuple[str, str]] = []
    rejects: list[tuple[int, str]] = []
    packed: list[tuple[int, int]] = []
    oddities: list[tuple[int, str]] = []
    statistics, read_ns = PixelStatistics(), []
    with atomic_write(task.tar) as partial, partial.open("wb") as file:
        for fragment in fragments:
            file.write(fragment.tar)
            sources += fragment.sources
            rejects += fragment.rejects
            packed += fragment.packed
            oddities += fragment.oddities
            statistics += fragment.statistics
            read_ns.append(fragment.read_ns)
        # An archive ends with two empty blocks and fills its last record, as `tar` itself does.
        file.write(bytes(2 * tarfile.BLOCKSIZE))
        file.write(bytes(-file.tell() % tarfile.RECORDSIZE))
    idx = task.tar.with_suffix(".idx")
    if statistics.samples:
        atomic_write_text(idx, index_tar(task.tar))
        shard = ShardRecord(
            task.tar.name, statistics.samples, task.tar.stat().st_size, sha256_of(task.tar), sha256_of(idx)
        )
    else:  # an archive of nothing is no shard
        task.tar.unlink()
        idx.unlink(missing_ok=True)
        shard = ShardRecord(task.tar.name, 0, 0, "", "")
    receipt = ShardReport(shard, sources, rejects, packed, oddities, statistics, min(read_ns))
    atomic_write_text(task.receipt, json.dumps(dataclasses.asdict(receipt)))
    return receipt


def read_receipt(task: ShardTask) -> ShardReport | None:
    """Return the receipt of a shard that is finished and whole, else None.

    A shard with rejects counts as unfinished: its images may have been mended since.
    """
    try:
        receipt = read_json(task.receipt, ShardReport)
    except (BadData, ResourceMissing):
        return None
    fits = (
        receipt.shard.name == task.tar.name
        and not receipt.rejects
        and receipt.shard.samples == receipt.statistics.samples == len(task.samples)
    )
    return receipt if fits and is_intact(task.tar, receipt.shard) else None


def is_intact(tar: Path, shard: ShardRecord) -> bool:
    """Return whether a tar and its index are byte for byte those of the record."""
    idx = tar.with_suffix(".idx")
    return tar.is_file() and idx.is_file() and sha256_of(tar) == shard.sha256 and sha256_of(idx) == shard.idx_sha256
