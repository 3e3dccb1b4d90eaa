"""Several runs as one model: the mean of their probabilities, where they are of the same images."""

from collections.abc import Sequence

import numpy as np

from eval.predicting.predictions import Predictions
from eval.several.same_images import Images, require_same_images
from shards.folder import ShardFolder

Named = tuple[str, ShardFolder, Predictions]
"""The name of a run, the shards it was scored on, and its predictions on one split of them."""


def average(members: Sequence[Named], split: str) -> Predictions:
    """Return the mean of the members' probabilities, with the rows of the first member's shards.

    The mean is taken in float64 and rounded to float32, which all predictions are. Raises BadData as
    `require_same_images` does.
    """
    require_same_images([Images.of_predictions(*member) for member in members], split)
    _, _, first = members[0]
    total = sum(predictions.probabilities.astype(np.float64) for _, _, predictions in members)
    mean = np.asarray(total / len(members), dtype=np.float32)
    return Predictions(first.rows, first.labels, mean, first.patients)
