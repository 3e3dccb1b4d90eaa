"""Draw the anatomy of a phantom: lungs, heart, bones, skin, and their densities.

Lengths and places are fractions of the image side, x to the right and y down; a density is what
is added to or taken from a gray value of 0..1. Proportions were set by eye beside NIH images.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

# float32 where it is as large as the image.
Layer = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Chest:
    """One patient's build as seen in one image."""

    middle: float
    """x of the spine at mid-height."""
    tilt: float
    """How far the spine leans to the right from top to bottom of the image."""
    apex: float
    """y of the lungs' tops."""
    base: float
    """y of the costophrenic angles."""
    width: float
    """From the spine to the lung's side wall."""
    dome: float
    """Height of the diaphragm's dome above `base`."""
    heart: float
    """Half the heart's width over `width`; times 1 it is the cardiothoracic ratio."""
    wall: float
    """Thickness of the chest wall."""
    spacing: float
    """From one rib to the next."""
    phase: float
    """Where the first rib begins, in ribs."""
    breasts: float
    """Density of the breast shadows, 0 for men."""
    air: float
    """How much darker than soft tissue a lung is."""
    portable: bool
    """An AP image: taken in bed, with a magnified heart, less breath and more blur."""


def build_patient(sex: str, rng: np.random.Generator) -> Chest:
    """Return the build that all images of a patient share."""
    return Chest(
        middle=0.5,
        tilt=0.0,
        apex=rng.uniform(0.12, 0.16),
        base=rng.uniform(0.80, 0.86),
        width=rng.uniform(0.35, 0.40) - (0.02 if sex == "F" else 0.0),
        dome=rng.uniform(0.09, 0.12),
        heart=rng.uniform(0.42, 0.48),
        wall=rng.uniform(0.03, 0.08),
        spacing=rng.uniform(0.076, 0.090),
        phase=rng.uniform(0, 1),
        breasts=rng.uniform(0.03, 0.10) if sex == "F" else 0.0,
        air=rng.uniform(0.40, 0.46),
        portable=False,
    )


def pose(chest: Chest, view: str, rng: np.random.Generator) -> Chest:
    """Return `chest` as it stands before the detector on one day: breath, place, AP or PA."""
    portable = view == "AP"
    return replace(
        chest,
        middle=chest.middle + rng.normal(0, 0.012),
        tilt=rng.normal(0, 0.02 if portable else 0.01),
        apex=chest.apex + rng.normal(0, 0.008),
        base=chest.base + rng.normal(0, 0.008) - (0.05 if portable else 0.0),
        width=chest.width * rng.normal(1, 0.015),
        heart=chest.heart * rng.normal(1, 0.02) * (1.10 if portable else 1.0),
        air=chest.air * (0.90 if portable else 1.0),
        portable=portable,
    )


def ramp(distance: Layer, softness: float) -> Layer:
    """Return a smooth step from 0 to 1, `softness` wide, with 0.5 where `distance` is 0."""
    step = np.clip(distance / softness + 0.5, 0, 1)
    smooth: Layer = step * step * (3 - 2 * step)
    return smooth


def ridge(distance: Layer, width: float) -> Layer:
    """Return a line of peak 1 and half-width `width` where `distance` is 0."""
    fall: Layer = 1 / (1 + (distance / width) ** 2) ** 2
    return fall


def cloud(cells: int, pixels: int, rng: np.random.Generator) -> Layer:
    """Return smooth noise [pixels, pixels] of unit variance at its knots, `cells` to a side."""
    knots = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(knots.resize((pixels, pixels), Image.Resampling.BICUBIC))


class Plane:
    """The image plane of one chest: pixel coordinates seen from its spine, and its regions.

    All layers are float32 and broadcast to [pixels, pixels]. `across` is the signed distance from
    the spine, `out` its size, `down` runs from 0 at the apex to 1 at the base; `lungs`, `heart`
    and `body` are masks of 0..1. `side` -1 is the image's left, the patient's right.
    """

    def __init__(self, chest: Chest, pixels: int) -> None:
        line = (np.arange(pixels, dtype=np.float32) + 0.5) / pixels
        self.chest = chest
        self.pixels = pixels
        self.x, self.y = line[None, :], line[:, None]
        self.spine = chest.middle + chest.tilt * (self.y - 0.5)
        self.across = self.x - self.spine
        self.out = np.abs(self.across)
        self.down = (self.y - chest.apex) / (chest.base - chest.apex)
        # The upper half of a lung closes to a dome at half of its width.
        rest = 1 - np.clip(self.down / 0.5, 0, 1)
        opening = np.sqrt(1 - rest**2, dtype=np.float32)
        self.outer: Layer = chest.width * (0.48 + 0.42 * opening + 0.10 * np.clip(self.down, 0, 1))
        self.inner: Layer = 0.06 + (0.42 * chest.width - 0.06) * (1 - opening)
        bulge = 1 - ((self.out / chest.width - 0.42) / 0.58) ** 2
        liver = ((self.across < 0) & (bulge > 0)).astype(np.float32)
        self.diaphragm: Layer = chest.base - chest.dome * bulge - 0.02 * liver
        self.lungs: Layer = (
            ramp(self.outer - self.out, 0.012)
            * ramp(self.out - self.inner, 0.03)
            * ramp(self.diaphragm - self.y, 0.014)
            * (self.down > 0)
        )
        half = chest.heart * chest.width
        self.heart_middle = (chest.middle + 0.36 * half, chest.base - chest.dome - 0.48 * half)
        self.heart_half = (half, 1.08 * half)
        # An egg that leans to the image's right, narrow where the great vessels leave it.
        right, low = self.x - self.heart_middle[0], (self.y - self.heart_middle[1]) / self.heart_half[1]
        egg = half * (0.74 + 0.26 * np.clip(low + 0.5, -1, 1))
        far = np.hypot((right - 0.30 * half * low) / egg, low + 0.12 * right / half)
        self.heart: Layer = ramp(1 - far, 0.12)
        shoulder = 0.11 + 1.2 * np.maximum(self.y - 0.06, 0) ** 0.6
        flank = chest.width + chest.wall + 0.02 + 0.30 * ramp(0.33 - self.y, 0.22)
        self.body: Layer = ramp(np.minimum(shoulder, flank) - self.out, 0.025)

    def wall(self, down: float) -> float:
        """Return the distance from the spine to the lung's side wall at height `down` (0..1)."""
        return float(np.interp(down, self.down[:, 0], self.outer[:, 0]))

    def at(self, side: int, out: float, down: float) -> tuple[float, float]:
        """Return x and y of the point `out` (0 spine, 1 side wall) across and `down` a lung."""
        chest = self.chest
        y = chest.apex + down * (chest.base - chest.apex)
        return chest.middle + chest.tilt * (y - 0.5) + side * out * self.wall(down), y


def draw_chest(plane: Plane, rng: np.random.Generator) -> Layer:
    """Return gray values 0..1 of a chest without findings, float32 [pixels, pixels]."""
    chest, out, y = plane.chest, plane.out, plane.y
    # Soft tissue: the mediastinum, the belly and what the lungs leave.
    broad = 0.065 + 0.018 * np.sin(11 * y + chest.phase) + 0.02 * ramp(0.22 - plane.down, 0.2)
    centre = ramp(broad - out, 0.04) * ramp(y - chest.apex - 0.02, 0.2)
    knob = ramp(0.035 - np.hypot(plane.across - 0.06, (plane.down - 0.24) / 1.4), 0.02)
    solid = np.maximum(np.maximum(plane.heart * 0.86, centre * 0.85), knob * 0.7)
    belly = ramp(y - plane.diaphragm, 0.10) * ramp(plane.outer + 0.02 - out, 0.06)
    soft = 0.64 + 0.12 * belly + 0.08 * solid - 0.10 * ramp(0.12 - y, 0.2) + 0.03 * cloud(6, plane.pixels, rng)
    lungs = plane.lungs * (1 - solid)
    image = soft - chest.air * lungs * (0.88 + 0.12 * ramp(0.6 - plane.down, 1.0))
    image = image + _bones(plane) + lungs * _vessels(plane, rng)
    if chest.breasts:
        breast = np.hypot(out - 0.62 * chest.width, 1.1 * (plane.down - 0.80) * (chest.base - chest.apex))
        image = image + chest.breasts * ramp(0.15 - breast, 0.06) * (1 - 0.5 * belly)
    image = image * plane.body + 0.03
    # The side marker, which a flip of the image flips too.
    stem = (np.abs(plane.x - 0.93) < 0.006) & (np.abs(y - 0.07) < 0.025)
    foot = (np.abs(plane.x - 0.938) < 0.014) & (np.abs(y - 0.09) < 0.005)
    marked: Layer = np.where(stem | foot, 0.95, image).astype(np.float32)
    return marked


def _bones(plane: Plane) -> Layer:
    chest, out, y = plane.chest, plane.out, plane.y
    across = out / chest.width
    back = (y + 0.11 * np.sin(2.6 * across + 0.5) - 0.16 * across**2) / chest.spacing
    front = (y + 0.16 * across**1.5) / (1.15 * chest.spacing)
    cage = ramp(plane.outer + 0.02 - out, 0.03) * ramp(out - 0.05, 0.04) * ramp(plane.down + 0.03, 0.06)
    cage = cage * ramp(plane.diaphragm + 0.06 - y, 0.12) * (1 - 0.6 * plane.heart)
    turn = 2 * np.pi
    ribs = 0.042 * np.cos(turn * (back + chest.phase)) + 0.018 * np.cos(turn * front) * ramp(across - 0.35, 0.3)
    spine = ramp(0.040 - out, 0.015) * (0.06 + 0.025 * np.cos(turn * y / 0.055))
    trachea = ramp(0.018 - out, 0.012) * ramp(chest.apex + 0.20 - y, 0.08)
    collar = y - chest.apex - 0.055 + 0.11 * out + 0.03 * np.sin(8 * out)
    collar = 0.10 * ridge(collar, 0.016) * ramp(out - 0.045, 0.02) * ramp(0.46 - out, 0.1)
    blade = 0.06 * ramp(0.10 - np.hypot(out - chest.width - 0.05, (y - chest.apex - 0.13) / 1.6), 0.05)
    bones: Layer = cage * ribs + spine - 0.07 * trachea + collar + blade
    return bones


def _vessels(plane: Plane, rng: np.random.Generator) -> Layer:
    """Return the hila and the markings that fan out from them, thinner and fainter outward."""
    down = (plane.down - 0.47) * (plane.chest.base - plane.chest.apex)
    out = plane.out - 0.07
    far = np.hypot(out, down)
    angle = np.arctan2(down, out + 0.02) + 0.16 * cloud(18, plane.pixels, rng)
    fan = rng.random(128, dtype=np.float32) ** 3
    # Two lungs, two fans: the left one reads the table 64 places on.
    place = (angle + np.pi) * (63 / (2 * np.pi)) + np.where(plane.across < 0, 0, 64)
    lines = np.interp(place.clip(0, 127), np.arange(128), fan).astype(np.float32)
    fine = cloud(56, plane.pixels, rng) * 0.014 + cloud(20, plane.pixels, rng) * 0.014
    markings: Layer = 0.18 * lines * np.exp(-far / 0.16) + 0.12 * np.exp(-((far / 0.06) ** 2)) + fine
    return markings
