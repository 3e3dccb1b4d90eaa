"""Back to where a step began: what its batches change before the weights do."""

from typing import Any

import torch

from loaders import Loader
from models import Classifier
from trainer.optimization.averaging import trained_names
from trainer.step import Counters


class StepStart:
    """What the batches of a step that is not taken yet have changed, as it was before them.

    That is running statistics, the sum of losses, torch's random states and the place in train: a run
    stopped within a step is saved as of its start, and trains all of its batches again. Weights, optimizer
    and average change only when the step is taken. Noting costs a copy of these and waits for nothing.
    """

    def __init__(self, model: Classifier, counters: Counters, loader: Loader, device: torch.device) -> None:
        trained = trained_names(model)
        changing = [buffer for name, buffer in model.named_buffers() if name in trained]
        changing.append(counters.loss_sum)
        # By type, since copying many at once is fast for those of one type only.
        types = {tensor.dtype for tensor in changing}
        self._changing = [[tensor for tensor in changing if tensor.dtype == dtype] for dtype in types]
        self._copies = [[tensor.clone() for tensor in group] for group in self._changing]
        self._loader = loader
        self._device = device
        self._place: dict[str, Any] = {}
        self._images = 0
        self.note(0)

    @torch.no_grad()
    def note(self, images: int) -> None:
        """A step begins here, after so many images of the epoch."""
        self._images = images
        self._place = self._loader.state_dict()
        self._random = torch.get_rng_state()
        if self._device.type == "cuda":
            self._random_of_gpu = torch.cuda.get_rng_state(self._device)
        for copies, group in zip(self._copies, self._changing, strict=True):
            torch._foreach_copy_(copies, group)

    @torch.no_grad()
    def go_back(self) -> int:
        """Make everything as it was when the step began; return the images of the epoch before it."""
        for copies, group in zip(self._copies, self._changing, strict=True):
            torch._foreach_copy_(group, copies)
        self._loader.load_state_dict(self._place)
        torch.set_rng_state(self._random)
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(self._random_of_gpu, self._device)
        return self._images
