"""Draw the sign of each of the 14 findings into a phantom and return its bounding box.

The signs follow the radiology textbook in place and shape, not in looks: they are made so that
a small network can learn them from a thousand images, while no global brightness tells.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from shards.phantoms.anatomy import Chest, Layer, Plane, cloud, ramp, ridge

# x, y of the upper left corner, width, height, as fractions of the image side.
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Sign:
    """What one finding adds to the image."""

    layer: Layer
    """Density to add, in gray values of 0..1, float32 [pixels, pixels]."""
    boxes: tuple[Box, ...]
    """One box around each separate place of the sign."""


def reshape(chest: Chest, findings: list[str], rng: np.random.Generator) -> Chest:
    """Return `chest` with the changes of build that findings bring: a wide heart, flat diaphragms."""
    if "Cardiomegaly" in findings:
        chest = replace(chest, heart=chest.heart * rng.uniform(1.26, 1.45))
    if "Emphysema" in findings:
        flat = rng.uniform(0.45, 0.80)
        chest = replace(chest, dome=chest.dome * flat, base=chest.base + 0.01, heart=chest.heart * 0.95)
    return chest


def draw_sign(finding: str, plane: Plane, rng: np.random.Generator) -> Sign:
    """Return the sign of `finding`, of random side, place and strength, for the chest of `plane`."""
    return _DRAWERS[finding](plane, float(rng.uniform(0.55, 1.25)), rng)


def _side(rng: np.random.Generator) -> int:
    return -1 if rng.random() < 0.5 else 1


def _around(x: float, y: float, half_width: float, half_height: float) -> Box:
    left, top = max(x - half_width, 0.0), max(y - half_height, 0.0)
    return left, top, min(x + half_width, 1.0) - left, min(y + half_height, 1.0) - top


def _spanning(first: tuple[float, float], second: tuple[float, float]) -> Box:
    # From the first point's height down to the second's, whichever is on the left.
    return min(first[0], second[0]), first[1], abs(second[0] - first[0]), second[1] - first[1]


def _on(side: int, plane: Plane) -> Layer:
    """Return the mask of one lung, or of both where `side` is 0, the heart left out."""
    lung = plane.lungs * (1 - plane.heart)
    return lung if side == 0 else lung * (plane.across * side > 0)


def _blob(plane: Plane, x: float, y: float, half_width: float, half_height: float, softness: float) -> Layer:
    far = np.hypot((plane.x - x) / half_width, (plane.y - y) / half_height)
    return ramp(1 - far, softness)


def _atelectasis(plane: Plane, strength: float, rng: np.random.Generator) -> Sign:
    """Plates of collapsed lung: two or three thin bright streaks above the diaphragm."""
    side = _side(rng)
    x, y = plane.at(side, rng.uniform(0.50, 0.62), rng.uniform(0.68, 0.76))
    long, slope = rng.uniform(0.09, 0.12), rng.uniform(-0.25, 0.25)
    along = (plane.x - x) * side
    layer = np.zeros((plane.pixels, plane.pixels), dtype=np.float32)
    for gap in (-0.03, 0.0, 0.03):
        layer += ridge(plane.y - y - gap - slope * along, 0.010) * rng.uniform(0.7, 1.0)
    layer *= ramp(long - np.abs(along), 0.03)
    return Sign(0.25 * strength * layer * _on(side, plane), (_around(x, y, long, 0.045 + abs(slope) * long),))


def _cardiomegaly(plane: Plane, strength: float, rng: np.random.Generator) -> Sign:
    """The widened heart itself, which `reshape` has made: nothing is added, the box is the heart."""
    (x, y), (half_width, half_height) = plane.heart_middle, plane.heart_half
    return Sign(np.zeros((1, 1), dtype=np.float32), (_around(x, y, half_width * 1.05, half_height),))


def _effusion(plane: Plane, strength: float, rng: np.random.Generator) -> Sign:
    """Fluid in the costophrenic angle: its level climbs toward the side wall as a meniscus."""
    side = _side(rng)
    chest, depth = plane.chest, rng.uniform(0.06, 0.13)
    level = chest.base - depth - 0.10 * np.clip(plane.out / plane.wall(0.9), 0, 1) ** 4
    layer = ramp(plane.y - level, 0.02) * _on(side, plane)
    inner, outer = (plane.at(side, share, 0.92)[0] for share in (0.45, 1.02))
    top = chest.base - depth - 0.08
    return Sign(0.27 * strength * layer, (_spanning((inner, top), (outer, chest.base + 0.01)),))


def _infiltration(plane: Plane, strength: float, rng: np.random.Generator) -> Sign:
    """Patchy, ill-defined clouding of the middle of one lung."""
    side = _side(rng)
    x, y = plane.at(side, rng.uniform(0.52, 0.62), rng.uniform(0.48, 0.58))
    wide, high = rng.uniform(0.11, 0.14), rng.uniform(0.13, 0.16)
    patches = ramp(cloud(26, plane.pixels, rng) - 0.1, 1.0)
    layer = patches * _blob(plane, x, y, wide, high, 0.8) * _on(side, plane)
    return Sign(0.23 * strength * layer, (_around(x, y, wide * 0.9, high * 0.9),))


def _mass(plane: Plane, strength: float, rng: np.random.Generator) -> Sign:
    """One round density over 3 cm across, in the outer middle zone."""
    side, size = _side(rng), rng.uniform(0.052, 0.07)
    x, y = plane.at(side, rng.uniform(0.60, 0.72), rng.uniform(0.42, 0.54))
    layer = _blob(plane, x, y, size, size * rng.uniform(0.85, 1.15), 0.25) * _on(side, plane)
    return Sign(0.30 * strength * layer, (_around(x, y, size, size),))


def _nodule(plane: Plane, strength: float, rng: np.random.Generator) -> Sign:
    """One round density under 3 cm across, in the upper zone."""
    side, size = _side(rng), rng.uniform(0.028, 0.036)
    x, y = plane.at(side, rng.uniform(0.50, 0.72), rng.uniform(0.20, 0.32))
    layer = _blob(plane, x, y, size, size, 0.5) * _on(side, plane)
    return Sign(0.50 * strength * layer, (_around(x, y, size, size),))


def _pneumonia(plane: Plane, strength: float, rng: np.random.Generator) -> Sign:
    """A lower lobe clouded evenly, fading out at its margins."""
    side = _side(rng)
    x, y = plane.at(side, rng.uniform(0.62, 0.74), rng.uniform(0.66, 0.74))
    wide, high = rng.uniform(0.11, 0.13), rng.uniform(0.11, 0.14)
    layer = _blob(plane, x, y, wide, high, 1.2) * _on(side, plane)
    return Sign(0.27 * strength * layer, (_around(x, y, wide * 0.9, high * 0.9),))


def _pneumothorax(plane: Plane, strength: float, rng: np.random.Generator) -> Sign:
    """Air around the top of a lung: a dark rim without markings, bounded by a fine pleural line."""
    side, rim, drop = _side(rng), rng.uniform(0.04, 0.065), rng.uniform(0.12, 0.17)
    # The collapsed lung keeps its outline, lower and narrower.
    down = plane.down[:, 0]
    outer, inner = (np.interp(down - drop, down, edge[:, 0])[:, None] for edge in (plane.outer, plane.inner))
    inside = np.where(plane.down > drop, np.minimum(outer - rim - plane.out, plane.out - inner + 0.02), -1)
    inside = inside.astype(np.float32)
    reach = ramp(0.62 - plane.down, 0.2)
    lung = _on(side, plane) * reach
    layer = -0.18 * ramp(-inside, 0.02) * lung + 0.18 * ridge(inside, 0.006) * lung
    (left, _), (right, y) = plane.at(side, 0.25, 0.3), plane.at(side, 1.02, 0.55)
    return Sign(strength * layer, (_spanning((left, plane.chest.apex), (right, y)),))


def _consolidation(plane: Plane, strength: float, rng: np.random.Generator) -> Sign:
    """An upper lobe filled down to a sharp fissure, with the dark lines of its open bronchi."""
    side = _side(rng)
    x, fissure = plane.at(side, 0.55, rng.uniform(0.36, 0.44))
    top = fissure - rng.uniform(0.11, 0.14)
    slope = side * rng.uniform(0.05, 0.2)
    level = plane.y - slope * (plane.x - x)
    layer = ramp(fissure - level, 0.012) * ramp(level - top, 0.08) * ramp(plane.out - 0.10, 0.05)
    bronchi = sum(ridge(plane.out - 0.13 - shift - 0.5 * (fissure - plane.y), 0.006) for shift in (0, 0.05, 0.1))
    layer = layer * (1 - 0.5 * np.clip(bronchi, 0, 1)) * _on(side, plane)
    inner, outer = (plane.at(side, share, 0.38)[0] for share in (0.28, 1.0))
    box = (min(inner, outer), top, abs(outer - inner), fissure - top + 0.02)
    return Sign(0.25 * strength * layer, (box,))


def _edema(plane: Plane, strength: float, rng: np.random.Generator) -> Sign:
    """A bat's wings: haze around both hila that spares the rim of the lungs."""
    down, wide, high = rng.uniform(0.46, 0.52), rng.uniform(0.12, 0.15), rng.uniform(0.15, 0.18)
    layer = np.zeros((plane.pixels, plane.pixels), dtype=np.float32)
    boxes = []
    for side in (-1, 1):
        x, y = plane.at(side, 0.36, down)
        layer = np.maximum(layer, _blob(plane, x, y, wide, high, 1.0))
        boxes.append(_around(x, y, wide * 0.9, high * 0.9))
    haze = 0.8 + 0.2 * cloud(40, plane.pixels, rng)
    return Sign(0.19 * strength * layer * haze * _on(0, plane), tuple(boxes))


def _emphysema(plane: Plane, strength: float, rng: np.random.Generator) -> Sign:
    """Lungs too dark below, over diaphragms that `reshape` has flattened; one box for each lung base."""
    layer = -0.045 * strength * ramp(plane.down - 0.62, 0.2) * _on(0, plane)
    boxes = [_spanning(plane.at(side, 0.2, 0.60), plane.at(side, 1.02, 1.02)) for side in (-1, 1)]
    return Sign(layer, tuple(boxes))


def _fibrosis(plane: Plane, strength: float, rng: np.random.Generator) -> Sign:
    """A net of fine lines in the outer bases of both lungs."""
    step = rng.uniform(0.022, 0.028)
    bend = 0.012 * cloud(16, plane.pixels, rng)
    turn = 2 * np.pi / step
    net = np.abs(np.cos(turn * 0.5 * (plane.x + plane.y + bend)) * np.cos(turn * 0.5 * (plane.x - plane.y + bend)))
    zone = ramp(plane.down - 0.66, 0.16) * ramp(plane.out - 0.5 * plane.wall(0.85), 0.12)
    boxes = [_spanning(plane.at(side, 0.5, 0.64), plane.at(side, 1.0, 0.98)) for side in (-1, 1)]
    return Sign(0.055 * strength * (1 - 2 * net) * zone * _on(0, plane), tuple(boxes))


def _pleural_thickening(plane: Plane, strength: float, rng: np.random.Generator) -> Sign:
    """A bright band along the side wall of one lung."""
    side, thick = _side(rng), rng.uniform(0.032, 0.042)
    middle, half = rng.uniform(0.50, 0.60), rng.uniform(0.20, 0.26)
    band = ramp(plane.out - plane.outer + thick, 0.012) * ramp(half - np.abs(plane.down - middle), 0.1)
    (inner, top), (outer, bottom) = plane.at(side, 1.0, middle - half), plane.at(side, 1.0, middle + half)
    left = min(inner, outer) - (thick if side > 0 else 0.0)
    box = (left, top, abs(outer - inner) + thick, bottom - top)
    return Sign(0.42 * strength * band * _on(side, plane), (box,))


def _hernia(plane: Plane, strength: float, rng: np.random.Generator) -> Sign:
    """A stomach behind the heart: a round density beside the spine with air above a flat level."""
    chest, size = plane.chest, rng.uniform(0.055, 0.07)
    x = chest.middle + rng.uniform(-0.03, 0.05)
    y = chest.base - chest.dome - rng.uniform(0.03, 0.06)
    round_ = _blob(plane, x, y, size, size, 0.2)
    air = _blob(plane, x, y, size * 0.8, size * 0.8, 0.2) * ramp(y - plane.y, 0.01)
    return Sign(strength * (0.10 * round_ - 0.23 * air), (_around(x, y, size, size),))


_DRAWERS: dict[str, Callable[[Plane, float, np.random.Generator], Sign]] = {
    "Atelectasis": _atelectasis,
    "Cardiomegaly": _cardiomegaly,
    "Effusion": _effusion,
    "Infiltration": _infiltration,
    "Mass": _mass,
    "Nodule": _nodule,
    "Pneumonia": _pneumonia,
    "Pneumothorax": _pneumothorax,
    "Consolidation": _consolidation,
    "Edema": _edema,
    "Emphysema": _emphysema,
    "Fibrosis": _fibrosis,
    "Pleural_Thickening": _pleural_thickening,
    "Hernia": _hernia,
}
