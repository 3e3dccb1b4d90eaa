"""One shard written by one worker: its samples, its index, its receipt."""

import dataclasses
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shards.index import index_tar
from shards.manifest import ShardRecord
from shards.pixels import SUFFIX, Encoding, encode, read_gray, resize
from shards.publishing import publish, publish_text, sha256_of


@dataclass(frozen=True)
class PixelRecipe:
    """How the pixels of every sample are made."""

    size: int = 224
    """Height and width in pixels."""
    encoding: Encoding = "jpeg"
    quality: int = 95
    """Of JPEG, 1 to 100; without effect on png, which is lossless."""


@dataclass(frozen=True)
class ShardTask:
    """What a worker needs to write one shard."""

    tar: Path
    receipt: Path
    samples: list[tuple[int, str, bytes]]
    """Row, path of the source image, 14 label bytes."""
    pixels: PixelRecipe


@dataclass(frozen=True)
class Receipt:
    """What a worker found out about the shard it wrote."""

    shard: ShardRecord
    pixel_sum: int
    pixel_square_sum: int
    rejects: list[tuple[int, str]]
    """Row and reason of each image that does not decode."""


def pack_shard(task: ShardTask) -> Receipt:
    """Write one shard, its index and its receipt; runs in a worker process."""
    pixel_sum = pixel_square_sum = samples = 0
    rejects: list[tuple[int, str]] = []
    image_suffix = SUFFIX[task.pixels.encoding]
    with publish(task.tar) as partial, tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as archive:
        for row, path, labels in task.samples:
            try:
                gray = resize(read_gray(Path(path).read_bytes()), task.pixels.size)
            except (ValueError, OSError) as error:
                # An OSError's text has the folder in it, which the same images elsewhere have not.
                rejects.append((row, getattr(error, "strerror", None) or str(error)))
                continue
            wide = gray.astype(np.uint64)
            pixel_sum += int(wide.sum())
            pixel_square_sum += int((wide * wide).sum())
            samples += 1
            image = encode(gray, task.pixels.encoding, task.pixels.quality)
            row_bytes = np.array(row, dtype="<i4").tobytes()
            for suffix, data in ((image_suffix, image), ("labels", labels), ("row", row_bytes)):
                archive.addfile(_member(f"{row:08d}.{suffix}", len(data)), io.BytesIO(data))
    idx = task.tar.with_suffix(".idx")
    publish_text(idx, index_tar(task.tar))
    shard = ShardRecord(task.tar.name, samples, task.tar.stat().st_size, sha256_of(task.tar), sha256_of(idx))
    receipt = Receipt(shard, pixel_sum, pixel_square_sum, rejects)
    publish_text(task.receipt, json.dumps(dataclasses.asdict(receipt)))
    return receipt


def read_receipt(task: ShardTask) -> Receipt | None:
    """Return the receipt of a shard that is finished and whole, else None.

    A shard with rejects counts as unfinished: its images may have been mended since.
    """
    if not task.receipt.is_file():
        return None
    try:
        record = json.loads(task.receipt.read_text(encoding="utf-8"))
        receipt = Receipt(ShardRecord(**record.pop("shard")), **record)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    idx = task.tar.with_suffix(".idx")
    whole = (
        not receipt.rejects
        and task.tar.is_file()
        and idx.is_file()
        and sha256_of(task.tar) == receipt.shard.sha256
        and sha256_of(idx) == receipt.shard.idx_sha256
    )
    return receipt if whole else None


def _member(name: str, size: int) -> tarfile.TarInfo:
    # Owner 0:0 and time 0 are TarInfo's defaults; they make the same input the same bytes.
    member = tarfile.TarInfo(name)
    member.size = size
    member.mode = 0o444
    return member
