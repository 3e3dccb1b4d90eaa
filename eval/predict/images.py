"""Single images as a model takes them, from files or from shards."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from shards.documents import read_bytes
from shards.errors import BadData
from shards.folder import ShardFolder, SplitReader
from shards.pixels import Gray, PixelRecipe, decode_sample, encode, open_gray, open_jpeg, resize

LARGEST = 256 * 2**20
"""Bytes of an image file; 8192 x 8192 pixels of 16 bits have 128 MiB."""


def read_image(path: Path, size: int) -> Gray:
    """Return a PNG or JPEG file as uint8 [size, size], as `scripts/make_shards.py` makes a sample by default.

    Resizes with Lanczos and passes the pixels through JPEG 95. Raises BadData naming the file where it is missing, no
    image, or larger than `shards.pixels.MAX_SIDE` to a side; ResourceMissing where it may not be read.
    """
    recipe = PixelRecipe(size)
    data = read_bytes(path, LARGEST)
    try:
        if not data.startswith((b"\x89PNG", b"\xff\xd8")):
            raise BadData(f"{path} is neither PNG nor JPEG")
        gray = open_gray(data) if data.startswith(b"\x89PNG") else open_jpeg(data)
        encoded = encode(resize(gray, size, recipe.filter), recipe.encoding, recipe.quality)
        return decode_sample(encoded, size)
    except (OSError, ValueError) as error:
        raise BadData(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


class ImageReader:
    """Decodes the images of any rows, in any order; for a few of them, not for an epoch."""

    def __init__(self, shards: ShardFolder) -> None:
        self.shards = shards
        self._readers: dict[str, SplitReader] = {}

    def read(self, rows: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
        """Return uint8 [len(rows), 1, size, size]; BadData naming an image that is not the packed one, or no image."""
        splits = self.shards.entries.loc[rows]["split"]
        pixels = [self._decode(str(split), int(row)) for row, split in zip(rows, splits, strict=True)]
        size = self.shards.manifest.size
        return np.stack(pixels)[:, None] if pixels else np.empty((0, 1, size, size), dtype=np.uint8)

    def _decode(self, split: str, row: int) -> npt.NDArray[np.uint8]:
        if split not in self._readers:
            self._readers[split] = SplitReader(self.shards, split)
        reader = self._readers[split]
        position = int(np.searchsorted(reader.rows, row))
        try:
            return decode_sample(reader.read([position]).images[0].tobytes(), self.shards.manifest.size)
        except ValueError as error:
            raise BadData(f"{reader.name(position)}: {error}") from error
