"""Write an NIH-shaped tree of phantoms.

What the findings look like is in `signs`, the chest in `anatomy`, who has what in `cohort`.
"""

import functools
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from shards.boxes import BOX_LIST, GRID
from shards.console import progress_bar
from shards.errors import BadData, ResourceMissing
from shards.files import atomic_write
from shards.findings import FINDINGS, NO_FINDING
from shards.phantoms.anatomy import Layer, Plane, build_patient, cloud, draw_chest, pose
from shards.phantoms.cohort import draw_cohort
from shards.phantoms.signs import Box, draw_sign, reshape
from shards.processes import map_in_processes

METADATA = "Data_Entry_2017_v2020.csv"
MARKER = "PHANTOMS.json"
LISTS = {"train_val": "train_val_list.txt", "test": "test_list.txt"}
_METADATA_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
_BOXES_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,"
_DRAWN = 256  # pixels; chests are drawn at this size and enlarged: training looks at 224 pixels


@dataclass(frozen=True)
class Phantoms:
    """What make_phantoms has written."""

    entries: pd.DataFrame
    """One row per image; the columns of `shards.phantoms.cohort.draw_cohort`."""
    boxes: pd.DataFrame
    """One row per box in the test images: image, finding, x, y, w, h on the 1024 grid."""


class Order(NamedTuple):
    """One image to draw: its row in the metadata, where it goes, of whom, and with which findings."""

    row: int
    path: Path
    patient: int
    sex: str
    view: str
    findings: list[str]


def make_phantoms(
    out: Path, images: int = 1200, size: int = 512, seed: int = 0, jobs: int = 1, progress: bool = False
) -> Phantoms:
    """Write a tree that has the form of the NIH download into `out`, and return what is in it.

    Promises: the same arguments write the same bytes on one machine, whatever `jobs` is. Every file appears whole
    under its name, the metadata CSV last. The tree holds `images` gray PNGs of `size` x `size` pixels (every 100th is
    RGBA, as about 1 % of NIH's are) in up to 12 folders, the metadata CSV with NIH's header and column order, both
    official lists (patient-disjoint, NIH's proportion), and `BBox_List_2017.csv` with the true box of every sign drawn
    in a test image, for all 14 findings, in pixels of a 1024 grid whatever `size` is. Both lists have positives of
    every finding: 6 % of their images or NIH's share, whichever is more, and never less than one. `PHANTOMS.json`
    marks the tree as drawn, not taken from people.

    Args:
        out: a new or empty folder, or an earlier phantom tree, which is replaced.
        images: how many to draw, at least 20.
        size: pixels to a side, 64 to 4096.
        seed: 0 or more; names the tree.
        jobs: processes; with 1 all is drawn in this one. More need an importable `__main__`.
        progress: show a bar on stderr (plain lines where it is no terminal).

    Raises:
        BadData: `out` holds something that is not a phantom tree.
        ResourceMissing: `out` cannot be written.
        ValueError: a number is out of range.
    """
    if images < 20 or not 64 <= size <= 4096 or seed < 0 or jobs < 1:
        raise ValueError(
            "expected images >= 20, size 64..4096, seed >= 0 and jobs >= 1, "
            f"got images {images}, size {size}, seed {seed}, jobs {jobs}"
        )
    entries = draw_cohort(images, seed)
    orders = []
    for row, entry in enumerate(entries.to_dict("records")):
        path = out / entry["folder"] / "images" / entry["image"]
        findings = [name for name in entry["findings"].split("|") if name != NO_FINDING]
        orders.append(Order(row, path, entry["patient"], entry["sex"], entry["view"], findings))
    try:
        _prepare(out, {order.path for order in orders}, {"images": images, "size": size, "seed": seed})
        drawn = []
        with progress_bar(images, "phantoms", " images", disable=not progress) as bar:
            draw = functools.partial(_draw_file, size=size, seed=seed)
            for order, boxes_of_image in map_in_processes(draw, orders, jobs):
                drawn.append((order, boxes_of_image))
                bar.update()
        boxes = _table_of_boxes(entries, drawn)
        _write_lists(out, entries, boxes)
    except OSError as error:
        where = error.filename or out
        raise ResourceMissing(
            f"cannot write {where}: {error.strerror or error}; free space or name another OUT, then run again"
        ) from error
    return Phantoms(entries, boxes)


def draw_phantom(order: Order, size: int, seed: int) -> tuple[Layer, dict[str, tuple[Box, ...]]]:
    """Return gray values 0..1 [size, size] and, per finding, boxes as fractions of the side."""
    chest = build_patient(order.sex, np.random.default_rng([seed, 1, order.patient]))
    rng = np.random.default_rng([seed, 2, order.row])
    chest = reshape(pose(chest, order.view, rng), order.findings, rng)
    plane = Plane(chest, min(size, _DRAWN))
    image = draw_chest(plane, rng)
    boxes = {}
    for finding in order.findings:
        sign = draw_sign(finding, plane, rng)
        image = image + sign.layer
        boxes[finding] = sign.boxes
    # Exposure differs between images more than signs change their mean (set by eye beside NIH's).
    image = np.clip(image, 0, 1) ** math.exp(rng.normal(0, 0.12))
    image = image * rng.uniform(0.88, 1.08) + rng.uniform(0, 0.06)
    if chest.portable:
        image = 0.12 + 0.80 * image
    # Scatter stays when the image is packed, the detector's fine grain is mostly averaged away.
    image = image + 0.008 * cloud(plane.pixels // 2, plane.pixels, rng)
    seen = Image.fromarray(image.astype(np.float32))
    if chest.portable:  # a longer exposure of a patient who cannot stand still
        seen = seen.resize((plane.pixels * 3 // 4,) * 2, Image.Resampling.BILINEAR)
    enlarged = seen.resize((size, size), Image.Resampling.BICUBIC)
    grain = rng.standard_normal((size, size), dtype=np.float32) * 0.012
    return np.asarray(enlarged) + grain, boxes


def _draw_file(order: Order, size: int, seed: int) -> dict[str, tuple[Box, ...]]:
    image, boxes = draw_phantom(order, size, seed)
    picture = Image.fromarray((image * 255).round().clip(0, 255).astype(np.uint8))
    if order.row % 100 == 7:  # 1 % as in NIH's, and one already in a tree of 20
        picture = picture.convert("RGBA")
    encoded = io.BytesIO()
    picture.save(encoded, "PNG", compress_level=1)
    _write(order.path, encoded.getvalue())
    return boxes


def _prepare(out: Path, wanted: set[Path], settings: dict[str, int]) -> None:
    if out.exists() and not out.is_dir():
        raise BadData(f"{out} is a file; name a folder for the phantoms")
    if out.exists() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise BadData(f"{out} is not empty and not a phantom tree (no {MARKER}); name another folder")
    # Without its metadata the tree counts as unfinished while it is replaced.
    for name in (METADATA, BOX_LIST, *LISTS.values()):
        (out / name).unlink(missing_ok=True)
    _write(out / MARKER, json.dumps({"drawn_by": "CXRapid", **settings}).encode())
    for stale in set(out.glob("images_*/images/*.png*")) - wanted:
        stale.unlink()
    for path in {path.parent for path in wanted}:
        path.mkdir(parents=True, exist_ok=True)


def _table_of_boxes(entries: pd.DataFrame, drawn: list[tuple[Order, dict[str, tuple[Box, ...]]]]) -> pd.DataFrame:
    rows = [
        (entries["image"][order.row], finding, *(round(GRID * length, 3) for length in box))
        for order, found in drawn
        if entries["split"][order.row] == "test"
        for finding, boxes in found.items()
        for box in boxes
    ]
    table = pd.DataFrame(rows, columns=["image", "finding", "x", "y", "w", "h"])
    by_finding = table["finding"].map(FINDINGS.index)  # NIH's file goes finding by finding
    return table.iloc[np.argsort(by_finding.to_numpy(), kind="stable")].reset_index(drop=True)


def _write_lists(out: Path, entries: pd.DataFrame, boxes: pd.DataFrame) -> None:
    _write_csv(out / BOX_LIST, _BOXES_HEADER, boxes.replace({"finding": {"Infiltration": "Infiltrate"}}))
    for split, name in LISTS.items():
        # NIH's lists end without a newline.
        _write(out / name, "\n".join(entries["image"][entries["split"] == split]).encode())
    columns = ["image", "findings", "follow_up", "patient", "age", "sex", "view", "width", "height"]
    _write_csv(out / METADATA, _METADATA_HEADER, entries[[*columns, "spacing", "spacing"]])


def _write_csv(path: Path, header: str, table: pd.DataFrame) -> None:
    body = table.to_csv(index=False, header=False, lineterminator="\n")
    _write(path, f"{header}\n{body}".encode())


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as partial:
        partial.write_bytes(content)
