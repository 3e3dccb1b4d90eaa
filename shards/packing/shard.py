"""Write shards: worker processes pack a few samples each, this process joins what they made to tars.

Tar members are padded to whole blocks, so the fragments of a shard, one after the other, are the shard. A unit of
work smaller than a shard lets a set of a hundred images busy every core. Processes, not threads: reading, decoding,
resizing and encoding run outside Python's global lock, but so fast that two threads wait for it between them. Two
processes pack 1.88 times what one does (python -m benchmarks.packing), two threads packed 1.7 times.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import tarfile
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shards.console import progress_bar
from shards.documents import read_json
from shards.errors import BadData, ResourceMissing
from shards.files import atomic_write, atomic_write_text, sha256_of
from shards.index import index_tar
from shards.manifest import SUFFIX, ShardRecord
from shards.pixels import PixelRecipe, encode, is_12_bit, open_png, psnr, resize, to_gray
from shards.processes import map_in_processes

# Samples a fragment: enough that handing it over costs nothing, few enough to share out evenly.
_SAMPLES = 8
# Every 16th row is decoded again to measure what the encoding costs: 7,000 of NIH's images, at 1 % of the
# time that measuring all would take.
PSNR_STEP = 16


class Sample(NamedTuple):
    """One entry to pack."""

    row: int
    image: str
    """Path of the source image, relative to the source folder."""
    labels: bytes
    """A byte for each finding, in the manifest's order."""


class SampleReport(NamedTuple):
    """What became of a sample."""

    row: int
    image: str
    sha256: str
    """Of the image's file; empty where it cannot be read."""
    reject: str | None = None
    """Why the image does not decode; None where it does, and was packed. What follows is of packed images."""
    crc32: int = 0
    """Of the image member."""
    oddities: tuple[str, ...] = ()
    """How it looks wrong though it decodes: keys of `planning.ODDITIES`."""
    pixel_sum: int = 0
    """Of the resized pixels, as is the sum of their squares."""
    pixel_square_sum: int = 0
    psnr: float | None = None
    """PSNR of the encoding in dB; None for png and in rows that PSNR_STEP does not divide."""


class Fragment(NamedTuple):
    """A slice of a tar."""

    tar: bytes
    """Whole blocks, without the end of an archive."""
    samples: list[SampleReport]
    read_ns: int
    """A time before the first file was read, in nanoseconds since 1970."""


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
    samples: list[SampleReport]
    """Of every sample of the task in order."""
    read_ns: int
    """A time before the first source was read, in nanoseconds since 1970."""


def write_shards(
    tasks: list[ShardTask], source: Path, pixels: PixelRecipe, jobs: int, done: int = 0
) -> Iterator[tuple[ShardTask, ShardReport]]:
    """Write the shards of `tasks` in order with `jobs` processes; yield each with its receipt.

    `done` is the number of images packed before, for the progress bar. Raises what write_shard
    raises; fragments that were not begun are then dropped.
    """
    chunks = {
        task.tar: [task.samples[n : n + _SAMPLES] for n in range(0, len(task.samples), _SAMPLES)] for task in tasks
    }
    make = functools.partial(make_fragment, source, recipe=pixels)
    images = sum(len(task.samples) for task in tasks)
    made = map_in_processes(make, list(itertools.chain.from_iterable(chunks.values())), jobs)
    with (
        progress_bar(done + images, "packing", "img", initial=done, disable=not tasks) as bar,
        contextlib.closing(made) as fragments,
    ):

        def counted() -> Iterator[Fragment]:
            for _, fragment in fragments:
                bar.update(len(fragment.samples))
                yield fragment

        for task in tasks:
            yield task, write_shard(task, itertools.islice(counted(), len(chunks[task.tar])))


def make_fragment(source: Path, samples: list[Sample], recipe: PixelRecipe) -> Fragment:
    """Read, decode, resize and encode the images of `samples`; those that are bad are rejected."""
    read_ns = time.time_ns()
    packed = [_pack(source, sample, recipe) for sample in samples]
    return Fragment(b"".join(members for members, _ in packed), [report for _, report in packed], read_ns)


def _pack(source: Path, sample: Sample, recipe: PixelRecipe) -> tuple[bytes, SampleReport]:
    row, image, labels = sample
    sha256 = ""
    try:
        data = (source / image).read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        decoded = open_png(data)
        gray = resize(to_gray(decoded), recipe.size, recipe.filter)
    except (ValueError, OSError) as error:
        # An OSError's text has the folder in it, which the same images elsewhere have not.
        return b"", SampleReport(row, image, sha256, getattr(error, "strerror", None) or str(error))
    oddities = {"enlarged": max(decoded.size) < recipe.size, "twelve_bits": is_12_bit(decoded)}
    encoded = encode(gray, recipe.encoding, recipe.quality)
    contents = {SUFFIX[recipe.encoding]: encoded, "labels": labels, "row": np.array(row, dtype="<i4").tobytes()}
    wide = gray.astype(np.uint64)
    report = SampleReport(
        row,
        image,
        sha256,
        crc32=zlib.crc32(encoded),
        oddities=tuple(kind for kind, found in oddities.items() if found),
        pixel_sum=int(wide.sum()),
        pixel_square_sum=int((wide * wide).sum()),
        psnr=psnr(gray, encoded) if recipe.encoding != "png" and row % PSNR_STEP == 0 else None,
    )
    return b"".join(_member(f"{row:08d}.{suffix}", content) for suffix, content in contents.items()), report


def _member(name: str, content: bytes) -> bytes:
    return tar_header(name, len(content)) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def tar_header(name: str, size: int) -> bytes:
    """Return the header of a member: owner 0:0 and time 0, TarInfo's defaults, make the same input the same bytes."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o444
    return member.tobuf(tarfile.USTAR_FORMAT)


def write_shard(task: ShardTask, fragments: Iterable[Fragment]) -> ShardReport:
    """Write one shard, its index and its receipt, each published whole, in this order.

    Raises ResourceMissing where the disk is full or cannot be written to.
    """
    samples: list[SampleReport] = []
    read_ns = []
    with atomic_write(task.tar) as partial, partial.open("wb") as file:
        for fragment in fragments:
            file.write(fragment.tar)
            samples += fragment.samples
            read_ns.append(fragment.read_ns)
        # An archive ends with two empty blocks and fills its last record, as `tar` itself does.
        file.write(bytes(2 * tarfile.BLOCKSIZE))
        file.write(bytes(-file.tell() % tarfile.RECORDSIZE))
    idx = task.tar.with_suffix(".idx")
    if packed := sum(sample.reject is None for sample in samples):
        atomic_write_text(idx, index_tar(task.tar))
        shard = ShardRecord(task.tar.name, packed, task.tar.stat().st_size, sha256_of(task.tar), sha256_of(idx))
    else:  # an archive of nothing is no shard
        task.tar.unlink()
        idx.unlink(missing_ok=True)
        shard = ShardRecord(task.tar.name, 0, 0, "", "")
    report = ShardReport(shard, samples, min(read_ns))
    atomic_write_text(task.receipt, json.dumps(dataclasses.asdict(report)))
    return report


def read_receipt(task: ShardTask) -> ShardReport | None:
    """Return the receipt of a shard that is finished and whole, else None.

    A shard with rejects counts as unfinished: its images may have been mended since.
    """
    try:
        report = read_json(task.receipt, ShardReport)
    except (BadData, ResourceMissing):
        return None
    fits = (
        report.shard.name == task.tar.name
        and report.shard.samples == len(report.samples) == len(task.samples)
        and all(sample.reject is None for sample in report.samples)
    )
    return report if fits and is_intact(task.tar, report.shard) else None


def is_intact(tar: Path, shard: ShardRecord) -> bool:
    """Return whether a tar and its index are byte for byte those of the record."""
    idx = tar.with_suffix(".idx")
    return tar.is_file() and idx.is_file() and sha256_of(tar) == shard.sha256 and sha256_of(idx) == shard.idx_sha256
