"""The contenders of `benchmarks.loader`, each in a process of its own that waits for its turn.

So none shares threads, memory or a page table with another, and what each uses can be counted.
The process is given a Task as JSON; at every line on its standard input it loads one epoch and
answers with a line of JSON.
"""

import concurrent.futures
import contextlib
import dataclasses
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
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.baselines import Item, plain_webdataset_loader, raw_loader, report_loader, tuned_loader
from benchmarks.usage import usage_of
from loaders import Augment, Batch, LoaderSpec, make_loader
from loaders.worker_pool import decode_gray
from shards.folder import ShardFolder, SplitReader, open_shards

_SECONDS = 2.0  # a measurement takes at least so long, and whole epochs


@dataclass(frozen=True)
class Task:
    """What one contender is to do."""

    name: str
    """limit; plain webdataset; tuned; report; raw; or a loader, plus ` light` or ` strong` to augment."""
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
        command = [sys.executable, "-m", "benchmarks.contenders", json.dumps(dataclasses.asdict(task))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def wait_ready(self) -> None:
        """Wait until everything is imported and opened, so that it disturbs nobody's turn."""
        self._answer()
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
        assert self._process.stdin is not None
        self._process.stdin.close()
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
    with ExitStack() as stack:
        epoch = _epoch(task, stack)
        print("0", file=answers, flush=True)
        for _ in sys.stdin:
            print(json.dumps(_measured(epoch, task.limit)), file=answers, flush=True)


def _measured(epoch: Callable[[], Iterator[tuple[int, Any]]], limit: int) -> dict[str, float]:
    images, first_batch, order = 0, 0.0, []
    before, start = usage_of(os.getpid()), time.perf_counter()
    seconds = 0.0
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


def _epoch(task: Task, stack: ExitStack) -> Callable[[], Iterator[tuple[int, Any]]]:
    # A function that loads one epoch and yields for every batch its size and, where known, its rows.
    shards = open_shards(Path(task.shards))
    if task.name == "limit":
        context = multiprocessing.get_context("spawn")
        processes = concurrent.futures.ProcessPoolExecutor(task.threads, context, _read_all, (task.shards,))
        pool = stack.enter_context(processes)

        def decode() -> Iterator[tuple[int, Any]]:
            step, size = task.threads, shards.manifest.size
            for count in pool.map(_decode_share, range(step), [step] * step, [size] * step):
                yield count, None

        return decode
    if task.name in _BASELINES:
        baseline = _baseline(task, shards, stack)
        return lambda: ((len(images), None) for images, _ in baseline)
    name, _, augment = task.name.partition(" ")
    spec = LoaderSpec(
        shards,
        "train",
        task.batch_size,
        torch.device(task.device),
        training=True,
        flip="random",
        augment=cast(Augment, augment or "none"),
        threads=task.threads,
    )
    loader = stack.enter_context(make_loader(name, spec))

    def batches() -> Iterator[Batch]:
        yield from loader

    return lambda: ((len(batch.images), batch.rows) for batch in batches())


_BASELINES = ("plain webdataset", "tuned", "report", "raw")


def _baseline(task: Task, shards: ShardFolder, stack: ExitStack) -> Iterable[Item]:
    if task.name == "plain webdataset":
        return plain_webdataset_loader(shards, task.batch_size, task.threads)
    if task.name == "raw":
        # Small batches: all are in memory at once, of files that take long to decode.
        return raw_loader(Path(task.raw), min(task.batch_size, 32), task.threads)
    files = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "files"
    open_files = tuned_loader if task.name == "tuned" else report_loader
    return open_files(shards, files, task.batch_size, task.threads)


_encoded: list[npt.NDArray[np.uint8]] = []


def _read_all(path: str) -> None:
    reader = SplitReader(open_shards(Path(path)), "train")
    _encoded.extend(image.copy() for image in reader.read(range(len(reader))).images)


def _decode_share(first: int, step: int, size: int) -> int:
    # Decoding and nothing else.
    for data in _encoded[first::step]:
        decode_gray(data, size)
    return len(_encoded[first::step])


if __name__ == "__main__":
    serve(Task(**json.loads(sys.argv[1])))
