"""One optimizer step: batches in, the weights changed once, without waiting for the device."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from trainer.optim.ema import EMA


class StepStats:
    """Running sums and counts as scalars on the device, so that counting does not wait for it."""

    def __init__(self, device: torch.device) -> None:
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        """Of this epoch, over images."""
        self.applied = torch.zeros((), dtype=torch.int64, device=device)
        """Steps that changed the weights, over all epochs."""
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        """Steps that did not, since the gradient overflowed in fp16; over all epochs."""
        self.first_bad = torch.zeros((), dtype=torch.int64, device=device)
        """The first step, from 1, whose loss was NaN or infinite, or without loss scaling its gradient; 0:
        none."""
        self.grad_norm = torch.zeros((), device=device)
        """L2 norm of the last step's gradient over all weights, unscaled, before clipping."""


class Step:
    """Changes the weights once for a group of batches.

    The loss of a group is the mean over its images, whatever the sizes of its batches. `rate` gives the
    learning rate after the number of steps applied so far: a step that fp16 skips does not advance it.
    Nothing here waits for the device. `no_sync` gives the context in which ranks exchange no gradients.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        loss: nn.Module,
        optimizer: torch.optim.Optimizer,
        rate: Callable[[Tensor], Tensor],
        stats: StepStats,
        autocast: Callable[[], AbstractContextManager[None]],
        scaler: torch.amp.GradScaler,
        clip: float = 0.0,
        ema: EMA | None = None,
        no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._forward = forward
        self._loss = loss
        self._optimizer = optimizer
        self._rate = rate
        self._stats = stats
        self._autocast = autocast
        self._scaler = scaler
        self._clip = clip
        self._ema = ema
        self._no_sync = no_sync
        self._trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._finite = torch.ones((), dtype=torch.bool, device=stats.applied.device)

    def backward(self, images: Tensor, labels: Tensor, share: float, *, more: bool = False) -> None:
        """Add the gradients of one batch, which holds this share of the group's images, 0..1.

        With several ranks the share is multiplied by their number, since DDP takes the mean of their
        gradients; with `more`, batches of the group follow and the ranks need not synchronize yet. An empty
        batch adds nothing, but lets this rank take part.
        """
        with self._no_sync() if more else nullcontext():
            with self._autocast():
                logits = self._forward(images).float()
            # The mean over no images is NaN.
            loss = self._loss(logits, labels.float()) if len(images) else logits.sum()
            self._scaler.scale(loss * share).backward()
        loss = loss.detach()
        self._finite = self._finite & loss.isfinite()
        self._stats.loss_sum += loss * len(images)

    @torch.no_grad()
    def optimizer_step(self, number: int) -> None:
        """Change the weights by the gradients added since the last call; this is step `number`, from 1."""
        stats, scaled = self._stats, self._scaler.is_enabled()
        self._scaler.unscale_(self._optimizer)
        gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self._clip:
            nn.utils.clip_grads_with_norm_(self._trained, self._clip, norm)
        finite = norm.isfinite()
        rate = self._rate(stats.applied).float()
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        # Under fp16 an infinite gradient is no fault: the scaler skips the step and lowers its scale.
        good = self._finite if scaled else self._finite & finite
        stats.first_bad = torch.where((stats.first_bad == 0) & ~good, number, stats.first_bad)
        stats.applied += finite if scaled else 1
        if scaled:
            stats.skipped += ~finite
        stats.grad_norm = norm.float()
        self._finite = torch.ones_like(self._finite)
        if self._ema is not None:
            self._ema.update(number)
