"""The trainer's command line: `python -m trainer --arch resnet50`."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from models import build, freeze, parameter_counts
from shards.errors import ResourceMissing
from shards.folder import open_shards
from shards.locking import only_one
from trainer.config import TrainConfig
from trainer.devices import choose_device
from trainer.interruption import listen
from trainer.loop import train
from trainer.precision import choose_precision
from trainer.run_directory import RunDirectory


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
@_options
@click.option("--dry-run", is_flag=True, help="Print every option and the parameter counts, and stop.")
@click.pass_context
def main(context: click.Context, /, dry_run: bool, **options: Any) -> None:
    """Train an architecture on packed shards. The same command again resumes a run that was stopped.

    Options can also come from the environment, as CXRAPID_BATCH_SIZE=128.
    """
    config = TrainConfig(**options)
    if config.flip == "both" and config.batch_size % 2:
        raise click.UsageError(f"--flip both needs an even --batch-size, not {config.batch_size}")
    if Path(config.run_name).name != config.run_name:
        raise click.UsageError(f"--name {config.name!r} is no plain name; --runs says in which folder")
    sources = {name: _source(context, name) for name in options}
    if dry_run:
        _describe(config, sources)
        return
    device = choose_device(config.device)
    shards = open_shards(config.shards)
    precision = choose_precision(config.precision, device)
    run = RunDirectory(config.runs / config.run_name)
    with only_one(run.path), listen() as asked:
        run.begin(config, sources, shards, device, precision.name)
        if run.model.is_file():
            run.say(f"{run.name} has finished already; score it with: python -m eval {run.path}")
            return
        try:
            finished = train(config, run, shards, precision, asked)
        except torch.OutOfMemoryError as error:
            raise ResourceMissing(
                f"the device is out of memory; try --batch-size {max(config.batch_size // 2, 1)}"
            ) from error
    if not finished:
        sys.exit(asked.exit_code)


def _source(context: click.Context, name: str) -> str:
    source = context.get_parameter_source(name)
    return "default" if source is None else source.name.lower().replace("_", " ")


def _describe(config: TrainConfig, sources: dict[str, str]) -> None:
    for key, value in config.to_json().items():
        click.echo(f"{key:14} {json.dumps(value):24} {sources[key]}")
    model = build(config.arch)
    freeze(model, config.freeze)
    trainable, total = parameter_counts(model)
    click.echo(f"trainable parameters {trainable:,} of {total:,}")


if __name__ == "__main__":
    main(prog_name="python -m trainer")
