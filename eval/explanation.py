"""Heat-map gallery and localization of an evaluation, computed once and cached."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from eval.evaluation import Evaluation, Explanation
from eval.heatmaps.gallery import gallery, load_gallery, remove_other_gallery, save_gallery
from eval.heatmaps.localization import Localization, localize
from eval.predict.scored_run import ScoredRun, require_torch
from eval.result_files import CacheKey, is_valid, write_csv
from shards.boxes import by_row, to_csv
from shards.errors import BadData, ResourceMissing
from shards.folder import ShardFolder

FOLDER = "heatmaps"


@dataclass(frozen=True)
class HeatmapOptions:
    """Which heat maps to make."""

    per_kind: int = 6
    """Pictures of each kind in the gallery; 0: no heat map at all and no localization, so that stored
    predictions need no torch."""
    boxes: pd.DataFrame | None = None
    """Boxes as `read_box_list` returns them; None: the shards' own boxes.csv."""

    def boxes_of(self, shards: ShardFolder) -> pd.DataFrame | None:
        """Return the boxes of images of the shards, as `read_boxes` does; None where none are known."""
        return (
            shards.boxes
            if self.boxes is None
            else by_row(self.boxes, shards.entries["image"], shards.manifest.findings)
        )

    def require_boxes(self, shards: ShardFolder, rows: npt.NDArray[np.int32]) -> None:
        """Raise BadData where a list of boxes was given that has no box of the images in these rows."""
        mine = None if self.boxes is None else self.boxes_of(shards)
        if mine is not None and not mine["row"].isin(rows).any():
            raise BadData(
                f"{len(mine)} boxes of the list are of images of {shards.path}, but none of the {len(rows)} "
                "images that are scored; localization needs one"
            )


def explain(evaluation: Evaluation, scored_run: ScoredRun, options: HeatmapOptions) -> Explanation:
    """Return the gallery of the evaluation of one run and, where boxes are known, its localization.

    Both are cached in the folder heatmaps/ of the evaluation. A cached one of the same weights, images,
    thresholds and boxes is reused; else the model runs, which imports torch. Localization does not depend
    on thresholds, and its intervals always use 1,000 resamples. It needs a box in the scored images. A
    gallery of other weights, images or thresholds is removed even if none is made: its captions would
    contradict the scores.

    Raises BadData for a list of boxes that has none of these images, and for an image that is not
    the packed one; ResourceMissing where torch is not installed or the device has too little memory.
    """
    scored, point = evaluation.predictions[evaluation.split], evaluation.operating_point
    folder, shards = evaluation.folder / FOLDER, scored_run.shards
    images: dict[str, str | None] = {"rows_sha256": hashlib.sha256(scored.rows.tobytes()).hexdigest()}
    decisions = {"tta": point.tta, "thresholds": point.by_finding()}
    remove_other_gallery(folder, scored_run.key(**images, **decisions))
    if not options.per_kind:
        return Explanation()
    boxes = options.boxes_of(shards)
    images["boxes_sha256"] = None if boxes is None else hashlib.sha256(to_csv(boxes).encode()).hexdigest()
    key = scored_run.key(**images, **decisions, per_kind=options.per_kind)
    maps = load_gallery(folder, key)
    if maps is None:
        with _torch_errors():
            maps = gallery(scored_run.model, shards, scored, evaluation.thresholds, options.per_kind, boxes)
        save_gallery(folder, key, maps)
    # A list that was given and has no box of these images is an error, which localize reports.
    if boxes is None or (options.boxes is None and not boxes["row"].isin(scored.rows).any()):
        return Explanation(maps)
    key = scored_run.key(**images)
    return Explanation(maps, _localization(evaluation, scored_run, key, boxes))


def _localization(evaluation: Evaluation, scored_run: ScoredRun, key: CacheKey, boxes: pd.DataFrame) -> Localization:
    path = evaluation.folder / FOLDER / "localization.csv"
    # What a plain evaluation measured holds for a what-if.
    for cached in (path, scored_run.folder(evaluation.split) / FOLDER / path.name):
        if is_valid(cached, key):
            try:
                return Localization.from_csv(cached, scored_run.shards.manifest.findings)
            except BadData:
                continue
    rows, batch_size = evaluation.predictions[evaluation.split].rows, scored_run.options.batch_size
    with _torch_errors():
        model = scored_run.model
        found = localize(model, scored_run.shards, rows, boxes, device=scored_run.device, batch_size=batch_size)
    write_csv(path, found.to_csv(), key)
    return found


@contextmanager
def _torch_errors() -> Iterator[None]:
    """Raise ResourceMissing where torch is not installed, or the device runs out of memory."""
    require_torch("drawing heat maps", "all else is done; --heatmaps 0 leaves them out")
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceMissing(
            "the device is out of memory for heat maps, which need gradients; try a lower --batch-size, or --heatmaps 0"
        ) from error
