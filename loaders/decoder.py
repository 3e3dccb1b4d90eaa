"""DALI's decoder: CPU or GPU, and how many threads, chosen by a short benchmark.

On a CPU one thread more than there are cores is best: while one thread of Python hands over bytes and
flips a batch, the decoders keep the cores busy (python -m benchmarks.loader: 1.00 to 1.08 times two
threads on two cores, run by run). On a GPU only a benchmark can tell, since its hardware decoder, its cores
and the CPU share the work. It runs once for a machine, a shard folder and a batch size, and a run that resumes
keeps what was chosen for it: decoders differ by one gray level.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import nvidia.dali
import nvidia.dali.fn as fn
import nvidia.dali.types as dali_types
import torch
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.tensors import TensorCPU

from loaders.spec import LoaderSpec
from shards.console import progress_bar
from shards.documents import read_json
from shards.errors import BadData, ResourceMissing
from shards.files import atomic_write_text
from shards.folder import SplitReader

# Images that a CPU decodes at once where batches are smaller, for cores wait at the end of a run: of two cores 1.80,
# 1.86 and 1.92 were busy with runs of 64, 128 and 256 images; 512 made it 1.95, for 200 MiB more memory.
AT_ONCE = 256
# Runs decoded ahead. Two hide a slow one; more cost memory and gave nothing on two cores.
PREFETCH = 2
_SECONDS = 0.7  # a measurement of one candidate, once it is warm
_BUDGET = 15.0  # seconds for all measurements
_CLOSE = 0.9  # of the highest rate: what is measured a second time
_SHARES = (0.0, 0.12, 0.3, 0.65)  # DALI's own default is the last


@dataclass(frozen=True)
class Decoder:
    """One way to decode."""

    device: str
    """cpu, or mixed: JPEG on the GPU, what it cannot decode on the CPU."""
    threads: int
    hardware_share: float = 0.0
    """Of the images, the share that the GPU's JPEG engine gets; the rest go to its cores."""


UNDECIDED = Decoder("undecided", 0)
"""In the place of a decoder that has not been chosen yet."""


class _Record(TypedDict):
    decoder: Decoder


def batches_at_once(spec: LoaderSpec) -> int:
    """Return how many batches a run of the pipeline decodes: 1, or on a CPU as many as AT_ONCE images hold."""
    return max(1, AT_ONCE * spec.copies // spec.batch_size) if spec.device.type == "cpu" else 1


def choose_decoder(spec: LoaderSpec, reader: SplitReader) -> Decoder:
    """Return the decoder for a spec: with its threads if it names them, else the cached or fastest one.

    The benchmark runs only for training on a GPU. Evaluation and a single pass over the images, whose results are
    kept, have the same decoder in every run.
    """
    threads = spec.threads or spec.cores + 1
    if spec.device.type == "cpu" or spec.shards.manifest.extension != "jpg":
        return Decoder("cpu", threads)
    if spec.threads or not (spec.training and len(reader)):
        return Decoder("mixed", threads, _SHARES[-1])
    return load_or_tune(spec, candidates(spec.cores), functools.partial(benchmark, spec, reader))


def candidates(cores: int) -> list[Decoder]:
    """Return the decoders worth trying on a machine with a GPU and so many cores."""
    threads = sorted({max(cores // 2, 1), cores})
    mixed = [Decoder("mixed", n, share) for n, share in itertools.product(threads, _SHARES)]
    return [Decoder("cpu", cores), Decoder("cpu", cores + 1), *mixed]


def load_or_tune(
    spec: LoaderSpec, tried: Sequence[Decoder], best_of: Callable[[Sequence[Decoder]], Decoder]
) -> Decoder:
    """Return the decoder that `best_of` chose on this machine for these shards before, else call it.

    The choice is cached in $XDG_CACHE_HOME/cxrapid (~/.cache/cxrapid), where that is writable. Of
    several processes one calls `best_of` and the others wait.
    """
    circumstances = {
        "gpu": torch.cuda.get_device_name(spec.device) if spec.device.type == "cuda" else None,
        "machine": platform.node(),
        "cores": spec.cores,
        "dali": nvidia.dali.__version__,
        "shards": spec.shards.digest,
        "batch_size": spec.batch_size,
        "tried": [dataclasses.astuple(decoder) for decoder in tried],
    }
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cxrapid"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"decoder-{hashlib.sha256(json.dumps(circumstances).encode()).hexdigest()[:32]}.json"
        file = path.with_suffix(".lock").open("w")
    except (OSError, RuntimeError):  # nowhere to save it
        return best_of(tried)
    with file as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(BadData, ResourceMissing):  # not there, or damaged
            known = read_json(path, _Record)["decoder"]
            if known in tried:
                return known
        best = best_of(tried)
        record = {"decoder": dataclasses.asdict(best), **circumstances}
        with contextlib.suppress(ResourceMissing):
            atomic_write_text(path, json.dumps(record, indent=1) + "\n")
        return best


def benchmark(spec: LoaderSpec, reader: SplitReader, tried: Sequence[Decoder]) -> Decoder:
    """Return the fastest of the decoders on a random batch of the split; takes at most _BUDGET seconds."""
    positions = np.random.default_rng(0).integers(len(reader), size=spec.batch_size // spec.copies)
    encoded = reader.read(positions).images
    return fastest(tried, lambda decoder: _rate(decoder, encoded, spec))


def fastest(
    tried: Sequence[Decoder], rate: Callable[[Decoder], float], clock: Callable[[], float] = time.monotonic
) -> Decoder:
    """Return the decoder with the highest rate, on average over two rounds.

    The second round is for those that come within a tenth of the highest rate in the first. No measurement begins
    that would end later than _BUDGET seconds after the start if it took as long as the longest before it.
    """
    end, longest = clock() + _BUDGET, 0.0
    rates: dict[Decoder, list[float]] = defaultdict(list)

    def mean(decoder: Decoder) -> float:
        return statistics.mean(rates[decoder])

    for title in ("measuring decoders", "measuring the fastest again"):
        with progress_bar(len(tried), title, "decoder") as bar:
            for decoder in tried:
                start = clock()
                if start + longest > end:
                    break
                rates[decoder].append(rate(decoder))
                longest = max(longest, clock() - start)
                bar.update(1)
        ranked = sorted(rates, key=mean, reverse=True)
        tried = [decoder for decoder in ranked if mean(decoder) >= _CLOSE * mean(ranked[0])]
        if len(tried) == 1:
            break
    return max(rates, key=mean)


def decoding_pipeline(source: Any, spec: LoaderSpec, decoder: Decoder) -> Pipeline:
    """Return the built pipeline: encoded images from `source` to uint8 [S, S, 1] on the spec's device.

    `source` is called once per run and returns a list of 1-D uint8 arrays, which must stay as they are until that
    run is out. With a CPU as device no driver is needed.
    """
    device_id = None
    if spec.device.type == "cuda":
        device_id = torch.cuda.current_device() if spec.device.index is None else spec.device.index
    options = _gpu_options(decoder, spec.shards.manifest.size) if decoder.device == "mixed" else {}
    at_once = spec.batch_size // spec.copies * batches_at_once(spec)
    pipeline = Pipeline(at_once, decoder.threads, device_id, prefetch_queue_depth=PREFETCH)
    with pipeline:
        # no_copy: the decoder on a CPU reads the bytes where they are; for the GPU's, DALI's threads copy them into
        # pinned memory. It does both before the batch is out (InputOperator::ForwardCurrentData, and ImageDecoder,
        # which waits for the host's part of the decoding), whatever the GPU has still to do then.
        encoded = fn.external_source(
            # As tensors, for DALI would look at each array in Python to see what kind it is.
            source=lambda: [TensorCPU(image) for image in source()],
            batch=True,
            ndim=1,
            dtype=dali_types.UINT8,
            no_copy=True,
        )
        images = fn.decoders.image(encoded, device=decoder.device, output_type=dali_types.GRAY, **options)
        if spec.device.type == "cuda":
            images = images.gpu()  # from pinned memory, in DALI's own stream; nothing to do where they are there
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


def _gpu_options(decoder: Decoder, size: int) -> dict[str, Any]:
    return {
        "hw_decoder_load": decoder.hardware_share,
        # By default each decoding thread is tied to a core, also where other ranks have theirs.
        "affine": False,
        # What each thread gets at the start, 16 MiB and twice 8 MiB by default; a larger image still gets more.
        "device_memory_padding": 2**20,
        "host_memory_padding": 2**18,
        "preallocate_width_hint": size,
        "preallocate_height_hint": size,
    }


def _rate(decoder: Decoder, encoded: list[Any], spec: LoaderSpec) -> float:
    # Batches a second, once it has run warm. run() waits until a batch is decoded.
    pipeline = decoding_pipeline(lambda: encoded, spec, decoder)
    for _ in range(2 * PREFETCH):
        pipeline.run()
    batches, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < _SECONDS:
        pipeline.run()
        batches += 1
    return batches / seconds
