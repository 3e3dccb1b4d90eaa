"""Heat-map gallery and localization of an evaluation, computed once and cached."""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd

from eval.evaluation import Evaluation
from eval.heatmaps.gallery import HeatMap, gallery
from eval.heatmaps.keeping import (
    keep_gallery,
    keep_localization,
    read_gallery,
    read_localization,
    remove_other_gallery,
)
from eval.heatmaps.localization import Localization, localize
from eval.predict.scored_run import ScoredRun, require_torch
from shards.boxes import by_row, to_csv
from shards.errors import BadData, ResourceMissing
from shards.folder import ShardFolder

FOLDER = "heatmaps"
Made = TypeVar("Made")


@dataclass(frozen=True)
class HeatmapOptions:
    """What is asked for."""

    per_kind: int = 6
    """Pictures of each kind in the gallery; 0: no heat map at all, so no localization either, and no need
    of torch where predictions are stored."""
    boxes: pd.DataFrame | None = None
    """A list of boxes as `read_box_list` returns it; None: the shards' own boxes.csv."""

    def boxes_of(self, shards: ShardFolder) -> pd.DataFrame | None:
        """Return those of images of the shards, as `read_boxes` does; None where no boxes are known."""
        return shards.boxes if self.boxes is None else by_row(self.boxes, shards.entries["image"])

    def require_boxes(self, shards: ShardFolder, rows: npt.NDArray[np.int32]) -> None:
        """Raise BadData where a list was asked for, and has no box of the images in these rows."""
        mine = None if self.boxes is None else self.boxes_of(shards)
        if mine is not None and not mine["row"].isin(rows).any():
            raise BadData(
                f"{len(mine)} boxes of the list are of images of {shards.path}, but none of the {len(rows)} "
                "images that are scored; localization needs one"
            )


def explain(evaluation: Evaluation, scored_run: ScoredRun, asked: HeatmapOptions) -> Evaluation:
    """Return the evaluation of one run with its gallery and, where boxes are known, its localization.

    Both are kept in the folder heatmaps/ of the evaluation, and are read from there where they are of the
    same weights, images, thresholds and boxes; only else the model runs, which imports torch: by another
    rule other decisions are shown. Where torch is not wanted, no heat map must be asked for. So that no
    other interval of the scores needs the model, those of the hit rates are always of 1,000 resamples.
    Without a box in the scored images there is no localization. A gallery of other weights, images or
    thresholds is removed, also where none is asked for: its captions would contradict the scores.

    Raises BadData for a list of boxes that has none of these images, and for an image that does not
    decode; ResourceMissing where torch is not installed or the device has too little memory.
    """
    scored = evaluation.predictions[evaluation.split]
    folder = evaluation.folder / FOLDER
    proof: dict[str, Any] = {
        "weights_sha256": scored_run.header.weights_sha256,
        "manifest_sha256": scored_run.shards.digest,
        "rows_sha256": hashlib.sha256(scored.rows.tobytes()).hexdigest(),
    }
    cuts = {name: None if math.isnan(cut) else cut for name, cut in evaluation.thresholds.items()}
    decisions = {"tta": evaluation.tta, "thresholds": cuts}
    remove_other_gallery(folder, {**proof, **decisions})
    if not asked.per_kind:
        return evaluation
    boxes = asked.boxes_of(scored_run.shards)
    proof["boxes_sha256"] = None if boxes is None else hashlib.sha256(to_csv(boxes).encode()).hexdigest()

    def new_gallery() -> tuple[HeatMap, ...]:
        model, shards = scored_run.model, scored_run.shards
        return gallery(model, shards, scored, evaluation.thresholds, asked.per_kind, boxes)

    of_decisions = {**proof, **decisions, "per_kind": asked.per_kind}
    maps = read_gallery(folder, of_decisions)
    if maps is None:
        maps = _run(new_gallery)
        keep_gallery(folder, of_decisions, maps)
    found = None
    # A list that was asked for and has no box of these images is an error, which localize names.
    if boxes is not None and (asked.boxes is not None or boxes["row"].isin(scored.rows).any()):
        found = _localization(scored_run, evaluation.split, folder, proof, scored.rows, boxes)
    return dataclasses.replace(evaluation, gallery=maps, localization=found)


def _localization(
    scored_run: ScoredRun, split: str, folder: Path, proof: dict[str, Any], rows: Any, boxes: pd.DataFrame
) -> Localization:
    # It does not depend on rule or calibration: what a plain evaluation measured holds for a what-if.
    plain = scored_run.folder(split) / FOLDER
    found = read_localization(folder, proof) or read_localization(plain, proof)
    if found is None:
        found = _run(
            lambda: localize(
                scored_run.model,
                scored_run.shards,
                rows,
                boxes,
                device=scored_run.device,
                batch_size=scored_run.options.batch_size,
            )
        )
        keep_localization(folder, proof, found)
    return found


def _run(make: Callable[[], Made]) -> Made:
    require_torch("drawing heat maps", "all else is done; with --heatmaps 0 it is not asked for")
    import torch

    try:
        return make()
    except torch.OutOfMemoryError as error:
        raise ResourceMissing(
            "the device is out of memory for heat maps, which need gradients; try a lower --batch-size, or "
            "--heatmaps 0"
        ) from error
