"""A run begun, or gone on with: ranks joined, options settled, the run's folder locked, then trained."""

import contextlib
import sys
from collections.abc import Iterator

import torch

from shards.errors import ResourceMissing
from shards.folder import ShardFolder, open_shards
from trainer.config import TrainConfig
from trainer.config.settling import settle
from trainer.distributed import Team, join, raise_where_lost
from trainer.loop import train
from trainer.optimization.precision import Precision, choose_precision
from trainer.run_directory import RunDirectory
from trainer.session import Diverged
from trainer.stop_signal import Stopped, StopSignal, handle_signals


def launch(settings: TrainConfig, sources: dict[str, str]) -> None:
    """Train the run of these settings to its end, in all the processes that torchrun started.

    `sources` says where each setting came from, for config.json. Exits with 130 or 143 where a signal
    stopped it, once the run is saved.
    """
    with join(settings.device) as (team, device), handle_signals() as asked:
        try:
            finished = _train(settings, sources, team, device, asked)
        except RuntimeError as error:
            raise_where_lost(team, error)
            raise
    if not finished:
        sys.exit(asked.exit_code)


def _train(
    settings: TrainConfig, sources: dict[str, str], team: Team, device: torch.device, asked: StopSignal
) -> bool:
    """Begin or go on with the run, one rank for all; return False where `asked` stopped it early."""
    run = RunDirectory(settings.runs / settings.run_name, writes=team.writes)
    with contextlib.ExitStack() as held:

        def begin() -> tuple[TrainConfig, ShardFolder, str, bool]:
            shards = open_shards(settings.shards)
            precision = choose_precision(settings.precision, device)
            held.enter_context(run.at_work(result=Diverged))
            config, told = settle(settings, sources, run, shards, precision, team)
            run.begin(config, told, shards, device, precision.name, team.size)
            return config, shards, precision.name, run.model.is_file()

        try:
            with asked.interruptible(team.size == 1):
                config, shards, precision, is_done = team.from_writer(begin)
            if is_done:
                run.keep_one_checkpoint()
                run.say(f"{run.name} has finished already; score it with: python -m eval {run.path}")
                return True
            with _advising(config):
                return train(config, run, shards, Precision(precision, device), asked, team)
        except Stopped:
            if run.features.is_dir():
                run.say("stopped before a step; the same command goes on with the features that are saved")
            elif run.has_checkpoint:
                run.say("stopped before a step; the same command goes on from the last checkpoint")
            elif run.config.is_file():
                run.say("stopped before a step, so there is nothing to save; the same command starts again")
            sys.exit(asked.exit_code)
        except Diverged as error:
            # All ranks know, and one says it.
            if team.writes:
                raise
            sys.exit(error.exit_code)


@contextlib.contextmanager
def _advising(config: TrainConfig) -> Iterator[None]:
    """Turn running out of memory, of a GPU or of the host, into ResourceMissing with a way out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # Torch has a type of its own for a GPU's memory only.
        kinds = (MemoryError, torch.OutOfMemoryError)
        if not isinstance(error, kinds) and "DefaultCPUAllocator" not in str(error):
            raise
        raise ResourceMissing(_advice(config)) from error


def _advice(config: TrainConfig) -> str:
    half, twice = config.batch_size // 2, 2 * config.accumulate
    if not half:
        return (
            "the device is out of memory with one image a batch; try --precision fp16 (bf16 on a CPU) or a "
            "smaller --arch"
        )
    return (
        f"the device is out of memory; try --batch-size {half} --accumulate {twice}, which has as many "
        "images a step"
    )
