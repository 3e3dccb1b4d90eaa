"""Download a shard folder: `python scripts/fetch_shards.py URL DEST`."""

if __name__ == "__main__":
    import shards.startup  # noqa: F401  first: Ctrl-C ends in one line while the rest is imported

from pathlib import Path

import click

from shards.console import JOBS, PATH, Command, FiniteRange, echo
from shards.fetching import fetch_shards
from shards.processes import graceful_exit


@click.command(cls=Command, context_settings={"show_default": True, "auto_envvar_prefix": "CXRAPID"})
@click.argument("url")
@click.argument("dest", type=PATH)
@click.option("--jobs", type=JOBS, default=4, metavar="N", help="Files to download at once.")
@click.option(
    "--retries",
    type=click.IntRange(0, 1000),
    default=4,
    metavar="N",
    help="Retries of a file whose connection breaks; each starts the file again.",
)
@click.option(
    "--backoff",
    type=FiniteRange(0, 3600),
    default=1.0,
    metavar="SECONDS",
    help="Wait before the first retry; it doubles with each retry, up to a minute.",
)
def main(url: str, dest: Path, jobs: int, retries: int, backoff: float) -> None:
    """Copy the shard folder at URL to DEST, each file verified by its SHA-256 before it gets its name.

    URL is http(s)://, file://, a path, or, with `pip install -e '.[fetch]'`, s3:// and any other scheme
    of fsspec. Run the same command again to fetch the files that are missing. A server that sends nothing
    for a minute, or a file slower than 16 KiB/s, counts as a broken connection.
    """
    with graceful_exit("finished files are kept; run the same command again to continue"):
        done = fetch_shards(url, dest, jobs=jobs, retries=retries, backoff=backoff)
    size = sum(shard.bytes for shard in done.manifest.shards) / 1e9
    echo(
        f"{dest}: {len(done.manifest.shards)} shards, {size:.3f} GB, {done.files} files fetched now; "
        f"next: python -m trainer --shards {dest}"
    )


if __name__ == "__main__":
    main()
