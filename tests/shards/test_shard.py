import dataclasses
import io
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from shards.files import sha256_of
from shards.packing.shard import Sample, SampleReport, ShardReport, ShardTask, make_fragment, read_receipt, write_shard
from shards.pixels import PixelRecipe, open_gray, psnr, resize

LABELS = [bytes([n % 2] * 14) for n in range(3)]


class Packer(NamedTuple):
    """A shard of three smooth images, and how their pixels are made."""

    task: ShardTask
    source: Path
    pixels: PixelRecipe

    def pack(self, cut: int = 2) -> ShardReport:
        """Write the shard in two fragments."""
        parts = self.task.samples[:cut], self.task.samples[cut:]
        return write_shard(self.task, (make_fragment(self.source, part, self.pixels) for part in parts))

    def grays(self) -> list[np.ndarray]:
        """The resized pixels of the images."""
        files = [self.source / sample.image for sample in self.task.samples]
        return [resize(open_gray(path.read_bytes()), self.pixels.size) for path in files]


@pytest.fixture
def packer(tmp_path: Path, png: Callable[..., bytes]) -> Packer:
    ramp = np.add.outer(np.arange(40), np.arange(40)).astype(np.uint8)
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(png(ramp + np.uint8(50 * n)))
    samples = [Sample(79 + n, f"{n}.png", LABELS[n]) for n in range(3)]
    task = ShardTask(tmp_path / "out" / "train-00000.tar", tmp_path / "work" / "0.json", samples)
    return Packer(task, tmp_path, PixelRecipe(20))


def test_a_shard_holds_image_labels_and_row_of_each_sample_in_that_order(packer: Packer) -> None:
    packer.pack()
    names = [f"{row:08d}.{suffix}" for row in (79, 80, 81) for suffix in ("jpg", "labels", "row")]
    with tarfile.open(packer.task.tar, "r:") as archive:
        assert archive.getnames() == names
        contents = [archive.extractfile(name).read() for name in names]  # type: ignore[union-attr]
    assert contents[1::3] == LABELS
    assert contents[2::3] == [b"\x4f\0\0\0", b"\x50\0\0\0", b"\x51\0\0\0"]
    for data, gray in zip(contents[0::3], packer.grays(), strict=True):
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "L", (20, 20))
            assert np.abs(np.asarray(image).astype(int) - gray).max() <= 6


def test_a_shard_is_what_python_s_own_tarfile_writes_however_it_is_cut(packer: Packer) -> None:
    packer.pack(cut=1)
    data = packer.task.tar.read_bytes()
    packer.pack(cut=3)
    assert packer.task.tar.read_bytes() == data
    again = io.BytesIO()
    with (
        tarfile.open(packer.task.tar, "r:") as archive,
        tarfile.open(fileobj=again, mode="w", format=tarfile.USTAR_FORMAT) as copy,
    ):
        for member in archive:
            assert member.isreg() and not member.pax_headers
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            copy.addfile(member, archive.extractfile(member))
    assert again.getvalue() == data and data[257:265] == b"ustar\x0000"


def test_a_png_shard_holds_exactly_the_resized_pixels_and_measures_no_loss(packer: Packer) -> None:
    lossless = packer._replace(pixels=PixelRecipe(20, "png"))
    receipt = lossless.pack()
    assert [sample.psnr for sample in receipt.samples] == [None] * 3
    with tarfile.open(packer.task.tar, "r:") as archive:
        for sample, gray in zip(packer.task.samples, packer.grays(), strict=True):
            data = archive.extractfile(f"{sample.row:08d}.png").read()  # type: ignore[union-attr]
            assert np.array_equal(np.asarray(open_gray(data)), gray)


def test_the_receipt_records_the_files_as_they_are_and_the_sums_of_the_pixels(packer: Packer) -> None:
    receipt = packer.pack()
    expected = []
    for sample, gray in zip(packer.task.samples, packer.grays(), strict=True):
        with tarfile.open(packer.task.tar, "r:") as archive:
            encoded = archive.extractfile(f"{sample.row:08d}.jpg").read()  # type: ignore[union-attr]
        sha256, sums = sha256_of(packer.source / sample.image), (gray.sum(), (gray.astype(np.int64) ** 2).sum())
        # Of the three rows, 16 divides 80 only.
        nearness = psnr(gray, encoded) if sample.row == 80 else None
        expected.append(SampleReport(*sample[:2], sha256, None, zlib.crc32(encoded), (), *sums, nearness))
    assert receipt.samples == expected
    shard, tar = receipt.shard, packer.task.tar
    assert (shard.name, shard.samples, shard.bytes) == ("train-00000.tar", 3, tar.stat().st_size)
    assert (shard.sha256, shard.idx_sha256) == (sha256_of(tar), sha256_of(tar.with_suffix(".idx")))


def test_a_finished_shard_is_known_by_its_receipt(packer: Packer) -> None:
    assert read_receipt(packer.task) is None
    assert packer.pack() == read_receipt(packer.task)


@pytest.mark.parametrize("damage", ["no tar", "other tar", "no idx", "other idx", "no receipt", "half a receipt"])
def test_a_shard_that_is_not_whole_counts_as_unfinished(packer: Packer, damage: str) -> None:
    packer.pack()
    task = packer.task
    how, what = damage.rsplit(" ", 1)
    path = {"tar": task.tar, "idx": task.tar.with_suffix(".idx"), "receipt": task.receipt}[what]
    if how == "no":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert read_receipt(task) is None


def test_an_image_that_does_not_decode_is_left_out_with_its_reason_and_the_rest_is_packed(packer: Packer) -> None:
    (packer.source / "0.png").write_bytes(b"")
    (packer.source / "2.png").unlink()
    receipt = packer.pack()
    reasons = [sample.reject for sample in receipt.samples]
    assert reasons == ["the file is empty", None, "No such file or directory"]
    assert [sample.sha256 == "" for sample in receipt.samples] == [False, False, True]
    with tarfile.open(packer.task.tar, "r:") as archive:
        assert archive.getnames() == ["00000080.jpg", "00000080.labels", "00000080.row"]
    assert read_receipt(packer.task) is None  # its images may be mended before the next try


def test_a_shard_without_a_good_image_leaves_no_file_not_even_an_older_one(packer: Packer) -> None:
    packer.pack()
    for sample in packer.task.samples:
        (packer.source / sample.image).write_bytes(b"")
    receipt = packer.pack()
    assert dataclasses.astuple(receipt.shard) == ("train-00000.tar", 0, 0, "", "")
    assert list(packer.task.tar.parent.iterdir()) == []
