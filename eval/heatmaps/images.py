"""Some images of a shard folder, by row, as a model takes them."""

import numpy as np
import numpy.typing as npt

from shards.errors import BadData
from shards.folder import ShardFolder, SplitReader
from shards.pixels import decode_sample


class ImageReader:
    """Decodes the images of any rows, in any order; for a few of them, not for an epoch."""

    def __init__(self, shards: ShardFolder) -> None:
        self.shards = shards
        self._readers: dict[str, SplitReader] = {}

    def read(self, rows: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
        """Return uint8 [len(rows), 1, size, size]; BadData naming an image that does not decode."""
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
