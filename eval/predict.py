"""A trained model over one split: the one place of this room that needs torch."""

import numpy as np
import torch

from eval.predictions import Predictions
from loaders import LoaderSpec, streaming_loader
from models import Classifier
from shards.errors import BadData
from shards.folder import ShardFolder
from shards.progress import progress_bar


@torch.inference_mode()
def predict(
    model: Classifier, shards: ShardFolder, split: str, device: torch.device, batch_size: int
) -> Predictions:
    """Return the model's probabilities for every image of a split, each exactly once.

    The model runs in float32 whatever it was trained in: a bfloat16 logit has 8 significant
    bits, so that many images would tie. Raises BadData for a split without images, or
    where the model gives anything but a probability.
    """
    if not shards.manifest.splits[split].images:
        raise BadData(f"the split {split} of {shards.path} has no image to score")
    model.to(device).eval()
    rows, labels, probabilities = [], [], []
    spec = LoaderSpec(shards, split, batch_size, device, training=False)
    with (
        streaming_loader(spec) as loader,
        progress_bar(loader.samples, f"predicting {split}", "img") as bar,
    ):
        for batch in loader:
            probabilities.append(model(batch.images).float().sigmoid())
            rows.append(batch.rows)
            labels.append(batch.labels)
            bar.update(len(batch.rows))
    result = Predictions(*(torch.cat(parts).cpu().numpy() for parts in (rows, labels, probabilities)))
    if not np.isfinite(result.probabilities).all():
        raise BadData(f"the model's outputs on {split} are not all numbers; it cannot be scored")
    return result
