"""Goes through an epoch of one loader as a command does, and says how many samples it saw:
`one_epoch.py SHARDS LOADER [--files N]`.

--files allows the process so many open files.
"""

import resource
from pathlib import Path

import click
import torch

from loaders import LoaderSpec, make_loader
from shards.folder import open_shards


@click.command()
@click.argument("shards", type=Path)
@click.argument("name")
@click.option("--files", type=int)
def main(shards: Path, name: str, files: int | None) -> None:
    if files is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    spec = LoaderSpec(open_shards(shards), "train", 8, torch.device("cpu"), training=True, threads=1)
    seen = 0
    with make_loader(name, spec) as loader:
        for batch in loader:
            seen += len(batch.rows)
    click.echo(f"{seen} samples")


if __name__ == "__main__":
    main()
