"""The gallery: heat maps of randomly chosen right and wrong decisions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from eval.heatmaps.drawing import draw_heat_map
from eval.predict.images import ImageReader
from eval.predict.predictions import Predictions
from eval.scores.thresholds import apply_thresholds
from shards.boxes import by_row_and_finding
from shards.findings import FINDINGS
from shards.folder import ShardFolder

if TYPE_CHECKING:  # a stored gallery is shown without it
    from models import Classifier

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

    The choice is by lot (`seed`), not by how good they look: finding after finding in random order,
    around again until there are enough, of each finding an image that was drawn at random, those
    with a box of it first. A finding without a threshold is left out, as is a kind that nothing is of.

    Args:
        model: on any device, in any mode; left as it was.
        shards: where the images are.
        predictions: whose decisions are shown.
        thresholds: per finding, NaN for one without.
        per_kind: how many pictures of each kind; 0: none.
        boxes: as `shards.boxes.read_boxes` returns them, to be outlined; None: no boxes.
        seed: of the lot.

    Raises:
        BadData: an image does not decode.
    """
    import torch

    from eval.heatmaps.gradients import heatmaps

    cuts = np.array([thresholds[finding] for finding in FINDINGS])
    drawn = {} if boxes is None else by_row_and_finding(boxes)
    reader = ImageReader(shards)
    device = next(model.parameters()).device
    shown = []
    for kind, of_kind in zip(KINDS, _decisions(predictions, cuts), strict=True):
        for place, column in _choose(of_kind, predictions.rows, drawn, per_kind, seed):
            row, finding = predictions.rows[place], FINDINGS[column]
            image = reader.read(np.array([row]))
            heat = heatmaps(model, torch.from_numpy(image).to(device), [column])[0, 0].cpu().numpy()
            name = str(shards.entries["image"].loc[row])
            probability = float(predictions.probabilities[place, column])
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


def _decisions(
    predictions: Predictions, cuts: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    # [N, 14] each: which decisions are of the first, the second, the third of KINDS.
    predicted = apply_thresholds(predictions.probabilities, cuts)
    truth = predictions.labels.astype(np.bool_)
    return truth & predicted, ~truth & predicted, truth & ~predicted & ~np.isnan(cuts)


def _choose(
    of_kind: npt.NDArray[np.bool_],
    rows: npt.NDArray[np.int32],
    drawn: Mapping[tuple[int, str], object],
    count: int,
    seed: int,
) -> list[tuple[int, int]]:
    # Positions and columns; the round of a finding is how many of its images were chosen before.
    lot = np.random.default_rng(seed)
    queue = []
    for turn, column in enumerate(lot.permutation(of_kind.shape[1]).tolist()):
        places = lot.permutation(np.flatnonzero(of_kind[:, column])).tolist()
        places.sort(key=lambda place: (int(rows[place]), FINDINGS[column]) not in drawn)
        queue += [(around, turn, place, column) for around, place in enumerate(places)]
    return [(place, column) for _, _, place, column in sorted(queue)[:count]]
