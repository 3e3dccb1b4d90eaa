"""One optimizer step: batches in, the weights changed once, without waiting for the device."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
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
        """The first step, from 1, whose loss was NaN or infinite, or without loss scaling its gradient; 0: none."""
        self.grad_norm = torch.zeros((), device=device)
        """L2 norm of the last step's gradient over all weights, unscaled, before clipping."""


@dataclass
class Step:
    """Changes the weights once for a group of batches.

    The loss of a group is the mean over its images, whatever the sizes of its batches. Nothing here waits for the
    device.
    """

    forward: Callable[[Tensor], Tensor]
    loss: nn.Module
    optimizer: torch.optim.Optimizer
    rate: Callable[[Tensor], Tensor]
    """The learning rate after the number of steps applied so far: a step that fp16 skips does not advance it."""
    stats: StepStats
    autocast: Callable[[], AbstractContextManager[None]]
    scaler: torch.amp.GradScaler
    clip: float = 0.0
    """The largest L2 norm of the gradient; 0: any."""
    ema: EMA | None = None
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext
    """The context in which ranks exchange no gradients."""

    def __post_init__(self) -> None:
        self._trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self._finite = torch.ones((), dtype=torch.bool, device=self.stats.applied.device)

    def backward(self, images: Tensor, labels: Tensor, share: float, *, more: bool = False) -> None:
        """Add the gradients of one batch, which holds this share of the group's images, 0..1.

        With several ranks the share is multiplied by their number, since DDP takes the mean of their
        gradients; with `more`, batches of the group follow and the ranks need not synchronize yet. With a share of 0 a
        batch adds nothing, but lets this rank take part.
        """
        with self.no_sync() if more else nullcontext():
            with self.autocast():
                logits = self.forward(images).float()
            loss = self.loss(logits, labels.float())
            self.scaler.scale(loss * share).backward()
        loss = loss.detach()
        self._finite = self._finite & loss.isfinite()
        if share:
            self.stats.loss_sum += loss * len(images)

    @torch.no_grad()
    def optimizer_step(self, number: int) -> None:
        """Change the weights by the gradients added since the last call; this is step `number`, from 1."""
        stats, scaled = self.stats, self.scaler.is_enabled()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([parameter.grad for parameter in self._trained if parameter.grad is not None])
        if self.clip:
            nn.utils.clip_grads_with_norm_(self._trained, self.clip, norm)
        finite = norm.isfinite()
        rate = self.rate(stats.applied).float()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        # Under fp16 an infinite gradient is no fault: the scaler skips the step and lowers its scale.
        good = self._finite if scaled else self._finite & finite
        stats.first_bad = torch.where((stats.first_bad == 0) & ~good, number, stats.first_bad)
        stats.applied += finite if scaled else 1
        if scaled:
            stats.skipped += ~finite
        stats.grad_norm = norm.float()
        self._finite = torch.ones_like(self._finite)
        if self.ema is not None:
            self.ema.update(number)
