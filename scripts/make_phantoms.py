"""Draw an NIH-shaped tree of phantoms: `python scripts/make_phantoms.py OUT`."""

if __name__ == "__main__":
    import shards.startup  # noqa: F401  first: Ctrl-C ends in one line while the rest is imported

from pathlib import Path

import click

from shards.console import JOBS, PATH, SEED, Command, echo
from shards.phantoms import make_phantoms
from shards.processes import available_cores, graceful_exit


@click.command(cls=Command, context_settings={"show_default": True, "auto_envvar_prefix": "CXRAPID"})
@click.argument("out", type=PATH)
@click.option("--images", type=click.IntRange(20, 10_000_000), default=1200, metavar="N", help="Images to draw.")
@click.option(
    "--size", type=click.IntRange(64, 4096), default=512, metavar="PIXELS", help="Height and width of images."
)
@click.option("--seed", type=SEED, default=0, help="Seed of the cohort; another seed draws other patients.")
@click.option("--jobs", type=JOBS, default=None, metavar="N", help="Worker processes.  [default: one per core]")
def main(out: Path, images: int, size: int, seed: int, jobs: int | None) -> None:
    """Draw chest phantoms with findings into OUT, laid out like the NIH download.

    OUT is a new or empty folder, or an earlier phantom tree, which is replaced. The same command
    writes the same bytes.
    """
    with graceful_exit("run the same command again to draw all of them"):
        made = make_phantoms(out, images, size, seed, jobs=jobs or available_cores(), progress=True)
    test = made.entries["split"] == "test"
    echo(
        f"{out}: {images} images of {made.entries['patient'].nunique()} patients, "
        f"{test.sum()} for test with {len(made.boxes)} boxes; next: python scripts/make_shards.py {out}"
    )


if __name__ == "__main__":
    main()
