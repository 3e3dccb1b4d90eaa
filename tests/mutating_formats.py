"""Changes at random that know a file's format, so that they reach behind its checksums."""

import json
import random
import struct
import zlib

from tests.mutating import mutate_bytes, mutate_json, mutate_tree, to_json

_WRONG_HEADERS = (
    None,
    -1,
    2**63,
    10**30,
    float("inf"),
    "",
    "x",
    "x" * 10_000,
    [],
    [-1],
    {},
    "F64",
    "@deep list@",
)

Draw = random.Random


def mutate_index(draw: Draw, data: bytes) -> bytes:
    if draw.random() < 0.3:
        return mutate_bytes(draw, data)
    words = data.split(b" ")
    words[draw.randrange(len(words))] = draw.choice(
        [b"0", b"-1", b"9" * 18, b"9" * 30, b"1", b"8192", b"10240", b"x", b"\n", b"", b"jpg", b"1e9"]
    )
    return b" ".join(words)


def mutate_header(draw: Draw, data: bytes) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + length], data[8 + length :]
    kind = draw.randrange(4)
    if kind == 0:
        return mutate_bytes(draw, data[: 8 + length]) + rest
    record = json.loads(header)
    if kind == 1:
        record = mutate_tree(draw, record, _WRONG_HEADERS)
    else:  # what is written in the metadata as JSON
        (key,) = record["__metadata__"]
        record["__metadata__"][key] = mutate_json(draw, record["__metadata__"][key].encode()).decode(
            "utf-8", errors="replace"
        )
    changed = to_json(record)
    return struct.pack("<Q", len(changed)) + changed + rest


def mutate_png(draw: Draw, data: bytes) -> bytes:
    fields = list(struct.unpack(">IIBBBBB", data[16:29]))
    fields[draw.randrange(7)] = draw.choice([0, 1, 3, 16, 60_000, 255]) % 256
    if draw.random() < 0.7:
        fields[draw.randrange(2)] = draw.choice([0, 1, 8192, 65_500, 2**31 - 1, 2**32 - 1])
    header = b"IHDR" + struct.pack(">IIBBBBB", *fields)
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def mutate_jpeg(draw: Draw, data: bytes) -> bytes:
    frame = data.find(b"\xff\xc0")
    sides = struct.pack(">HH", *(draw.choice([0, 1, 31, 33, 8192, 65_500, 65_535]) for _ in range(2)))
    return data[: frame + 5] + sides + data[frame + 9 :]
