"""The pointing game: whether a heat map points into a box, and how well its hottest region overlaps one."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage

# Of a map's maximum: what is cut out is at least so hot. Wang et al. (CVPR 2017, section 3.3) cut maps of
# 0..255 at 60 and at 180. On 600 phantoms of a seed of their own (the demo's model) the mean IoU was 0.31
# at 60, 0.36 at 0.4, 0.35 at 0.5 and 0.26 at 180.
CUT = 0.4

Map = npt.NDArray[np.float32]
Boxes = npt.NDArray[np.float64]
"""[B, 4]: x and y of the upper left corner, width, height, as shares 0..1 of the image."""


class PointingGame(NamedTuple):
    """One heat map against the boxes of its finding in one image."""

    hit: bool
    """Whether the centre of the hottest pixel is in one of the boxes."""
    chance: float
    """Share of pixels whose centre is in one of them: the hit rate of a finger that points blindly."""
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
    if heat.max() <= 0:
        return PointingGame(False, float(inside.mean()), 0.0, 0.0)
    hottest = np.unravel_index(int(heat.argmax()), heat.shape)
    region = region_box(heat)
    shared = _intersections(region, boxes)
    own, theirs = region[2] * region[3], boxes[:, 2] * boxes[:, 3]
    return PointingGame(
        bool(inside[hottest]),
        float(inside.mean()),
        float((shared / (own + theirs - shared)).max()),
        float(shared.max() / own),
    )


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


def _intersections(region: Boxes, boxes: Boxes) -> npt.NDArray[np.float64]:
    near = np.maximum(region[:2], boxes[:, :2])
    far = np.minimum(region[:2] + region[2:], boxes[:, :2] + boxes[:, 2:])
    return np.asarray(np.clip(far - near, 0, None).prod(axis=1))
