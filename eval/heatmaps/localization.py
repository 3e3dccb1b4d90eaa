"""Localization: how well the heat maps of a model agree with the boxes of a split (pointing game, IoU, IoBB)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import ndimage

from eval.predict.images import ImageReader
from eval.scores.bootstrap import percentiles, resample
from eval.scores.thresholds import Floats
from shards.boxes import by_row_and_finding
from shards.console import progress_bar
from shards.errors import BadData
from shards.folder import ShardFolder

if TYPE_CHECKING:  # a stored localization is read without it
    import torch

    from models import Classifier

OVERLAPS = (0.1, 0.25, 0.5, 0.75)
# Of a map's maximum: what is cut out is at least so hot. Wang et al. (CVPR 2017, section 3.3) cut maps of
# 0..255 at 60 and at 180. On 600 phantoms of a seed of their own (the demo's model) the mean IoU was 0.31
# at 60, 0.36 at 0.4, 0.35 at 0.5 and 0.26 at 180.
CUT = 0.4


_COUNTS = ["images", "boxes"]
_RATES = ["hit_rate", "hit_rate_low", "hit_rate_high", "chance", "ratio"]
_SHARES = [f"{measure}_{overlap}" for measure in ("iou", "iobb") for overlap in OVERLAPS]
_TYPES: dict[str, type] = {**dict.fromkeys(_COUNTS, np.int64), **dict.fromkeys([*_RATES, *_SHARES], np.float64)}


Map = npt.NDArray[np.float32]
Boxes = npt.NDArray[np.float64]
"""[B, 4]: x and y of the upper left corner, width, height, as shares 0..1 of the image."""


class PointingGame(NamedTuple):
    """One heat map against the boxes of its finding in one image."""

    hit: bool
    """Whether the centre of the hottest pixel is in one of the boxes."""
    chance: float
    """Share of pixels whose centre is in one of them: the hit rate of a random pixel."""
    iou: float
    """Intersection over union of the region's box and the box that it fits best, 0..1."""
    iobb: float
    """Intersection over the area of the region's box, with the box that gives the most, 0..1."""


def pointing_game(heat: Map, boxes: Boxes) -> PointingGame:
    """Compare a map [S, S], 0 or more, with at least one box.

    The pointing game is that of Zhang et al., "Top-down neural attention by excitation backprop",
    ECCV 2016, here with no tolerance: they add 15 px around a box. The region is what is at least
    CUT times the maximum and connected (by sides) with the hottest pixel; its box, upright and as
    small as can be, is compared with the true ones as in Wang et al., CVPR 2017. A map that is zero
    everywhere points nowhere: no hit, IoU and IoBB 0.
    """
    inside = _inside(boxes, heat.shape[0])
    chance = float(inside.mean())
    if heat.max() <= 0:
        return PointingGame(False, chance, 0.0, 0.0)
    region = region_box(heat)
    near = np.maximum(region[:2], boxes[:, :2])
    far = np.minimum(region[:2] + region[2:], boxes[:, :2] + boxes[:, 2:])
    shared = np.clip(far - near, 0, None).prod(axis=1)
    own, theirs = region[2] * region[3], boxes[:, 2] * boxes[:, 3]
    iou = float((shared / (own + theirs - shared)).max())
    return PointingGame(bool(inside.flat[heat.argmax()]), chance, iou, float(shared.max() / own))


def region_box(heat: Map) -> Boxes:
    """Return x, y, width, height [4] of the hottest region of a map [S, S] that is not zero everywhere."""
    hottest = np.unravel_index(int(heat.argmax()), heat.shape)
    parts, _ = ndimage.label(heat >= CUT * heat.max())
    rows, columns = np.nonzero(parts == parts[hottest])
    left, top = columns.min(), rows.min()
    sides = columns.max() + 1 - left, rows.max() + 1 - top
    return np.array([left, top, *sides], dtype=np.float64) / np.float64(heat.shape[0])


def _inside(boxes: Boxes, size: int) -> npt.NDArray[np.bool_]:
    centres = (np.arange(size) + 0.5) / size
    x, y, width, height = boxes.T[:, :, None]
    across = (centres >= x) & (centres <= x + width)
    down = (centres >= y) & (centres <= y + height)
    return np.asarray((down[:, :, None] & across[:, None, :]).any(axis=0))


@dataclass(frozen=True, eq=False)
class Localization:
    """How well heat maps agree with the boxes, per finding."""

    findings: tuple[str, ...]
    """All that the model predicts."""
    table: pd.DataFrame
    """Index `finding`: those with a box, in the order of `findings`, then macro (their mean) and micro (all their
    images pooled). Columns: images (with a box of the finding), boxes, hit_rate, hit_rate_low,
    hit_rate_high (95 %, over patients; NaN without resamples), chance (mean share of the image in the
    boxes), ratio (hit_rate / chance), then iou_T and iobb_T for T of OVERLAPS: the share of images whose
    overlap is above T."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """A sentence naming the findings that no box was drawn for, if there are any."""
        without = [finding for finding in self.findings if finding not in self.table.index]
        if not without:
            return ()
        return (f"No box shows {', '.join(without)}: localization leaves them out, also of its means.",)

    def to_csv(self) -> str:
        """Return the text of localization.csv, with all digits."""
        return self.table.to_csv(lineterminator="\n")

    @classmethod
    def from_csv(cls, path: Path, findings: tuple[str, ...]) -> "Localization":
        """Read what `to_csv` wrote; BadData where it is anything else."""
        try:
            table = pd.read_csv(path, index_col="finding", dtype={"finding": str, **_TYPES})
        except (OSError, ValueError, OverflowError) as error:
            raise BadData(f"{path} is damaged: {error}") from error
        with_box = [finding for finding in findings if finding in table.index]
        if list(table.columns) != list(_TYPES) or list(table.index) != [*with_box, "macro", "micro"]:
            raise BadData(f"{path} is damaged: it is no localization")
        return cls(findings, table)

    def to_text(self) -> str:
        """Return the table for a terminal, three decimals, `-` for NaN, and the warnings under it."""
        text = self.table.rename_axis(index=None).to_string(float_format=lambda value: f"{value:.3f}", na_rep="-")
        return "\n".join([text, *self.warnings])


def localize(
    model: "Classifier",
    shards: ShardFolder,
    split: str | npt.NDArray[np.int32],
    boxes: pd.DataFrame,
    *,
    device: "torch.device | str" = "cpu",
    batch_size: int = 64,
    resamples: int = 1000,
    seed: int = 0,
) -> Localization:
    """Make the heat map of every image and finding with a box, and compare it with the boxes.

    Args:
        model: moved to `device`, else left as it was.
        shards: where the images are.
        split: a split's name, or rows of entries.csv: the images that are looked at.
        boxes: as `shards.boxes.read_boxes` returns them; those of other images are ignored.
        device: where the model runs.
        batch_size: images per step; changes speed and memory only.
        resamples: of the patients, for the intervals of the hit rate; 0: no intervals.
        seed: of the resamples; the same seed and patients, the same resamples.

    Raises:
        BadData: no box is of these images, or an image is not the packed one, or does not decode.
    """
    import torch

    from eval.heatmaps.gradients import heatmaps

    rows = shards.rows(split) if isinstance(split, str) else split
    mine = boxes[boxes["row"].isin(rows)]
    if mine.empty:
        where = f"the split {split}" if isinstance(split, str) else f"the {len(rows)} images"
        raise BadData(f"no box is of an image of {where} of {shards.path}; localization needs one")
    model.to(device)
    reader = ImageReader(shards)
    drawn = by_row_and_finding(mine)
    found: list[tuple[str, int, int, PointingGame]] = []
    with progress_bar(len(drawn), "heat maps", "img") as bar:
        for number, finding in enumerate(shards.manifest.findings):
            with_box = np.array([row for row, name in drawn if name == finding], dtype=np.int32)
            for start in range(0, len(with_box), batch_size):
                batch = with_box[start : start + batch_size]
                images = torch.from_numpy(reader.read(batch)).to(device)
                maps = heatmaps(model, images, [number])[:, 0].cpu().numpy()
                for row, heat in zip(batch.tolist(), maps, strict=True):
                    here = drawn[row, finding]
                    found.append((finding, row, len(here), pointing_game(heat, here)))
                bar.update(len(batch))
    patients = shards.entries["patient"].loc[[row for _, row, _, _ in found]].to_numpy(dtype=np.int64)
    return summarize(found, patients, shards.manifest.findings, resamples=resamples, seed=seed)


def summarize(
    found: Sequence[tuple[str, int, int, PointingGame]],
    patients: npt.NDArray[np.int64],
    findings: tuple[str, ...],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Localization:
    """Return the table of (finding, row, number of boxes, pointing), with `patients` [N] beside them.

    In a resample the patients are drawn with replacement, each with all its images. Macro there is the
    mean over the findings that the resample has boxes of.
    """
    pairs = pd.DataFrame([(finding, boxes, *each) for finding, _, boxes, each in found])
    pairs.columns = pd.Index(["finding", "boxes", *PointingGame._fields])
    with_box = [finding for finding in findings if (pairs["finding"] == finding).any()]
    table = pd.DataFrame({name: _measures(pairs[pairs["finding"] == name]) for name in with_box}).T
    macro, micro = table.mean(), _measures(pairs)
    macro[_COUNTS] = micro[_COUNTS]
    table.loc["macro"], table.loc["micro"] = macro, micro
    table["hit_rate_low"], table["hit_rate_high"] = _intervals(pairs, with_box, patients, resamples, seed).T
    table["ratio"] = table["hit_rate"] / table["chance"]
    return Localization(findings, table[list(_TYPES)].astype(_TYPES).rename_axis(index="finding"))


def _measures(pairs: pd.DataFrame) -> "pd.Series[float]":
    row = {
        "images": len(pairs),
        "boxes": pairs["boxes"].sum(),
        "hit_rate": pairs["hit"].mean(),
        "chance": pairs["chance"].mean(),
    }
    for measure in ("iou", "iobb"):
        row |= {f"{measure}_{overlap}": (pairs[measure] > overlap).mean() for overlap in OVERLAPS}
    return pd.Series(row, dtype=np.float64)


def _intervals(
    pairs: pd.DataFrame, findings: list[str], patients: npt.NDArray[np.int64], resamples: int, seed: int
) -> npt.NDArray[np.float64]:
    """Return the confidence intervals of the hit rates of the findings, macro and micro: [F + 2, 2]."""
    names, patient = np.unique(patients, return_inverse=True)
    images = np.zeros((len(findings), len(names)))
    hits = np.zeros_like(images)
    cells = pairs["finding"].map(findings.index).to_numpy(), patient
    np.add.at(images, cells, 1)
    np.add.at(hits, cells, pairs["hit"].to_numpy(dtype=np.float64))

    def hit_rates(weights: Floats) -> list[Floats]:
        drawn_hits, drawn_images = hits @ weights, images @ weights
        rates = np.divide(drawn_hits, drawn_images, out=np.full_like(drawn_hits, np.nan), where=drawn_images > 0)
        micro = drawn_hits.sum(axis=0) / drawn_images.sum(axis=0)
        return [np.stack([*rates, np.nanmean(rates, axis=0), micro])]

    (drawn,) = resample(hit_rates, len(names), resamples=resamples, seed=seed)
    return np.array([percentiles(row) for row in drawn[:, 1:]])
