"""The gallery: heat maps of randomly chosen right and wrong decisions."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import numpy as np
import numpy.typing as npt
import pandas as pd
from msgspec import Meta

from eval.heatmaps.drawing import draw_heat_map
from eval.predict.images import ImageReader
from eval.predict.predictions import Predictions
from eval.result_files import CacheKey, has_key, read_record, remove, write_record
from eval.scores.thresholds import apply_thresholds
from shards.boxes import by_row_and_finding
from shards.documents import convert, read_bytes
from shards.errors import BadData, ResourceMissing
from shards.files import atomic_write
from shards.folder import ShardFolder

if TYPE_CHECKING:  # a stored gallery is shown without it
    from models import Classifier

_RECORD = "gallery.json"
_Share = Annotated[float, Meta(ge=0, le=1)]

KINDS = ("true positive", "false positive", "false negative")


@dataclass(frozen=True)
class HeatMap:
    """One picture of the gallery."""

    image: str
    """Its name in the metadata."""
    finding: str
    kind: str
    """One of KINDS."""
    probability: float
    """Of the finding, 0..1, as the threshold was compared with it."""
    threshold: float
    png: bytes


def gallery(
    model: "Classifier",
    shards: ShardFolder,
    predictions: Predictions,
    thresholds: Mapping[str, float],
    per_kind: int,
    boxes: pd.DataFrame | None = None,
    *,
    seed: int = 0,
) -> tuple[HeatMap, ...]:
    """Return up to `per_kind` heat maps of each of KINDS, kind by kind, drawn over their images.

    The choice is random (`seed`), not by how good they look: round after round, a random image of each
    finding in random order, images with a box of the finding first. Findings without a threshold are
    left out, as is a kind without images.

    Args:
        model: on any device, in any mode; unchanged.
        shards: where the images are.
        predictions: whose decisions are shown.
        thresholds: per finding, NaN for one without.
        per_kind: how many pictures of each kind; 0: none.
        boxes: as `shards.boxes.read_boxes` returns them, to be outlined; None: no boxes.
        seed: of the choice.

    Raises:
        BadData: an image is not the packed one, or does not decode.
    """
    import torch

    from eval.heatmaps.gradients import heatmaps

    findings = shards.manifest.findings
    cuts = np.array([thresholds[finding] for finding in findings])
    predicted = apply_thresholds(predictions.probabilities, cuts)
    truth = predictions.labels.astype(np.bool_)
    decisions = truth & predicted, ~truth & predicted, truth & ~predicted & ~np.isnan(cuts)  # as KINDS
    drawn = {} if boxes is None else by_row_and_finding(boxes)
    reader = ImageReader(shards)
    device = next(model.parameters()).device
    shown = []
    for kind, of_kind in zip(KINDS, decisions, strict=True):
        for position, column in _choose(of_kind, predictions.rows, findings, drawn, per_kind, seed):
            row, finding = predictions.rows[position], findings[column]
            image = reader.read(np.array([row]))
            heat = heatmaps(model, torch.from_numpy(image).to(device), [column])[0, 0].cpu().numpy()
            name = str(shards.entries["image"].loc[row])
            probability = float(predictions.probabilities[position, column])
            png = draw_heat_map(
                image[0, 0],
                heat,
                finding=finding,
                probability=probability,
                threshold=float(cuts[column]),
                boxes=drawn.get((int(row), finding), ()),
                note=f"{kind}, {name}",
            )
            shown.append(HeatMap(name, finding, kind, probability, float(cuts[column]), png))
    return tuple(shown)


def _choose(
    of_kind: npt.NDArray[np.bool_],
    rows: npt.NDArray[np.int32],
    findings: tuple[str, ...],
    drawn: Mapping[tuple[int, str], object],
    count: int,
    seed: int,
) -> list[tuple[int, int]]:
    # Return positions and columns; the round of a finding is how many of its images were chosen before.
    random = np.random.default_rng(seed)
    queue = []
    for turn, column in enumerate(random.permutation(of_kind.shape[1]).tolist()):
        positions = random.permutation(np.flatnonzero(of_kind[:, column])).tolist()
        positions.sort(key=lambda position: (int(rows[position]), findings[column]) not in drawn)
        queue += [(round_, turn, position, column) for round_, position in enumerate(positions)]
    return [(position, column) for _, _, position, column in sorted(queue)[:count]]


class _Saved(TypedDict):
    file: str
    sha256: str
    image: str
    finding: str
    kind: str
    probability: _Share
    threshold: _Share


def save_gallery(folder: Path, key: CacheKey, maps: Iterable[HeatMap]) -> None:
    """Write the pictures as NUMBER_KIND_FINDING.png and, last, their record gallery.json.

    Removes an earlier gallery first. Raises ResourceMissing from the disk.
    """
    remove(folder, [_RECORD, "*.png"])
    records = []
    for number, shown in enumerate(maps, start=1):
        name = f"{number:02d}_{shown.kind}_{shown.finding}.png".replace(" ", "_").replace("/", "-")
        with atomic_write(folder / name) as partial:
            partial.write_bytes(shown.png)
        about = {field: value for field, value in vars(shown).items() if field != "png"}
        records.append({"file": name, "sha256": hashlib.sha256(shown.png).hexdigest(), **about})
    write_record(folder / _RECORD, key, maps=records)


def load_gallery(folder: Path, key: CacheKey) -> tuple[HeatMap, ...] | None:
    """Return the gallery that was saved with this very key; None where there is none or a file changed."""
    record = read_record(folder / _RECORD)
    if not has_key(record, key):
        return None
    maps = []
    try:
        for each in convert(record.get("maps"), list[_Saved], folder / _RECORD):
            png = read_bytes(folder / Path(each["file"]).name)
            if hashlib.sha256(png).hexdigest() != each["sha256"]:
                return None
            numbers = each["probability"], each["threshold"]
            maps.append(HeatMap(each["image"], each["finding"], each["kind"], *numbers, png))
    except (BadData, ResourceMissing):
        return None
    return tuple(maps)


def remove_other_gallery(folder: Path, key: CacheKey) -> None:
    """Remove the gallery unless its key contains all of this one; ResourceMissing from the disk."""
    if not has_key(read_record(folder / _RECORD), key):
        remove(folder, [_RECORD, "*.png"])
