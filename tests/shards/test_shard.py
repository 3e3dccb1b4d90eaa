import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.pixels import read_gray, resize
from shards.publishing import sha256_of
from shards.shard import PixelRecipe, ShardTask, pack_shard, read_receipt

LABELS = [bytes([n % 2] * 14) for n in range(3)]


@pytest.fixture
def task(tmp_path: Path, png: Callable[..., bytes]) -> ShardTask:
    """Three smooth images of 40 px for a shard at 20 px."""
    for n in range(3):
        ramp = np.add.outer(np.arange(40), np.arange(40)) * (n + 1)
        (tmp_path / f"{n}.png").write_bytes(
            png(ramp.astype(np.uint8) if n == 0 else (ramp // 2).astype(np.uint8))
        )
    samples = [(70 + n, str(tmp_path / f"{n}.png"), LABELS[n]) for n in range(3)]
    return ShardTask(
        tmp_path / "out" / "train-00000.tar", tmp_path / "work" / "0.json", samples, PixelRecipe(20)
    )


def sources(task: ShardTask) -> list[np.ndarray]:
    return [resize(read_gray(Path(path).read_bytes()), task.pixels.size) for _, path, _ in task.samples]


def test_a_shard_holds_image_labels_and_row_of_each_sample_in_that_order(task: ShardTask) -> None:
    pack_shard(task)
    names = [f"{row:08d}.{suffix}" for row in (70, 71, 72) for suffix in ("jpg", "labels", "row")]
    with tarfile.open(task.tar, "r:") as archive:
        assert archive.getnames() == names
        contents = [archive.extractfile(name).read() for name in names]  # type: ignore[union-attr]
    assert contents[1::3] == LABELS
    assert contents[2::3] == [b"\x46\0\0\0", b"\x47\0\0\0", b"\x48\0\0\0"]
    for data, source in zip(contents[0::3], sources(task), strict=True):
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "L", (20, 20))
            assert np.abs(np.asarray(image).astype(int) - source).max() <= 6


def test_members_carry_no_time_owner_or_link(task: ShardTask) -> None:
    pack_shard(task)
    with tarfile.open(task.tar, "r:") as archive:
        for member in archive:
            assert member.isreg() and not member.pax_headers
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
    header = task.tar.read_bytes()[:512]
    assert header[257:265] == b"ustar\x0000"


def test_a_png_shard_holds_exactly_the_resized_pixels(task: ShardTask) -> None:
    lossless = ShardTask(task.tar, task.receipt, task.samples, PixelRecipe(20, "png"))
    pack_shard(lossless)
    with tarfile.open(task.tar, "r:") as archive:
        for (row, _, _), source in zip(task.samples, sources(task), strict=True):
            data = archive.extractfile(f"{row:08d}.png").read()  # type: ignore[union-attr]
            assert np.array_equal(read_gray(data), source)


def test_the_receipt_records_the_files_as_they_are_and_the_sums_of_the_pixels(task: ShardTask) -> None:
    receipt = pack_shard(task)
    pixels = np.concatenate([source.ravel() for source in sources(task)]).astype(np.int64)
    assert (receipt.pixel_sum, receipt.pixel_square_sum) == (pixels.sum(), (pixels**2).sum())
    shard = receipt.shard
    assert (shard.name, shard.samples, shard.bytes) == ("train-00000.tar", 3, task.tar.stat().st_size)
    assert (shard.sha256, shard.idx_sha256) == (sha256_of(task.tar), sha256_of(task.tar.with_suffix(".idx")))
    assert receipt.rejects == []


def test_a_finished_shard_is_known_by_its_receipt(task: ShardTask) -> None:
    assert read_receipt(task) is None
    assert pack_shard(task) == read_receipt(task)


@pytest.mark.parametrize(
    "damage", ["no tar", "other tar", "no idx", "other idx", "no receipt", "half a receipt"]
)
def test_a_shard_that_is_not_whole_counts_as_unfinished(task: ShardTask, damage: str) -> None:
    pack_shard(task)
    how, what = damage.rsplit(" ", 1)
    path = {"tar": task.tar, "idx": task.tar.with_suffix(".idx"), "receipt": task.receipt}[what]
    if how == "no":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert read_receipt(task) is None


def test_an_image_that_does_not_decode_is_left_out_with_its_reason_and_the_rest_is_packed(
    task: ShardTask,
) -> None:
    Path(task.samples[0][1]).write_bytes(b"")
    Path(task.samples[2][1]).unlink()
    receipt = pack_shard(task)
    assert receipt.rejects == [(70, "the file is empty"), (72, "No such file or directory")]
    with tarfile.open(task.tar, "r:") as archive:
        assert archive.getnames() == ["00000071.jpg", "00000071.labels", "00000071.row"]
    assert read_receipt(task) is None  # its images may be mended before the next try
