"""Bits that flip on a disk or on the way: verification finds every one."""

import random
import tarfile
from pathlib import Path

import pandas as pd
import pytest

from shards.errors import BadData
from shards.verification import verify_shards
from tests.shards.test_verification import forge


def faults(folder: Path) -> list[str]:
    return list(verify_shards(folder).faults)


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.full)])
def test_every_flipped_bit_is_found_and_its_file_named(shards: Path, count: int) -> None:
    draw = random.Random(0)
    files = sorted(shards.iterdir())
    for n in range(count):
        path = files[n % len(files)]  # a small file is as likely as a large one
        before = path.read_bytes()
        data = bytearray(before)
        place, bit = draw.randrange(len(data)), draw.randrange(8)
        data[place] ^= 1 << bit
        path.write_bytes(data)
        try:
            found = faults(shards)
        except BadData as error:  # of the manifest
            found = [error.message]
        assert any(str(path) in fault for fault in found), f"bit {bit} of byte {place} of {path.name}"
        path.write_bytes(before)
    assert faults(shards) == []


def flips(tar: Path, count: int) -> list[tuple[int, str]]:
    """Places in a tar, most of them in its images, each with the sample that it belongs to."""
    with tarfile.open(tar, "r:") as archive:
        members = archive.getmembers()
    draw = random.Random(1)
    places = []
    for n in range(count):
        member = members[n % len(members)]
        start, end = member.offset_data, member.offset_data + member.size
        if n % 7 == 0:  # in its header, or in the zeros behind it
            start, end = member.offset, -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        places.append((draw.randrange(start, end), f"{tar}, sample {member.name[:8]}: "))
    return places


@pytest.mark.parametrize("count", [48, pytest.param(600, marks=pytest.mark.full)])
def test_every_flipped_bit_of_a_sample_is_found_with_its_shard_and_its_sample(shards: Path, count: int) -> None:
    tar = shards / "train-00000.tar"
    before = tar.read_bytes()
    for n, (place, sample) in enumerate(flips(tar, count)):
        data = bytearray(before)
        data[place] ^= 1 << n % 8
        tar.write_bytes(data)
        first, *others = faults(shards)
        assert first.startswith(sample), f"byte {place}: {first}"
        assert any("SHA-256 differs" in fault for fault in others)
    tar.write_bytes(before)
    assert faults(shards) == []


def test_a_folder_without_the_sums_of_its_images_is_verified_and_a_flip_names_the_shard(shards: Path) -> None:
    table = pd.read_csv(shards / "entries.csv", dtype=str, keep_default_na=False)
    table.drop(columns="packed_crc32").to_csv(shards / "entries.csv", index=False)
    forge(shards)
    assert faults(shards) == []
    tar = shards / "train-00000.tar"
    with tarfile.open(tar, "r:") as archive:
        image = archive.getmembers()[0]
    data = bytearray(tar.read_bytes())
    data[image.offset_data + 15] ^= 1  # the density that its header claims, which decides no pixel
    tar.write_bytes(data)
    assert faults(shards) == [f"{tar} is not the tar that was packed (SHA-256 differs); pack or fetch it again"]
