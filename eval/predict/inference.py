"""A trained model over one split, in float32 without TF32; needs torch."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

from eval.predict.predictions import Predictions
from loaders import LoaderSpec, streaming_loader
from models import Classifier
from shards.console import progress_bar
from shards.errors import BadData, ResourceMissing
from shards.folder import ShardFolder


def predict(
    model: Classifier, shards: ShardFolder, split: str, device: torch.device, batch_size: int, *, tta: bool = False
) -> Predictions:
    """Return the model's probabilities for every image of a split, each exactly once.

    With `tta` a probability is the mean of the image's and its mirror's (left to right). The model runs in float32
    whatever it was trained in, without TF32 on a GPU: a bfloat16 logit has 8 significant bits, so many images would
    tie. Raises BadData for a split without images, or where an output is NaN or infinite; ResourceMissing where the
    device has too little memory.
    """
    if not shards.manifest.splits[split].images:
        raise BadData(f"the split {split} of {shards.path} has no image to score")
    try:
        with full_precision():
            rows, labels, probabilities = _run(model.to(device).eval(), shards, split, device, batch_size, tta)
    except torch.OutOfMemoryError as error:
        raise ResourceMissing(f"the device is out of memory; try --batch-size {max(batch_size // 2, 1)}") from error
    if not np.isfinite(probabilities).all():
        raise BadData(f"the model's outputs on {split} are not all numbers; it cannot be scored")
    patients = shards.entries.loc[rows]["patient"].to_numpy(dtype=np.int64)
    return Predictions(rows, labels, probabilities, patients)


@torch.inference_mode()
def probabilities_of(model: Classifier, images: torch.Tensor, *, tta: bool) -> torch.Tensor:
    """Return float32 [N, F], 0..1, of uint8 [N, 1, S, S] on the model's device; with `tta` as `predict`."""
    predicted: torch.Tensor = model(images).float().sigmoid()
    if tta:
        predicted = (predicted + model(images.flip(-1)).float().sigmoid()) / 2
    return predicted


def _run(
    model: Classifier, shards: ShardFolder, split: str, device: torch.device, batch_size: int, tta: bool
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    rows, labels, probabilities = [], [], []
    spec = LoaderSpec(shards, split, batch_size, device, training=False)
    with streaming_loader(spec) as loader, progress_bar(loader.samples, f"predicting {split}", "img") as bar:
        for batch in loader:
            probabilities.append(probabilities_of(model, batch.images, tta=tta))
            rows.append(batch.rows)
            labels.append(batch.labels)
            bar.update(len(batch.rows))
    return torch.cat(rows).cpu().numpy(), torch.cat(labels).cpu().numpy(), torch.cat(probabilities).cpu().numpy()


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply and convolve float32 with all its 24 bits while inside; then restore torch's settings.

    TF32 keeps 11 of them. cuDNN convolves in it by default (`torch.backends.cudnn.allow_tf32`), and training allows it
    for matrix products, too. The settings are the process's, so no other thread should compute meanwhile.
    """
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions
