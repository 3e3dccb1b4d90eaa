"""Augmentation beyond the flip: small random affine and gray-level changes, batched on the device.

Every image has its own rotation, shift, scale, brightness and contrast, drawn from (seed,
epoch) by the sampler, so all loaders distort alike and a resume continues with the same bits.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from loaders.spec import Augment

PARAMETERS = 6
"""Per image: angle, horizontal shift, vertical shift, scale, brightness, contrast."""

_CHUNK = 8  # images, on a CPU


@dataclass(frozen=True)
class Range:
    """Each parameter is uniform between minus and plus its bound (scale and contrast: around 1)."""

    degrees: float
    shift: float
    """Share of the image's side."""
    scale: float
    brightness: float
    """Share of the 255 gray levels."""
    contrast: float

    def bounds(self) -> npt.NDArray[np.float32]:
        """Return float32 [PARAMETERS]."""
        radians = math.radians(self.degrees)
        bounds = [radians, self.shift, self.shift, self.scale, self.brightness, self.contrast]
        return np.array(bounds, dtype=np.float32)


# light stays within what differs between two takes of one patient; strong is what CheXpert's and
# NIH's better published recipes use at most (rotations of 10 to 20 degrees, scales of 0.8 to 1.2).
RANGES: dict[Augment, Range] = {
    "light": Range(degrees=5, shift=0.03, scale=0.05, brightness=0.05, contrast=0.1),
    "strong": Range(degrees=15, shift=0.08, scale=0.15, brightness=0.15, contrast=0.25),
}


def draw(images: int, augment: Augment, generator: np.random.Generator) -> npt.NDArray[np.float32]:
    """Return float32 [images, PARAMETERS], drawn for this strength."""
    centred = generator.random((images, PARAMETERS), dtype=np.float32) * 2 - 1
    return (centred * RANGES[augment].bounds()).astype(np.float32, copy=False)


def distort(images: torch.Tensor, parameters: npt.NDArray[np.float32]) -> torch.Tensor:
    """Return uint8 [N, S, S] distorted by float32 [N, PARAMETERS], on the images' device.

    Bilinear; what comes from outside the image is black. Gray levels become
    (x - 127.5) * (1 + contrast) + 127.5 + 255 * brightness, rounded and cut off at 0 and 255.
    """
    drawn = torch.from_numpy(parameters).to(images.device, non_blocking=True)
    if images.device.type != "cpu":
        return _distort(images, drawn)
    # A few at a time: what lies between the steps then stays in the cache, and is 4 times as fast.
    result = torch.empty_like(images)
    for start in range(0, len(images), _CHUNK):
        few = slice(start, start + _CHUNK)
        result[few] = _distort(images[few], drawn[few])
    return result


def _distort(images: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    angle, right, down, scale, brightness, contrast = drawn[:, :, None, None].unbind(1)
    # Each coordinate of the result, from -1 to 1, is looked up in the source: the inverse transform.
    # F.affine_grid does the same as a product of matrices, in 140 instead of 45 microseconds an image.
    side = images.shape[-1]
    coordinates = torch.linspace(1 / side - 1, 1 - 1 / side, side, device=images.device)
    cos, sin = torch.cos(angle) / (1 + scale), torch.sin(angle) / (1 + scale)
    across, along = coordinates[None, None, :], coordinates[None, :, None]
    grid = torch.stack([cos * across + (sin * along - 2 * right), cos * along - (sin * across + 2 * down)], dim=-1)
    moved = F.grid_sample(images[:, None].float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    levels = moved[:, 0].mul_(1 + contrast).add_(255 * brightness - 127.5 * contrast)
    return levels.round_().clamp_(0, 255).to(torch.uint8)
