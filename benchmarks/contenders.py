"""The contenders of `benchmarks.loader`, each in a process of its own that waits for its turn.

So none shares threads, memory or a page table with another, and what each uses can be counted.
The process is given a Task as JSON; at every line on its standard input it loads one epoch and
answers with a line of JSON. What each contender is stands in `benchmarks.loader`.
"""

import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.harness import usage_of
from loaders import Augment, Batch, LoaderSpec, make_loader
from loaders.worker_pool import decode_gray
from shards.entries import find_images, read_entries
from shards.folder import ShardFolder, SplitReader, open_shards
from shards.pixels import decode_sample
from shards.processes import available_cores, map_in_processes
from trainer.devices import use_device

Item = tuple[torch.Tensor, torch.Tensor]
_SECONDS = 2.0  # a measurement takes at least so long, and whole epochs
_FILES = 256  # a task of `unpack`


@dataclass(frozen=True)
class Task:
    """What one contender is to do."""

    name: str
    """`limit ` and a name of DECODERS; plain webdataset; tuned; report; raw; or a loader, plus ` light` or ` strong` to
    augment."""
    shards: str
    threads: int
    batch_size: int
    device: str
    raw: str
    """An NIH tree with full-size images, for the contender raw."""
    limit: int
    """Images a measurement at most; 0: whole epochs."""


class Contender:
    """A contender's process, seen from the benchmark. It and its children stand still between turns."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.sweep_seconds = 0.0
        """How long dali took to choose a decoder for a GPU, next to nothing where it remembered; 0 for the others."""
        command = [sys.executable, "-m", "benchmarks.contenders", json.dumps(dataclasses.asdict(task))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def wait_ready(self) -> None:
        """Wait until everything is imported and opened, so that it disturbs nobody's turn."""
        self.sweep_seconds = self._answer()
        self._signal(signal.SIGSTOP)

    def measure(self) -> dict[str, float]:
        """Let it load once; return images, seconds, cpu_seconds, memory, first_batch and displacement."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        figures: dict[str, float] = self._answer()
        self._signal(signal.SIGSTOP)
        return figures

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the contender {self.task.name} ended with {self._process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        if self._process.poll() is None:
            self._signal(signal.SIGCONT)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        # Its group, which it made before it reported that it is ready: workers and decoders with it. The
        # kernel continues and ends a stopped group whose parent is gone.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


@contextmanager
def contend(tasks: list[Task]) -> Iterator[dict[str, Contender]]:
    """Yield a contender for each task, by name, and end them all."""
    contenders: dict[str, Contender] = {}
    try:
        for task in tasks:
            contenders[task.name] = Contender(task)
            contenders[task.name].wait_ready()
        yield contenders
    finally:
        for contender in contenders.values():
            contender.close()


def serve(task: Task) -> None:
    """Be a contender until standard input ends."""
    os.setpgrp()
    answers, sys.stdout = sys.stdout, sys.stderr
    use_device(task.device)
    with ExitStack() as stack:
        epoch = _open(task, stack)
        print(json.dumps(_sweep(task)), file=answers, flush=True)
        for _ in sys.stdin:
            print(json.dumps(_measured(epoch, task.limit)), file=answers, flush=True)


Epoch = Callable[[], Iterator[tuple[int, torch.Tensor | None]]]
"""Loads one epoch and yields for every batch its size and, where known, its rows."""


def _measured(epoch: Epoch, limit: int) -> dict[str, float]:
    images, first_batch, seconds, order = 0, 0.0, 0.0, []
    before, start = usage_of(os.getpid()), time.perf_counter()
    while seconds < _SECONDS and not (limit and images >= limit):
        for count, rows in epoch():
            first_batch = first_batch or time.perf_counter() - start
            images += count
            if rows is not None:
                order.append(rows)
            if limit and images >= limit:
                break
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    after = usage_of(os.getpid())
    return {
        "images": images,
        "seconds": seconds,
        "cpu_seconds": after.cpu_seconds - before.cpu_seconds,
        "memory": after.memory,
        "first_batch": first_batch,
        "displacement": _displacement(order),
    }


def _displacement(order: list[torch.Tensor]) -> float:
    # Mean distance between a sample's position in the last epoch and in the shards, as a share of the
    # split's size: 1/3 for a uniform permutation, near 0 for a small shuffle buffer.
    rows = torch.cat(order).cpu().numpy() if order else np.empty(0)
    samples = len(np.unique(rows))
    last = rows[len(rows) - samples :]
    if samples < 2 or len(np.unique(last)) < samples:
        return float("nan")
    return float(np.abs(np.argsort(np.argsort(last)) - np.arange(samples)).mean() / samples)


def _sweep(task: Task) -> float:
    # On a GPU dali measures decoders before its first batch and remembers the fastest: done now, that time is not in
    # the first batch.
    if task.name.partition(" ")[0] != "dali" or torch.device(task.device).type == "cpu":
        return 0.0
    from loaders.decoder import choose_decoder

    spec = _spec(task, open_shards(Path(task.shards)))
    start = time.perf_counter()
    choose_decoder(spec, SplitReader(spec.shards, spec.split))
    return time.perf_counter() - start


def _open(task: Task, stack: ExitStack) -> Epoch:
    shards = open_shards(Path(task.shards))
    if task.name.startswith("limit "):
        context = multiprocessing.get_context("spawn")
        processes = concurrent.futures.ProcessPoolExecutor(task.threads, context, _read_all, (task.shards,))
        pool = stack.enter_context(processes)
        decode = partial(_decode_share, task.name.removeprefix("limit "), step=task.threads, size=shards.manifest.size)
        return lambda: ((count, None) for count in pool.map(decode, range(task.threads)))
    return partial(_sizes_and_rows, _loader(task, shards, stack))


def _sizes_and_rows(batches: Iterable[Batch | Item]) -> Iterator[tuple[int, torch.Tensor | None]]:
    for batch in batches:
        yield len(batch[0]), batch.rows if isinstance(batch, Batch) else None


def _loader(task: Task, shards: ShardFolder, stack: ExitStack) -> Iterable[Batch | Item]:
    if task.name == "plain webdataset":
        return plain_webdataset_loader(shards, task.batch_size, task.threads)
    if task.name == "raw":
        # Small batches: all are in memory at once, of files that take long to decode.
        return raw_loader(Path(task.raw), min(task.batch_size, 32), task.threads)
    if task.name in ("tuned", "report"):
        files = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "files"
        open_files = tuned_loader if task.name == "tuned" else report_loader
        return open_files(shards, files, task.batch_size, task.threads)
    return stack.enter_context(make_loader(task.name.partition(" ")[0], _spec(task, shards)))


def _spec(task: Task, shards: ShardFolder) -> LoaderSpec:
    return LoaderSpec(
        shards,
        "train",
        task.batch_size,
        torch.device(task.device),
        training=True,
        flip="random",
        augment=cast(Augment, task.name.partition(" ")[2] or "none"),
        threads=task.threads,
    )


def decode_simplejpeg(encoded: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """Decode one JPEG to uint8 [size, size, 1] by simplejpeg, a development extra."""
    import simplejpeg

    image: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(encoded, colorspace="GRAY")
    if image.shape != (size, size, 1):
        raise ValueError(f"{image.shape} pixels instead of {size}")
    return image


DECODERS: dict[str, Callable[[npt.NDArray[np.uint8], int], Any]] = {
    "torchvision": decode_gray,
    "simplejpeg": decode_simplejpeg,
}
"""What may be the limit: the two fastest decoders for a CPU, both with libjpeg-turbo inside."""


def usable_decoders(extension: str) -> list[str]:
    """Return the names of DECODERS that decode this kind of image here; simplejpeg needs JPEGs and its package."""
    usable = extension == "jpg" and importlib.util.find_spec("simplejpeg") is not None
    return [name for name in DECODERS if name != "simplejpeg" or usable]


_encoded: list[npt.NDArray[np.uint8]] = []


def _read_all(path: str) -> None:
    reader = SplitReader(open_shards(Path(path)), "train")
    _encoded.extend(image.copy() for image in reader.read(range(len(reader))).images)


def _decode_share(decoder: str, first: int, step: int, size: int) -> int:
    decode = DECODERS[decoder]
    for data in _encoded[first::step]:
        decode(data, size)
    return len(_encoded[first::step])


class ImageFiles(Dataset[Item]):
    """Image files, each as `transform` makes it of Pillow's open image, and their labels [N, 14]."""

    def __init__(
        self, files: list[Path], labels: torch.Tensor, transform: Callable[[Image.Image], torch.Tensor]
    ) -> None:
        self.files = files
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Item:
        with Image.open(self.files[index]) as image:
            return self.transform(image), self.labels[index]


def report_loader(shards: ShardFolder, folder: Path, batch_size: int, workers: int) -> "DataLoader[Item]":
    """Return `report` over the train split, whose RGB PNG files are written to a new folder."""
    unpack(shards, folder, "png")
    labels = torch.from_numpy(shards.labels("train")).float()
    return _data_loader(ImageFiles(sorted(folder.iterdir()), labels, _paper_transform()), batch_size, workers)


def tuned_loader(shards: ShardFolder, folder: Path, batch_size: int, workers: int) -> "DataLoader[Item]":
    """Return `tuned` over the train split, whose gray JPEG files are written to a new folder."""
    unpack(shards, folder, "jpg")
    labels = torch.from_numpy(shards.labels("train"))
    return _data_loader(ImageFiles(sorted(folder.iterdir()), labels, _gray_bytes), batch_size, workers)


def raw_loader(source: Path, batch_size: int, workers: int) -> "DataLoader[Item]":
    """Return `raw` over the files of an NIH tree.

    Where they are few they are taken over again, for two batches per worker, so that all have work.
    """
    folders = find_images(source)
    entries = read_entries(source)
    table = entries.table[entries.table["image"].isin(list(folders))]
    files = np.array([source / folders[name] / name for name in table["image"]])
    labels = table[list(entries.findings)].to_numpy(dtype=np.uint8)
    chosen = np.arange(max(len(files), 2 * workers * batch_size)) % len(files)
    transform = _paper_transform(transforms.Resize((224, 224)))
    dataset = ImageFiles(files[chosen].tolist(), torch.from_numpy(labels[chosen]).float(), transform)
    return _data_loader(dataset, batch_size, workers)


def plain_webdataset_loader(shards: ShardFolder, batch_size: int, workers: int) -> Iterable[Item]:
    """Return `plain webdataset` over the train split: uint8 images and labels.

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
    loader: Iterable[Item] = webdataset.WebLoader(dataset, batch_size=None, **_processes(workers))
    return loader


def unpack(shards: ShardFolder, folder: Path, suffix: str) -> None:
    """Write the train split's images to a new folder, named so that their sorted names are in row order.

    `png`: RGB, as resizing ahead left them on the baseline paper's disk; `jpg`: gray, byte for byte as packed.
    """
    folder.mkdir(parents=True)
    images = len(shards.rows("train"))
    write = partial(_write_files, dataclasses.replace(shards), folder, suffix)  # a copy has not read the entries
    tasks = [range(first, min(first + _FILES, images)) for first in range(0, images, _FILES)]
    for _ in map_in_processes(write, tasks, available_cores()):
        pass


def _write_files(shards: ShardFolder, folder: Path, suffix: str, positions: range) -> None:
    samples = SplitReader(shards, "train").read(positions)
    for row, image in zip(samples.rows, samples.images, strict=True):
        file = folder / f"{row:08d}.{suffix}"
        if suffix == "jpg":
            file.write_bytes(image.tobytes())
        else:
            # Written in 3.4 ms and read in 1.07; at Pillow's own level, 6, it is 8.7 ms and 1.03.
            gray = Image.fromarray(decode_sample(image.tobytes(), shards.manifest.size))
            gray.convert("RGB").save(file, compress_level=3)


def _paper_transform(*resize: transforms.Resize) -> Callable[[Image.Image], torch.Tensor]:
    # To float32 [3, S, S], normalised with ImageNet's statistics.
    steps = [transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    normalize = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    composed: Callable[[Image.Image], torch.Tensor] = transforms.Compose([_to_rgb, *resize, *steps, normalize])
    return composed


def _to_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def _gray_bytes(image: Image.Image) -> torch.Tensor:
    # To uint8 [1, S, S], mirrored half of the time.
    gray = torch.from_numpy(np.array(image))[None]
    return gray.flip(-1) if torch.rand(()) < 0.5 else gray


def _decode_labels(data: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8).copy()


def _data_loader(dataset: ImageFiles, batch_size: int, workers: int) -> "DataLoader[Item]":
    return DataLoader(dataset, batch_size, shuffle=True, **_processes(workers))


def _processes(workers: int) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "persistent_workers": True,
        "pin_memory": torch.cuda.is_available(),
        "multiprocessing_context": "spawn",
    }


if __name__ == "__main__":
    serve(Task(**json.loads(sys.argv[1])))
