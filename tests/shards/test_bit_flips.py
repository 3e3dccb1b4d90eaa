"""Bits that flip on a disk or on the way: verification finds every one."""

import random
from pathlib import Path

import pytest

from shards.errors import BadData
from shards.verification import verify_shards


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
