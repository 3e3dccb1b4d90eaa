"""What every loader yields."""

from typing import NamedTuple

import torch


class Batch(NamedTuple):
    """N samples on the target device, flipped but not normalised."""

    images: torch.Tensor
    """uint8 [N, 1, S, S], channels-last, gray levels 0..255."""
    labels: torch.Tensor
    """uint8 [N, 14] in FINDINGS order, 0 or 1."""
    rows: torch.Tensor
    """int32 [N]: the row of each sample in entries.csv."""
