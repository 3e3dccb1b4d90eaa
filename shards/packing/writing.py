"""Write shards in order while worker processes make the fragments.

Processes, not threads: reading, decoding, resizing and encoding run outside Python's global lock,
but so fast that two threads wait for it between them. Two processes pack 1.88 times what one does
(python -m benchmarks.packing), two threads packed 1.7 times.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

from shards.console import progress_bar
from shards.packing.fragment import Fragment, make_fragment
from shards.packing.shard import ShardReport, ShardTask, write_shard
from shards.pixels import PixelRecipe
from shards.processes import map_in_processes

# Samples a fragment: enough that handing it over costs nothing, few enough to share out evenly.
_SAMPLES = 8


def write_shards(
    tasks: list[ShardTask], source: Path, pixels: PixelRecipe, jobs: int, done: int = 0
) -> Iterator[tuple[ShardTask, ShardReport]]:
    """Write the shards of `tasks` in order with `jobs` processes; yield each with its receipt.

    `done` is the number of images packed before, for the progress bar. Raises what write_shard
    raises; fragments that were not begun are then dropped.
    """
    chunks = {
        task.tar: [task.samples[n : n + _SAMPLES] for n in range(0, len(task.samples), _SAMPLES)] for task in tasks
    }
    make = functools.partial(make_fragment, source, recipe=pixels)
    images = sum(len(task.samples) for task in tasks)
    made = map_in_processes(make, list(itertools.chain.from_iterable(chunks.values())), jobs)
    with (
        progress_bar(done + images, "packing", "img", initial=done, disable=not tasks) as bar,
        contextlib.closing(made) as fragments,
    ):

        def counted() -> Iterator[Fragment]:
            for _, fragment in fragments:
                bar.update(len(fragment.sources))
                yield fragment

        for task in tasks:
            yield task, write_shard(task, itertools.islice(counted(), len(chunks[task.tar])))
