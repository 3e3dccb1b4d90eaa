"""Pack the NIH download into shards: `python scripts/make_shards.py [SOURCE] [OUT]`."""

if __name__ == "__main__":
    import shards.startup  # noqa: F401  first: Ctrl-C ends in one line while the rest is imported

import re
from pathlib import Path

import click

from shards.console import JOBS, PATH, SEED, Command, FiniteRange, echo
from shards.manifest import Manifest
from shards.packing import pack
from shards.packing.planning import SplitRecipe, SplitRule, choose_folders, make_plan
from shards.pixels import Encoding, Filter, PixelRecipe
from shards.processes import available_cores, graceful_exit
from shards.splits import SPLITS


def _folder_numbers(context: click.Context, option: click.Parameter, text: str | None) -> str | None:
    if text is not None and not re.fullmatch(r"\d{1,4}(,\d{1,4})*", text):
        raise click.BadParameter(f"{text!r} is neither a number such as 3 nor numbers such as 3,7")
    return text


# Images whose packing takes about as long as starting a process.
_WORTH_A_PROCESS = 64


@click.command(cls=Command, context_settings={"show_default": True, "auto_envvar_prefix": "CXRAPID"})
@click.argument("source", type=PATH, default="data")
@click.argument("out", type=PATH, default="data/shards")
@click.option(
    "--split",
    "rule",
    envvar="CXRAPID_SPLIT",
    type=click.Choice(["official", "random", "file"]),
    default="official",
    help="official: NIH's lists, val drawn from train_val; random: 70/10/20; file: three lists. Always by patient.",
)
@click.option("--seed", type=SEED, default=0, help="Seed of the split and of the order of train.")
@click.option(
    "--val-fraction",
    type=FiniteRange(0, 0.5, max_open=True),
    default=None,
    metavar="FRACTION",
    help="Fraction of images for val.  [default: 0.125 of train_val; 0.1 of all with --split random]",
)
@click.option("--train-list", type=PATH, metavar="FILE", help="[default: SOURCE/train_val_list.txt]")
@click.option("--val-list", type=PATH, metavar="FILE", help="Images to hold out instead of drawing them.")
@click.option("--test-list", type=PATH, metavar="FILE", help="[default: SOURCE/test_list.txt]")
@click.option(
    "--boxes",
    type=PATH,
    metavar="FILE",
    help="Bounding boxes of findings, for localization.  [default: SOURCE/BBox_List_2017.csv, if there]",
)
@click.option(
    "--folders",
    callback=_folder_numbers,
    metavar="N|A,B",
    help="Only the first N image folders, or the A-th and B-th.  [default: all]",
)
@click.option(
    "--size", type=click.IntRange(16, 1024), default=224, metavar="PIXELS", help="Height and width of packed images."
)
@click.option(
    "--filter",
    type=click.Choice(["lanczos", "bicubic", "hamming", "bilinear", "box"]),
    default="lanczos",
    help="Filter of the resize, sharpest first; all antialias.",
)
@click.option(
    "--encoding", type=click.Choice(["jpeg", "png"]), default="jpeg", help="Encoding of packed images; png is lossless."
)
@click.option("--quality", type=click.IntRange(1, 100), default=95, help="JPEG quality.")
@click.option(
    "--shard-size", type=click.IntRange(1, 10_000_000), default=1024, metavar="SAMPLES", help="Samples per shard."
)
@click.option("--jobs", type=JOBS, default=None, metavar="N", help="Worker processes.  [default: one per core]")
@click.option("--allow-missing", is_flag=True, help="Pack the images that exist and skip the missing ones.")
@click.option(
    "--max-rejects", type=click.IntRange(0), default=0, metavar="N", help="Tolerate up to N images that do not decode."
)
@click.option("--strict", is_flag=True, help="Refuse suspicious images and metadata instead of warning.")
def main(
    source: Path,
    out: Path,
    rule: SplitRule,
    seed: int,
    val_fraction: float | None,
    train_list: Path | None,
    val_list: Path | None,
    test_list: Path | None,
    boxes: Path | None,
    folders: str | None,
    size: int,
    filter: Filter,
    encoding: Encoding,
    quality: int,
    shard_size: int,
    jobs: int | None,
    allow_missing: bool,
    max_rejects: int,
    strict: bool,
) -> None:
    """Pack the images under SOURCE (an NIH download) into shards in OUT.

    Run the same command again to finish an interrupted pack; it writes nothing when all is done.
    """
    if rule == "file" and None in (train_list, val_list, test_list):
        raise click.UsageError("--split file needs --train-list, --val-list and --test-list")
    if rule == "random" and (train_list or val_list or test_list):
        raise click.UsageError("--split random takes no lists")
    if val_fraction is not None and (rule == "file" or val_list):
        raise click.UsageError("--val-fraction draws val, which --val-list already names; give one of them")
    split = SplitRecipe(rule, seed, val_fraction, train_list, val_list, test_list)
    with graceful_exit("packed shards are kept; run the same command again to continue"):
        chosen = None if folders is None else choose_folders(source, folders)
        plan = make_plan(source, split, folders=chosen, allow_missing=allow_missing, boxes=boxes)
        for warning in plan.warnings:
            echo(f"note: {warning}", err=True)
        manifest = pack(
            plan,
            out,
            PixelRecipe(size, encoding, quality, filter),
            shard_size=shard_size,
            jobs=jobs or min(available_cores(), max(len(plan.images) // _WORTH_A_PROCESS, 1)),
            max_rejects=max_rejects,
            strict=strict,
        )
    echo(_summary(manifest))
    echo(f"{out}: {len(manifest.shards)} shards, {manifest.rejects} rejects; next: python -m trainer --shards {out}")


def _summary(manifest: Manifest) -> str:
    lines = [f"{'':20}" + "".join(f"{split:>16}" for split in SPLITS)]
    splits = [manifest.splits[split] for split in SPLITS]
    lines.append(f"{'images':20}" + "".join(f"{split.images:>16}" for split in splits))
    lines.append(f"{'patients':20}" + "".join(f"{split.patients:>16}" for split in splits))
    for finding in manifest.findings:
        cells = (f"{split.positives[finding]} ({split.prevalence[finding] or 0:.1%})" for split in splits)
        lines.append(f"{finding:20}" + "".join(f"{cell:>16}" for cell in cells))
    lines.append(f"patients in two splits: {manifest.patients_in_two_splits}")
    encoding = "lossless" if manifest.psnr is None else f"{manifest.psnr:.1f} dB PSNR"
    lines.append(f"pixels of train: mean {manifest.mean:.1f}, std {manifest.std:.1f}; encoding: {encoding}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
