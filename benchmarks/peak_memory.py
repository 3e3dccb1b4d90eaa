"""Peak memory of training, each variant measured in a process of its own."""

import multiprocessing
import os
import resource
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks.ablation import Variant
from benchmarks.training_run import TrainingRun
from benchmarks.usage import memory_of, usage_of
from shards.folder import open_shards
from trainer.optim.precision import Precision

_STEPS = 2  # an optimizer has its state from the first on


def peak_memory(arch: str, variant: Variant, shards: Path, precision: Precision, batch_size: int) -> int:
    """Return bytes: of the GPU what torch had allocated at most, and on a CPU what the process held at most.

    That includes the interpreter, the libraries and a resident split; worker processes count with what
    they hold at the end.
    """
    # A new process: nothing that was measured before is in its memory. Not a daemon, so that it may have
    # workers of its own.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure, arch, variant, shards, precision, batch_size).result()


def _measure(arch: str, variant: Variant, shards: Path, precision: Precision, batch_size: int) -> int:
    training = TrainingRun(arch, variant, open_shards(shards), precision, batch_size)
    training.train(_STEPS)
    if precision.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(precision.device)
    else:
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = own + usage_of(os.getpid()).memory - memory_of(os.getpid())
    training.close()
    return peak
