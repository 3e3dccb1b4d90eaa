"""A trained model over one split, images as they are or averaged with their mirrors; needs torch."""

import numpy as np
import torch

from eval.predicting.full_precision import full_precision
from eval.predicting.predictions import Predictions
from loaders import LoaderSpec, streaming_loader
from models import Classifier
from shards.errors import BadData, ResourceMissing
from shards.folder import ShardFolder
from shards.progress import progress_bar


def predict(
    model: Classifier,
    shards: ShardFolder,
    split: str,
    device: torch.device,
    batch_size: int,
    *,
    tta: bool = False,
) -> Predictions:
    """Return the model's probabilities for every image of a split, each exactly once.

    With `tta` a probability is the mean of the image's and its mirror's (left to right). The model
    runs in float32 whatever it was trained in, without TF32 on a GPU: a bfloat16 logit has 8
    significant bits, so that many images would tie. Raises BadData for a split without images, or
    where the model gives anything but a probability; ResourceMissing where the device has too little
    memory.
    """
    if not shards.manifest.splits[split].images:
        raise BadData(f"the split {split} of {shards.path} has no image to score")
    try:
        with full_precision():
            rows, labels, probabilities = _run(
                model.to(device).eval(), shards, split, device, batch_size, tta
            )
    except torch.OutOfMemoryError as error:
        raise ResourceMissing(
            f"the device is out of memory; try --batch-size {max(batch_size // 2, 1)}"
        ) from error
    result = Predictions(
        rows.cpu().numpy(),
        labels.cpu().numpy(),
        probabilities.cpu().numpy(),
        shards.entries.loc[rows.cpu().numpy()]["patient"].to_numpy(dtype=np.int64),
    )
    if not np.isfinite(result.probabilities).all():
        raise BadData(f"the model's outputs on {split} are not all numbers; it cannot be scored")
    return result


@torch.inference_mode()
def probabilities_of(model: Classifier, images: torch.Tensor, *, tta: bool) -> torch.Tensor:
    """Return float32 [N, 14], 0..1, of uint8 [N, 1, S, S] on the model's device; with `tta` as `predict`."""
    predicted: torch.Tensor = model(images).float().sigmoid()
    if tta:
        predicted = (predicted + model(images.flip(-1)).float().sigmoid()) / 2
    return predicted


def _run(
    model: Classifier, shards: ShardFolder, split: str, device: torch.device, batch_size: int, tta: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, labels, probabilities = [], [], []
    spec = LoaderSpec(shards, split, batch_size, device, training=False)
    with (
        streaming_loader(spec) as loader,
        progress_bar(loader.samples, f"predicting {split}", "img") as bar,
    ):
        for batch in loader:
            probabilities.append(probabilities_of(model, batch.images, tta=tta))
            rows.append(batch.rows)
            labels.append(batch.labels)
            bar.update(len(batch.rows))
    return torch.cat(rows), torch.cat(labels), torch.cat(probabilities)
