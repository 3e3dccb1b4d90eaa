"""The last step of every loader: decoded images are mirrored, augmented and laid out as a batch."""

import torch

from loaders.augment import distort
from loaders.batch import Batch
from loaders.buffers import HostBuffers
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
    buffers: HostBuffers | None = None,
) -> Batch:
    """Return the batch of a slot from its decoded images, uint8 [n, S, S], their labels and rows.

    The images are copied, never changed: their memory may belong to a decoder. They stay on the device
    they are on; what is not on the spec's device yet is brought there without waiting for it. A
    batch on the host is made in one of the `buffers`, if there are any.
    """
    device = spec.device
    images = images.to(device, non_blocking=True)
    if spec.flip == "both":
        images = torch.cat([images, images.flip(-1)])
        labels, rows = labels.repeat(2, 1), rows.repeat(2)
    else:
        # A flip of whole images is vectorised, a choice for each image is not: half the batch in one
        # piece takes 0.2 ms of a core for 128 images, torch.where over all of them 1.0.
        on_host = images.device.type == "cpu"
        copy = buffers.like(images) if buffers and on_host else torch.empty_like(images)
        at_once = _AT_ONCE if on_host else len(images)
        for start in range(0, slot.mirrored, at_once):
            few = slice(start, min(start + at_once, slot.mirrored))
            copy[few] = images[few].flip(-1)
        copy[slot.mirrored :] = images[slot.mirrored :]
        images = copy
    if slot.distortions is not None:
        images = distort(images, slot.distortions)
    # [n, 1, S, S] with strides that torch takes for channels-last as well as contiguous.
    return Batch(
        images[..., None].permute(0, 3, 1, 2),
        labels.to(device, non_blocking=True),
        rows.to(device, non_blocking=True),
    )
