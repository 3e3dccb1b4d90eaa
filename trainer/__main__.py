"""The trainer's command line: `python -m trainer --arch resnet50`."""

if __name__ == "__main__":
    import shards.startup  # noqa: F401  first: Ctrl-C ends in one line while the rest is imported

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from shards.console import Command, echo
from shards.errors import BadData
from shards.manifest import read_manifest
from trainer.config_file import recipes, use_file
from trainer.devices import only_rank_zero_complains, rank_from_env
from trainer.options import TrainConfig


class _Option(click.Option):
    """An option whose help shows its first spelling: the others are aliases of earlier versions."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return spelling and help text."""
        spellings, self.opts = self.opts, self.opts[:1]
        try:
            return super().get_help_record(ctx)
        finally:
            self.opts = spellings


def _options(command: Callable[..., None]) -> Callable[..., None]:
    # click lists options in the reverse order of decoration.
    for field in reversed(dataclasses.fields(TrainConfig)):
        command = click.option(
            *(f"--{flag}" for flag in (field.metadata["flag"], field.name.replace("_", "-")) if flag),
            field.name,
            cls=_Option,
            default=field.default,
            show_default=field.default != "",
            type=field.metadata["type"],
            metavar=field.metadata["metavar"],
            help=field.metadata["help"],
        )(command)
    return command


@click.command(
    cls=Command,
    outlives_reader=True,  # what is printed is in the run's log.txt, too
    context_settings={"auto_envvar_prefix": "CXRAPID", "max_content_width": 110},
)
@click.option(
    "--config",
    is_eager=True,
    callback=use_file,
    metavar="FILE",
    help=f"Take options from a TOML file, a run's config.json, or a recipe: {', '.join(recipes())}.",
)
@_options
@click.option(
    "--dry-run", is_flag=True, help="Print every option, where it came from and what auto comes to, and exit."
)
@click.pass_context
def main(context: click.Context, /, config: str | None, dry_run: bool, **options: Any) -> None:
    """Train an architecture on packed shards. The same command again resumes a run that was stopped.

    An option is taken from the command line, else from the environment (as CXRAPID_BATCH_SIZE=128), else
    from --config, else it has its default.
    """
    rank, size, _ = rank_from_env()
    with only_rank_zero_complains(rank):
        settings = TrainConfig(**options)
        sources = {name: _source(context, name, config) for name in options}
        if dry_run:
            if rank == 0:
                from trainer.distributed import Distributed
                from trainer.resolve import describe

                for line in describe(settings, sources, Distributed(size=size)):
                    echo(line)
            return
        read_manifest(settings.shards)
        if settings.weights not in ("auto", "imagenet", "none") and not Path(settings.weights).is_file():
            raise BadData(f"no weights file {settings.weights}")
    # Imports torch, which takes seconds: a wrong option or file was reported before.
    from trainer.launch import launch

    launch(settings, sources)


def _source(context: click.Context, name: str, config: str | None) -> str:
    source = context.get_parameter_source(name)
    if source is ParameterSource.DEFAULT_MAP:
        return f"--config {config}"
    return "default" if source is None else source.name.lower().replace("_", " ")


if __name__ == "__main__":
    main(prog_name="python -m trainer")
