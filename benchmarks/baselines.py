"""What people use without this project: PNG files, torchvision transforms, torch's DataLoader, webdataset.

`report`: the baseline paper's own way, RGB PNGs that were resized to 224 px ahead. `raw`: the
download's 1024 px PNGs, resized each time they are read. Both yield float32 batches, normalised.
`tuned`: what a good engineer makes of it: gray JPEG files, uint8 batches, pinned memory, the rest on the
device. `plain webdataset`: the library's own pipeline over the shards, as its documentation writes it.
(The loader dataloader goes further: whole batches a fetch, from shards, decoded by torchvision.)
"""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from shards.entries import find_images, read_entries
from shards.findings import FINDINGS
from shards.folder import ShardFolder, SplitReader
from shards.pixels import decode_sample
from shards.processes import available_cores, map_in_processes

Item = tuple[torch.Tensor, torch.Tensor]
_TASK = 256  # files a task


def unpack(shards: ShardFolder, split: str, folder: Path) -> None:
    """Write a split's images as the RGB PNG files that resizing ahead left on the baseline paper's disk.

    They are named so that their sorted names are in row order.
    """
    folder.mkdir(parents=True)
    images = len(shards.rows(split))
    write = functools.partial(_write_pngs, dataclasses.replace(shards), split, folder)
    tasks = [range(first, min(first + _TASK, images)) for first in range(0, images, _TASK)]
    for _ in map_in_processes(write, tasks, available_cores()):
        pass


def unpack_jpegs(shards: ShardFolder, split: str, folder: Path) -> None:
    """Write a split's images as gray JPEG files, byte for byte as they are packed, named in row order."""
    folder.mkdir(parents=True)
    reader = SplitReader(shards, split)
    for position, row in enumerate(reader.rows):
        (folder / f"{row:08d}.jpg").write_bytes(reader.read([position]).images[0].tobytes())


def _write_pngs(shards: ShardFolder, split: str, folder: Path, positions: range) -> None:
    reader = SplitReader(shards, split)
    samples = reader.read(positions)
    for row, image in zip(samples.rows, samples.images, strict=True):
        gray = Image.fromarray(decode_sample(image.tobytes(), shards.manifest.size))
        # Written in 3.4 ms and read in 1.07; at Pillow's own level, 6, it is 8.7 ms and 1.03.
        gray.convert("RGB").save(folder / f"{row:08d}.png", compress_level=3)


class PngDataset(Dataset[Item]):
    """float32 [3, S, S], normalised with ImageNet statistics, and float32 labels [14].

    `size` resizes to that many pixels a side; None takes the files as they are.
    """

    def __init__(self, files: list[Path], labels: npt.NDArray[np.uint8], size: int | None = None) -> None:
        self.files = files
        self.labels = torch.from_numpy(labels).float()
        self.transform = transforms.Compose(
            [
                *([] if size is None else [transforms.Resize((size, size))]),
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


class JpegDataset(Dataset[Item]):
    """uint8 [1, S, S], mirrored half of the time, and uint8 labels [14]."""

    def __init__(self, files: list[Path], labels: npt.NDArray[np.uint8]) -> None:
        self.files = files
        self.labels = torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Item:
        with Image.open(self.files[index]) as image:
            gray = torch.from_numpy(np.array(image))[None]
        return gray.flip(-1) if torch.rand(()) < 0.5 else gray, self.labels[index]


def tuned_loader(shards: ShardFolder, folder: Path, batch_size: int, workers: int) -> "DataLoader[Item]":
    """Return the DataLoader over the train split's gray JPEG files, which are written to a new folder."""
    unpack_jpegs(shards, "train", folder)
    return _loader(JpegDataset(sorted(folder.iterdir()), _train_labels(shards)), batch_size, workers)


def plain_webdataset_loader(shards: ShardFolder, batch_size: int, workers: int) -> Iterable[Item]:
    """Return webdataset's own loader over the train split, one worker a core: uint8 images and labels.

    Without flips, resume, equal ranks and checked labels.
    """
    tars = [str(shards.path / shard.name) for shard in shards.manifest.shards_of("train")]
    dataset = (
        webdataset.WebDataset(tars, shardshuffle=len(tars), empty_check=False)
        .shuffle(1000)
        .decode("l8", webdataset.handle_extension("labels", _decode_labels))
        .to_tuple(shards.manifest.extension, "labels")
        .batched(batch_size)
    )
    loader: Iterable[Item] = webdataset.WebLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        persistent_workers=True,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="spawn",
    )
    return loader


def _decode_labels(data: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8).copy()


def report_loader(shards: ShardFolder, folder: Path, batch_size: int, workers: int) -> "DataLoader[Item]":
    """Return the DataLoader over the train split's RGB PNG files, which are written to a new folder."""
    unpack(shards, "train", folder)
    return _loader(PngDataset(sorted(folder.iterdir()), _train_labels(shards)), batch_size, workers)


def raw_loader(source: Path, batch_size: int, workers: int, size: int = 224) -> "DataLoader[Item]":
    """Return the DataLoader over the files of an NIH tree, resized to `size` pixels a side when read.

    Where they are few they are taken over again, for two batches a worker, so that all have work.
    """
    folders = find_images(source)
    table = read_entries(source).table
    table = table[table["image"].isin(list(folders))]
    files = np.array([source / folders[name] / name for name in table["image"]])
    labels = table[list(FINDINGS)].to_numpy(dtype=np.uint8)
    chosen = np.arange(max(len(files), 2 * workers * batch_size)) % len(files)
    return _loader(PngDataset(files[chosen].tolist(), labels[chosen], size), batch_size, workers)


def _train_labels(shards: ShardFolder) -> npt.NDArray[np.uint8]:
    # [images, 14] in row order, which is the order of the files' names.
    return shards.entries.loc[shards.rows("train"), list(FINDINGS)].to_numpy(dtype=np.uint8)


def _loader(dataset: Dataset[Item], batch_size: int, workers: int) -> "DataLoader[Item]":
    return DataLoader(
        dataset,
        batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="spawn",
    )
