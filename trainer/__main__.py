"""The trainer's command line: `python -m trainer --arch resnet50`."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click
import torch
from click.core import ParameterSource

from shards.errors import ResourceMissing
from shards.folder import ShardFolder, open_shards
from trainer.config import TrainConfig
from trainer.config.description import describe
from trainer.config.files import recipes, use_file
from trainer.config.settling import settle
from trainer.distributed import Team, join, only_the_writer_complains, raise_where_lost, told_team
from trainer.interruption import Interruption, Stopped, listen
from trainer.loop import train
from trainer.optimization.precision import Precision, choose_precision
from trainer.run_directory import RunDirectory
from trainer.session import Diverged


def _options(command: Callable[..., None]) -> Callable[..., None]:
    # click lists options in the reverse order of decoration.
    for field in reversed(dataclasses.fields(TrainConfig)):
        command = click.option(
            f"--{field.name.replace('_', '-')}",
            field.name,
            default=field.default,
            show_default=field.default != "",
            type=field.metadata["type"],
            metavar=field.metadata["metavar"],
            help=field.metadata["help"],
        )(command)
    return command


@click.command(context_settings={"auto_envvar_prefix": "CXRAPID", "max_content_width": 110})
@click.option(
    "--config", is_eager=True, callback=use_file, metavar="FILE",
    help=f"Take options from a TOML file, a run's config.json, or a recipe: {', '.join(recipes())}.",
)  # fmt: skip
@_options
@click.option(
    "--dry-run", is_flag=True, help="Print every option, where it came from and what auto comes to, and stop."
)
@click.pass_context
def main(context: click.Context, /, config: str | None, dry_run: bool, **options: Any) -> None:
    """Train an architecture on packed shards. The same command again resumes a run that was stopped.

    An option counts from the command line, else from the environment (as CXRAPID_BATCH_SIZE=128), else
    from --config, else it has its default.
    """
    told = told_team()
    with only_the_writer_complains(told):
        settings = TrainConfig(**options)
        sources = {name: _source(context, name, config) for name in options}
        if dry_run:
            for line in describe(settings, sources, told) if told.writes else ():
                click.echo(line)
            return
    with join(settings.device) as (team, device), listen() as asked:
        try:
            finished = _train(settings, sources, team, device, asked)
        except RuntimeError as error:
            raise_where_lost(team, error)
            raise
    if not finished:
        sys.exit(asked.exit_code)


def _train(
    settings: TrainConfig, sources: dict[str, str], team: Team, device: torch.device, asked: Interruption
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
            with asked.at_once(team.size == 1):
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
            elif run.config.is_file():
                run.say("stopped before a step, so there is nothing to save; the same command starts again")
            sys.exit(asked.exit_code)
        except Diverged as error:
            # All ranks know, and one says it.
            if team.writes:
                raise
            sys.exit(error.exit_code)


def _source(context: click.Context, name: str, config: str | None) -> str:
    source = context.get_parameter_source(name)
    if source is ParameterSource.DEFAULT_MAP:
        return f"--config {config}"
    return "default" if source is None else source.name.lower().replace("_", " ")


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
        f"the device is out of memory; try --batch-size {half} --accumulate {twice}, which has as many images "
        "a step, or --batch-size auto"
    )


if __name__ == "__main__":
    main(prog_name="python -m trainer")
