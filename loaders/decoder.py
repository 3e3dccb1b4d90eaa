"""DALI's decoder: CPU or GPU, and how many threads, chosen by a short benchmark.

On a CPU one thread more than there are cores is best: while one thread of Python hands over bytes and
flips a batch, the decoders keep the cores busy (python -m benchmarks.loader: 1.00 to 1.08 times two
threads on two cores, run by run). On a GPU only a benchmark can tell, since its hardware decoder, its cores
and the CPU share the work. It runs once for a machine, a shard folder and a batch size.
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
import time
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

from loaders.spec import LoaderSpec
from shards.console import progress_bar
from shards.documents import read_json
from shards.errors import BadData, ResourceMissing
from shards.files import atomic_write_text
from shards.folder import SplitReader
from shards.processes import available_cores

# Batches decoded ahead. Two hide a slow batch; more cost memory and gave nothing on two cores.
PREFETCH = 2
_SECONDS = 2.0  # each candidate is measured


@dataclass(frozen=True)
class Decoder:
    """One way to decode."""

    device: str
    """cpu, or mixed: JPEG on the GPU, what it cannot decode on the CPU."""
    threads: int
    hardware_share: float = 0.0
    """Of the images, the share that the GPU's JPEG engine gets; the rest go to its cores."""


class _Record(TypedDict):
    decoder: Decoder


def choose_decoder(spec: LoaderSpec, reader: SplitReader) -> Decoder:
    """Return the decoder for a spec: with its threads if it names them, else the cached or fastest one.

    The benchmark takes about two seconds a candidate and runs only for training on a GPU.
    """
    threads = spec.threads or available_cores() + 1
    if spec.device.type == "cpu" or spec.shards.manifest.extension != "jpg":
        return Decoder("cpu", threads)
    if spec.threads or not (spec.training and len(reader)):
        return Decoder("mixed", threads, 0.65)  # DALI's own default share
    return load_or_tune(spec, candidates(available_cores()), functools.partial(benchmark, spec, reader))


def candidates(cores: int) -> list[Decoder]:
    """Return the decoders worth trying on a machine with a GPU and so many cores."""
    threads = sorted({max(cores // 4, 1), max(cores // 2, 1), cores})
    mixed = [Decoder("mixed", n, share) for n, share in itertools.product(threads, (0.0, 0.5, 0.8, 1.0))]
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
        "cores": available_cores(),
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
    """Return the fastest of the decoders on random batches of the split."""
    positions = np.random.default_rng(0).integers(len(reader), size=spec.batch_size)
    encoded = reader.read(positions).images
    rates = {}
    with progress_bar(len(tried), "measuring decoders", "decoder") as bar:
        for decoder in tried:
            rates[decoder] = _rate(decoder, encoded, spec.device)
            bar.update(1)
    return max(rates, key=lambda decoder: rates[decoder])


def decoding_pipeline(source: Any, batch_size: int, decoder: Decoder, device: torch.device) -> Pipeline:
    """Return the built pipeline: encoded images from `source` to uint8 [S, S, 1].

    `source` is called once per batch and returns a list of 1-D uint8 arrays, which must stay as they are
    until their batch is out. With a CPU as device no driver is needed; the images come out where the
    decoder works.
    """
    device_id = None
    if device.type == "cuda":
        device_id = torch.cuda.current_device() if device.index is None else device.index
    pipeline = Pipeline(batch_size, decoder.threads, device_id, prefetch_queue_depth=PREFETCH)
    options = {"hw_decoder_load": decoder.hardware_share} if decoder.device == "mixed" else {}
    with pipeline:
        # no_copy: the bytes are read where the caller has them, in mapped shards for example.
        encoded = fn.external_source(
            source=source, batch=True, ndim=1, dtype=dali_types.UINT8, no_copy=device_id is None
        )
        images = fn.decoders.image(encoded, device=decoder.device, output_type=dali_types.GRAY, **options)
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


def _rate(decoder: Decoder, encoded: list[Any], device: torch.device) -> float:
    # Batches a second, once it has run warm. run() waits until a batch is decoded.
    pipeline = decoding_pipeline(lambda: encoded, len(encoded), decoder, device)
    for _ in range(2 * PREFETCH):
        pipeline.run()
    batches, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < _SECONDS:
        pipeline.run()
        batches += 1
    return batches / seconds
