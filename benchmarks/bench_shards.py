"""Shards to measure on: many different real-looking images out of a few, `python -m benchmarks.bench_shards`.

Every image is a random 224 px crop of one of the source's 256 px images, half of them mirrored, with
noise of one gray level, so no two are alike. Their JPEGs are 6 % larger than those of NIH's 1024 px
files resized to 224: 14.5 and 13.6 KB.
They are packed as the NIH download is, and the folder passes scripts/verify_shards.py. It is for
throughput only: crops of one X-ray stand in train and in test, so no score on it means anything.
"""

if __name__ == "__main__":
    import shards.startup  # noqa: F401  first: Ctrl-C ends in one line while the rest is imported

import functools
import hashlib
import math
import shutil
import statistics
import tarfile
import tempfile
from pathlib import Path

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
from shards.packing import SplitRecipe, make_plan, pack
from shards.phantoms import make_phantoms
from shards.pixels import PixelRecipe, encode
from shards.processes import available_cores, graceful_exit, map_in_processes
from shards.splits import RANDOM_FRACTIONS

SOURCE = Path("../shared/data/nih621_256_gray_png.tar")
OUT = Path("data/bench-shards")
IMAGES = 8000
PIXELS = PixelRecipe()
NOISE = 1.0
"""Standard deviation in gray levels."""
_PHANTOMS = 240  # drawn where there is no tar, at 256 px; 3 s on two cores
_PREFIX = "content"
_MEASURED = 16  # every _MEASURED-th image is encoded without and with its noise, to print what that adds
_TASK = 64  # images per task


def default_shards() -> Path:
    """Return data/shards where that is packed, else OUT, made with IMAGES images in train."""
    packed = Path("data/shards")
    return packed if (packed / NAME).is_file() else make_bench_shards(OUT, IMAGES).path


def make_bench_shards(out: Path, images: int, source: Path | None = None) -> ShardFolder:
    """Return the shard folder `out` with at least `images` different images of 224 px in train.

    `source` is a tar of 256 px gray PNGs, whose findings are taken from PREFIX_index.csv beside it
    (PREFIX: its name up to the first underscore) where that is. None: SOURCE; phantoms are drawn where
    that is not there. The same arguments make the same pixels. A folder made before from the same source
    with enough images is returned as it is, one with fewer or of another recipe is replaced; `out` appears
    complete. Raises BadData where `out` holds anything else.
    """
    if source is None and SOURCE.is_file():
        source = SOURCE
    recipe = f"1 {PIXELS} {NOISE} {_PHANTOMS if source is None else sha256_of(source)}"
    prefix = f"{_PREFIX}-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"
    made = _made_before(out)
    if made and made.manifest.splits["train"].images >= images and _prefix(made) == prefix:
        return made
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as work:
        tree, packed = Path(work) / "tree", Path(work) / "shards"
        originals = _originals(source, Path(work) / "originals")
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


def _originals(source: Path | None, folder: Path) -> dict[Path, str]:
    # The images that crops are taken from, in the order of their names, so that the same source gives the
    # same crops, and their findings as NIH writes them: `Mass|Nodule` or `No Finding`.
    if source is None:
        make_phantoms(folder, _PHANTOMS, size=256, jobs=available_cores(), progress=True)
        (index,) = folder.glob("Data_Entry*.csv")
    else:
        try:
            with tarfile.open(source) as archive:
                archive.extractall(folder, filter="data")
        except (OSError, tarfile.TarError) as error:
            raise BadData(f"{source} cannot be read as a tar: {error}") from error
        index = source.with_name(f"{source.name.partition('_')[0]}_index.csv")
    findings: dict[str, str] = {}
    if index.is_file():
        table = pd.read_csv(index, dtype=str, keep_default_na=False)
        findings = dict(zip(table["Image Index"], table["Finding Labels"], strict=True))
    paths = sorted(folder.rglob("*.png"))
    if not paths:
        raise BadData(f"{source} holds no PNG")
    return {path: findings.get(path.name, NO_FINDING) for path in paths}


def _write_tree(tree: Path, originals: dict[Path, str], prefix: str, images: int) -> None:
    # An NIH tree with one patient an image, so that a split by patient has exact shares.
    folder = tree / "images_001" / "images"
    folder.mkdir(parents=True)
    draw = functools.partial(_draw, folder, prefix, list(originals))
    tasks = [range(first, min(first + _TASK, images)) for first in range(0, images, _TASK)]
    sizes = [pair for _, pairs in map_in_processes(draw, tasks, available_cores()) for pair in pairs]
    before, after = (statistics.mean(size) for size in zip(*sizes, strict=True))
    echo(f"mean JPEG of a crop: {before:.0f} bytes as it is, {after:.0f} with the noise", err=True)
    findings = list(originals.values())
    table = {
        "Image Index": [_name(prefix, number) for number in range(images)],
        "Finding Labels": [findings[number % len(findings)] for number in range(images)],
        "Follow-up #": 0,
        "Patient ID": range(1, images + 1),
        "Patient Age": 50,
        "Patient Sex": ["MF"[number % 2] for number in range(images)],
        "View Position": "PA",
    }
    pd.DataFrame(table).to_csv(tree / "Data_Entry_2017_v2020.csv", index=False)


def _name(prefix: str, number: int) -> str:
    return f"{prefix}-{number:08d}.png"


def _draw(folder: Path, prefix: str, originals: list[Path], numbers: range) -> list[tuple[int, int]]:
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
        Image.fromarray(noisy).save(folder / _name(prefix, number), compress_level=1)
        if number % _MEASURED == 0:
            plain, encoded = (len(encode(gray, PIXELS.encoding, PIXELS.quality)) for gray in (crop, noisy))
            sizes.append((plain, encoded))
    return sizes


@click.command(cls=Command, context_settings={"show_default": True, "max_content_width": 110})
@click.argument("out", type=PATH, default=OUT)
@click.option("--images", type=click.IntRange(1), default=IMAGES, metavar="N", help="Different images in train.")
@click.option(
    "--source",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="TAR",
    help=f"256 px gray PNGs to crop.  [default: {SOURCE}; phantoms where that is not]",
)
def main(out: Path, images: int, source: Path | None) -> None:
    """Make shards of real-looking images in OUT to measure on; the same command again finds them made."""
    if source is None and not SOURCE.is_file():
        echo(f"note: {SOURCE} is not there, so phantoms are drawn; their JPEGs are larger", err=True)
    with graceful_exit("the same command makes it all"):
        made = make_bench_shards(out, images, source)
    manifest = made.manifest
    total = sum(split.images for split in manifest.splits.values())
    size = sum(shard.bytes for shard in manifest.shards) / total
    echo(f"{out}: {manifest.splits['train'].images} images in train, {total} in all, {size:.0f} bytes per sample")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.bench_shards")
