"""Shards to measure on: many different real-looking images out of a few, `python -m benchmarks.bench_shards`.

Every image is a random 224 px crop of one of the source's 256 px images, half of them mirrored, with
noise of one gray level, so no two are alike. Their JPEGs are 6 % larger than those of NIH's 1024 px
files resized to 224: 14.5 and 13.6 KB.
They are packed as the NIH download is, and the folder passes scripts/verify_shards.py. It is for
throughput only: crops of one X-ray stand in train and in test, so no score on it means anything.
"""

if __name__ == "__main__":
    import shards.startup  # noqa: F401  first: Ctrl-C ends in one line while the rest is imported

import csv
import functools
import hashlib
import io
import math
import shutil
import statistics
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import pandas as pd
from PIL import Image

from shards.console import PATH, Command, echo
from shards.errors import BadData
from shards.files import sha256_of
from shards.findings import NO_FINDING
from shards.folder import ShardFolder, open_shards
from shards.manifest import NAME
from shards.packing import pack
from shards.packing.planning import SplitRecipe, make_plan
from shards.phantoms import make_phantoms
from shards.pixels import PixelRecipe, encode
from shards.processes import available_cores, graceful_exit, map_in_processes
from shards.splits import RANDOM_FRACTIONS

SOURCE = Path("../shared/data/nih621_256_gray_png.tar")
OUT = Path("data/bench-shards")
PIXELS = PixelRecipe()
NOISE = 1.0
"""Standard deviation in gray levels."""
_PHANTOMS = 240  # drawn where there is no tar, at 256 px; 3 s on two cores
_HEADER = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Sex,View Position"
_PREFIX = "content"
_MEASURED = 16  # every _MEASURED-th image is encoded without and with its noise, to print what that adds
_TASK = 64  # images a task


class Original(NamedTuple):
    """One image that crops are taken from."""

    path: Path
    findings: str
    """As NIH writes them: `Mass|Nodule` or `No Finding`."""


def default_shards(images: int = 8000) -> Path:
    """Return data/shards where that is packed, else OUT, made with `images` images in train."""
    packed = Path("data/shards")
    if (packed / NAME).is_file():
        return packed
    make_bench_shards(OUT, images, SOURCE if SOURCE.is_file() else None)
    return OUT


def make_bench_shards(out: Path, images: int, source: Path | None) -> ShardFolder:
    """Return the shard folder `out` with at least `images` different images of 224 px in train.

    `source` is a tar of 256 px gray PNGs, whose findings are taken from PREFIX_index.csv beside it
    (PREFIX: its name up to the first underscore) where that is; None: phantoms are drawn instead.
    The same arguments make the same pixels. A folder made before from the same source with enough
    images is returned as it is, one with fewer or of another recipe is replaced; `out` appears complete.
    Raises BadData where `out` holds anything else.
    """
    if images < 1:
        raise ValueError(f"expected at least one image, got {images}")
    recipe = f"1 {PIXELS} {NOISE} {_PHANTOMS if source is None else sha256_of(source)}"
    prefix = f"{_PREFIX}-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"
    made = _made_before(out)
    if made and made.manifest.splits["train"].images >= images and _prefix(made) == prefix:
        return made
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as work:
        tree, packed = Path(work) / "tree", Path(work) / "shards"
        originals = _originals(source, Path(work))
        _write_tree(tree, originals, prefix, math.ceil(images / RANDOM_FRACTIONS[0]))
        pack(make_plan(tree, SplitRecipe("random")), packed, PIXELS, jobs=available_cores())
        if out.exists():
            shutil.rmtree(out)
        packed.rename(out)
    return open_shards(out)


def _made_before(out: Path) -> ShardFolder | None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    made = open_shards(out) if (out / NAME).is_file() else None
    if made is None or not _prefix(made).startswith(_PREFIX):
        raise BadData(f"{out} holds something that benchmarks.bench_shards did not make; name another folder")
    return made


def _prefix(made: ShardFolder) -> str:
    # The recipe is in the images' names, for a shard folder holds nothing but what was packed.
    return str(made.entries["image"].iloc[0]).rpartition("-")[0]


def _originals(source: Path | None, work: Path) -> list[Original]:
    # In the order of their names, so that the same source gives the same crops.
    if source is None:
        make_phantoms(work / "originals", _PHANTOMS, size=256, jobs=available_cores(), progress=True)
        (index,) = (work / "originals").glob("Data_Entry*.csv")
    else:
        try:
            with tarfile.open(source) as archive:
                archive.extractall(work / "originals", filter="data")
        except (OSError, tarfile.TarError) as error:
            raise BadData(f"{source} cannot be read as a tar: {error}") from error
        index = source.with_name(f"{source.name.partition('_')[0]}_index.csv")
    findings: dict[str, str] = {}
    if index.is_file():
        table = pd.read_csv(index, dtype=str, keep_default_na=False)
        findings = dict(zip(table["Image Index"], table["Finding Labels"], strict=True))
    paths = sorted((work / "originals").rglob("*.png"))
    if not paths:
        raise BadData(f"{source} holds no PNG")
    return [Original(path, findings.get(path.name, NO_FINDING)) for path in paths]


def _write_tree(tree: Path, originals: list[Original], prefix: str, images: int) -> None:
    # An NIH tree with one patient an image, so that a split by patient has exact shares.
    folder = tree / "images_001" / "images"
    folder.mkdir(parents=True)
    draw = functools.partial(_draw, folder / prefix, [original.path for original in originals])
    tasks = [range(first, min(first + _TASK, images)) for first in range(0, images, _TASK)]
    sizes: list[tuple[int, int]] = []
    for _, measured in map_in_processes(draw, tasks, available_cores()):
        sizes += measured
    before, after = (statistics.mean(size) for size in zip(*sizes, strict=True))
    echo(f"mean JPEG of a crop: {before:.0f} bytes as it is, {after:.0f} with the noise", err=True)
    with (tree / "Data_Entry_2017_v2020.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(_HEADER.split(","))
        for number in range(images):
            findings = originals[number % len(originals)].findings
            name = _numbered(tree / prefix, number).name
            rows.writerow([name, findings, 0, number + 1, 50, "MF"[number % 2], "PA"])


def _numbered(prefix: Path, number: int) -> Path:
    return prefix.with_name(f"{prefix.name}-{number:08d}.png")


def _draw(prefix: Path, originals: list[Path], numbers: range) -> list[tuple[int, int]]:
    # Writes these images; returns the bytes of some as JPEG without and with their noise.
    sizes = []
    for number in numbers:
        rng = np.random.default_rng([0, number])
        with Image.open(originals[number % len(originals)]) as image:
            pixels = np.asarray(image.convert("L"))
        top, left = (int(rng.integers(side - PIXELS.size + 1)) for side in pixels.shape)
        crop = pixels[top : top + PIXELS.size, left : left + PIXELS.size]
        crop = crop[:, ::-1] if rng.random() < 0.5 else crop
        noise = rng.standard_normal(crop.shape, dtype=np.float32) * NOISE
        noisy = (crop + noise).round().clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "PNG", compress_level=1)
        _numbered(prefix, number).write_bytes(buffer.getvalue())
        if number % _MEASURED == 0:
            jpegs = [encode(gray, PIXELS.encoding, PIXELS.quality) for gray in (crop, noisy)]
            sizes.append((len(jpegs[0]), len(jpegs[1])))
    return sizes


@click.command(cls=Command, context_settings={"show_default": True, "max_content_width": 110})
@click.argument("out", type=PATH, default=OUT)
@click.option("--images", type=click.IntRange(1), default=8000, metavar="N", help="Different images in train.")
@click.option(
    "--source",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="TAR",
    help=f"256 px gray PNGs to crop.  [default: {SOURCE}; phantoms where that is not]",
)
def main(out: Path, images: int, source: Path | None) -> None:
    """Make shards of real-looking images in OUT to measure on; the same command again finds them made."""
    if source is None and SOURCE.is_file():
        source = SOURCE
    if source is None:
        echo(f"note: {SOURCE} is not there, so phantoms are drawn; their JPEGs are larger", err=True)
    with graceful_exit("the same command makes it all"):
        made = make_bench_shards(out, images, source)
    manifest = made.manifest
    total = sum(split.images for split in manifest.splits.values())
    size = sum(shard.bytes for shard in manifest.shards) / total
    echo(f"{out}: {manifest.splits['train'].images} images in train, {total} in all, {size:.0f} bytes a sample")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.bench_shards")
