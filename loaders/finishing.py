"""The last step of every loader: decoded images are mirrored, augmented and laid out as a batch."""

import torch

from loaders.augment import distort
from loaders.batch import Batch
from loaders.schedule import Slot
from loaders.spec import LoaderSpec

# Images mirrored at once on a CPU: the mirrors stay in the cache until they are copied.
_AT_ONCE = 8


def finish(
    images: torch.Tensor,
    labels: torch.Tensor,
    rows: torch.Tensor,
    slot: Slot,
    spec: LoaderSpec,
    into: torch.Tensor | None = None,
) -> Batch:
    """Return the batch of a slot from its decoded images, uint8 [n, S, S], their labels and rows.

    What is not on the spec's device yet is brought there without waiting for it. The batch is made
    `into` a tensor of the images' shape on the spec's device, and the images are left as they are: their
    memory may belong to a decoder. Without it they are the caller's, and are mirrored where they are.
    """
    device = spec.device
    images = images.to(device, non_blocking=True)
    if spec.flip == "both":
        images = torch.cat([images, images.flip(-1)])
        labels, rows = labels.repeat(2, 1), rows.repeat(2)
    else:
        # A flip of whole images is vectorised, a choice for each image is not: half the batch in one
        # piece takes 0.2 ms of a core for 128 images, torch.where over all of them 1.0.
        result = images if into is None else into
        at_once = _AT_ONCE if device.type == "cpu" else len(images)
        for start in range(0, slot.mirrored, at_once):
            few = slice(start, min(start + at_once, slot.mirrored))
            result[few] = images[few].flip(-1)
        if into is not None:
            into[slot.mirrored :] = images[slot.mirrored :]
        images = result
    if slot.distortions is not None:
        images = distort(images, slot.distortions)
    # [n, 1, S, S] with strides that torch takes for channels-last as well as contiguous.
    return Batch(
        images[..., None].permute(0, 3, 1, 2),
        labels.to(device, non_blocking=True),
        rows.to(device, non_blocking=True),
    )
