"""The optimizer over the parameters that are not frozen."""

import torch

from trainer.config import TrainConfig


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return Adam (Kingma and Ba, 2015) with an L2 penalty in the gradient, as one fused kernel."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.Adam(trainable, lr=config.lr, weight_decay=config.weight_decay, fused=True)
