"""A few samples as a slice of a tar: the unit of work of a packing worker.

Tar members are padded to whole blocks, so the pieces of a shard, one after the other, are the
shard. That makes the unit smaller than a shard, and a set of a hundred images busies every core.
"""

import hashlib
import tarfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shards.pixels import SUFFIX, PixelRecipe, encode, is_12_bit, open_png, psnr, resize, to_gray

# Every so-manieth row is decoded again to measure what the encoding costs: 7,000 of NIH's images,
# at 1 % of the time that measuring all would take.
PSNR_STEP = 16


class Sample(NamedTuple):
    """One entry to pack."""

    row: int
    image: str
    """Path of the source image, relative to the source folder."""
    labels: bytes
    """14 bytes in FINDINGS order."""


@dataclass(frozen=True)
class PixelStatistics:
    """Sums over the packed images, which add up to those of a split."""

    samples: int = 0
    pixel_sum: int = 0
    pixel_square_sum: int = 0
    psnr_samples: int = 0
    psnr_sum: float = 0.0
    """In dB, over the rows that PSNR_STEP divides."""

    def __add__(self, other: "PixelStatistics") -> "PixelStatistics":
        return PixelStatistics(
            self.samples + other.samples,
            self.pixel_sum + other.pixel_sum,
            self.pixel_square_sum + other.pixel_square_sum,
            self.psnr_samples + other.psnr_samples,
            self.psnr_sum + other.psnr_sum,
        )


@dataclass(frozen=True)
class Fragment:
    """What became of a few samples."""

    tar: bytes
    """Their members, whole blocks without the end of an archive."""
    sources: list[tuple[str, str]]
    """Image and SHA-256 of its file (empty where it cannot be read), of every sample in order."""
    rejects: list[tuple[int, str]]
    """Row and reason of each image that does not decode."""
    packed: list[tuple[int, int]]
    """Row and CRC-32 of the image member of each image that was packed."""
    oddities: list[tuple[int, str]]
    """Row and kind (a key of `oddities.MESSAGES`) of each image that looks wrong though it decodes."""
    statistics: PixelStatistics
    read_ns: int
    """A time before the first file was read, in nanoseconds since 1970."""


def make_fragment(source: Path, samples: list[Sample], recipe: PixelRecipe) -> Fragment:
    """Read, decode, resize and encode the images of `samples`; those that are bad are rejected."""
    read_ns = time.time_ns()
    members: list[bytes] = []
    sources: list[tuple[str, str]] = []
    rejects: list[tuple[int, str]] = []
    packed: list[tuple[int, int]] = []
    oddities: list[tuple[int, str]] = []
    statistics = PixelStatistics()
    for row, image, labels in samples:
        sha256 = ""
        try:
            data = (source / image).read_bytes()
            sha256 = hashlib.sha256(data).hexdigest()
            image_file = open_png(data)
            gray = resize(to_gray(image_file), recipe.size, recipe.filter)
        except (ValueError, OSError) as error:
            # An OSError's text has the folder in it, which the same images elsewhere have not.
            rejects.append((row, getattr(error, "strerror", None) or str(error)))
            continue
        finally:
            sources.append((image, sha256))
        if max(image_file.size) < recipe.size:
            oddities.append((row, "enlarged"))
        if is_12_bit(image_file):
            oddities.append((row, "twelve_bits"))
        encoded = encode(gray, recipe.encoding, recipe.quality)
        measured = recipe.encoding != "png" and row % PSNR_STEP == 0
        wide = gray.astype(np.uint64)
        statistics += PixelStatistics(
            1, int(wide.sum()), int((wide * wide).sum()), int(measured), psnr(gray, encoded) if measured else 0.0
        )
        packed.append((row, zlib.crc32(encoded)))
        row_bytes = np.array(row, dtype="<i4").tobytes()
        for suffix, content in ((SUFFIX[recipe.encoding], encoded), ("labels", labels), ("row", row_bytes)):
            members += _member(f"{row:08d}.{suffix}", content)
    return Fragment(b"".join(members), sources, rejects, packed, oddities, statistics, read_ns)


def _member(name: str, content: bytes) -> tuple[bytes, bytes, bytes]:
    # Owner 0:0 and time 0 are TarInfo's defaults; they make the same input the same bytes.
    member = tarfile.TarInfo(name)
    member.size = len(content)
    member.mode = 0o444
    return member.tobuf(tarfile.USTAR_FORMAT), content, bytes(-len(content) % tarfile.BLOCKSIZE)
