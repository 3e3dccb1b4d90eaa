"""The way the student report loaded images: PNG files, torchvision transforms, a torch DataLoader."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from shards.folder import ShardFolder, SplitReader
from shards.pixels import decode_sample, encode

Item = tuple[torch.Tensor, torch.Tensor]


def unpack(shards: ShardFolder, split: str, folder: Path) -> None:
    """Write a split's images as the gray PNG files that resizing ahead left on the report's disk."""
    folder.mkdir(parents=True)
    reader = SplitReader(shards, split)
    for position, row in enumerate(reader.rows):
        image = decode_sample(reader.read([position]).images[0].tobytes())
        (folder / f"{row:08d}.png").write_bytes(encode(image, "png", quality=0))


class PngDataset(Dataset[Item]):
    """float32 [3, S, S], normalised with ImageNet statistics, and float32 labels [14]."""

    def __init__(self, files: list[Path], labels: torch.Tensor) -> None:
        self.files = files
        self.labels = labels
        self.transform = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Item:
        with Image.open(self.files[index]) as image:
            return self.transform(image.convert("RGB")), self.labels[index]


def report_loader(folder: Path, labels: np.ndarray, batch_size: int, workers: int) -> "DataLoader[Item]":
    """Return the DataLoader over the files of unpack(), shuffled, workers kept between epochs."""
    dataset = PngDataset(sorted(folder.glob("*.png")), torch.from_numpy(labels).float())
    return DataLoader(
        dataset,
        batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
        multiprocessing_context="spawn",
    )
