"""Shards written by several threads: they make the fragments, this one writes them in order.

Threads, not processes: reading, decoding, resizing and encoding all run outside Python's
global lock, so two do 1.85 times the work of one (python -m benchmarks.packing), start at
once, share their memory, and end with the command however that ends.
"""

import contextlib
import functools
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shards.packing.fragment import Fragment, Sample, make_fragment
from shards.packing.shard import Receipt, ShardTask, write_shard
from shards.pixels import PixelRecipe
from shards.progress import progress_bar

# Samples a fragment: enough that handing it over costs nothing, few enough to share out evenly.
_SAMPLES = 8
# Fragments in hand for each thread, so that none waits while a shard is flushed to disk. They bound
# the memory, whatever the number of images.
_AHEAD = 4


def write_shards(
    tasks: list[ShardTask], source: Path, pixels: PixelRecipe, jobs: int, done: int = 0
) -> Iterator[tuple[ShardTask, Receipt]]:
    """Write the shards of `tasks` in order with `jobs` threads; yield each with its receipt.

    `done` is the number of images packed before, for the progress bar. Raises what write_shard
    raises; fragments that were not begun are then dropped.
    """
    chunks = {
        task.tar: [task.samples[n : n + _SAMPLES] for n in range(0, len(task.samples), _SAMPLES)]
        for task in tasks
    }
    make = functools.partial(make_fragment, source, recipe=pixels)
    total = done + sum(len(task.samples) for task in tasks)
    in_order = _in_order(make, itertools.chain.from_iterable(chunks.values()), jobs)
    with (
        progress_bar(total, "packing", "img", initial=done, disable=not tasks) as bar,
        contextlib.closing(in_order) as fragments,
    ):

        def counted() -> Iterator[Fragment]:
            for fragment in fragments:
                bar.update(len(fragment.sources))
                yield fragment

        for task in tasks:
            yield task, write_shard(task, itertools.islice(counted(), len(chunks[task.tar])))


def _in_order(
    make: Callable[[list[Sample]], Fragment], chunks: Iterator[list[Sample]], jobs: int
) -> Generator[Fragment, None, None]:
    pool = ThreadPoolExecutor(jobs)
    try:
        waiting = deque(pool.submit(make, chunk) for chunk in itertools.islice(chunks, _AHEAD * jobs))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(make, chunk) for chunk in itertools.islice(chunks, 1))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
