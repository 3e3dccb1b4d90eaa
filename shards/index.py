"""The `.idx` file of a shard: the offset of each member of each sample, in DALI's v1.2 format.

First line `v1.2 SAMPLES`, then one line per sample: `ext offset size name` for every member, as
DALI's own `wds2idx` writes it. Packing writes it (packing.shard), a lost one is rebuilt when a folder is opened
(folder), and its SHA-256 is in the manifest. `folder.SplitReader`, through which all loaders but webdataset read, finds
a sample's bytes by it; webdataset finds its slices of a shard by it.
"""

import re
import tarfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shards.documents import read_bytes
from shards.errors import BadData

VERSION = "v1.2"
# A tar ends with two zero blocks, which no member may reach into.
_END = 2 * tarfile.BLOCKSIZE


def largest_index(samples: int) -> int:
    """Return the most bytes that an index of so many samples may have: 512 each; NIH's have 100."""
    return 512 * (samples + 1)


def index_tar(tar: Path) -> str:
    """Return the index text of a shard by reading its headers."""
    samples: list[list[str]] = []
    last_key = None
    with tarfile.open(tar, "r:") as archive:
        for member in archive:
            key, _, extension = member.name.partition(".")
            if key != last_key:
                samples.append([])
                last_key = key
            samples[-1].append(f"{extension} {member.offset_data} {member.size} {member.name}")
    return "\n".join([f"{VERSION} {len(samples)}", *(" ".join(members) for members in samples)]) + "\n"


def read_index(idx: Path, extensions: tuple[str, ...]) -> npt.NDArray[np.int64]:
    """Return int64 [samples, members, 2]: offset and size in bytes of each member.

    Members are in the order of `extensions`, which every sample must have, and lie within the tar beside
    the index. Raises BadData where the file says anything else.
    """
    tar = idx.with_suffix(".tar")
    size = tar.stat().st_size if tar.is_file() else 0
    # Each sample has blocks of the tar, so its size bounds their number.
    data = read_bytes(idx, largest_index(size // tarfile.BLOCKSIZE))
    lines = data.decode("ascii", errors="replace").splitlines()
    if not lines or lines[0].split() != [VERSION, str(len(lines) - 1)]:
        raise BadData(f"{idx} is not a {VERSION} index of {max(len(lines) - 1, 0)} samples")
    sample_line = re.compile(" ".join(rf"{extension} ([0-9]{{1,18}}) ([0-9]{{1,18}}) \S+" for extension in extensions))
    table = np.empty((len(lines) - 1, 2 * len(extensions)), dtype=np.int64)
    for sample, line in enumerate(lines[1:]):
        numbers = sample_line.fullmatch(line)
        if numbers is None:
            raise BadData(f"{idx}, line {sample + 2}: expected the offset and size of {', '.join(extensions)}")
        table[sample] = numbers.groups()
    places = table.reshape(-1, len(extensions), 2)
    outside = np.flatnonzero((places.sum(axis=2, dtype=np.float64) > size - _END).any(axis=1))
    if len(outside):
        raise BadData(f"{idx}, line {outside[0] + 2}: a member does not lie within {tar.name}")
    return places
