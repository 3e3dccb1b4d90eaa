"""ViT-B/16 as torchvision has it, with one logit per finding, at any size that its patches tile."""

from collections import OrderedDict

import torchvision
from torch import Tensor, nn
from torchvision.models import ViT_B_16_Weights
from torchvision.models.vision_transformer import interpolate_embeddings

from models.classifier import State
from models.registry import register

PATCH = 16


class ClassToken(nn.Module):
    """Picks the token that the head classifies: [N, tokens, F] -> [N, F]."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the first token of each image."""
        return tokens[:, 0]


def _convert_state_dict(state: State, size: int) -> State:
    """Return a file's state dict with current names, its positional embedding interpolated to the size."""
    # The published file is older than torchvision's present MLP block (pytorch/vision#6053).
    renamed = {
        name.replace(".mlp.linear_1.", ".mlp.0.").replace(".mlp.linear_2.", ".mlp.3."): tensor
        for name, tensor in state.items()
    }
    positions = renamed.get("encoder.pos_embedding")
    if positions is None or positions.dim() != 3:
        return renamed  # not a ViT: the comparison of names and shapes reports it better
    return dict(interpolate_embeddings(size, PATCH, OrderedDict(renamed)))


@register(
    head="heads",
    last_stage=("encoder.layers.encoder_layer_11", "encoder.ln"),
    pooling=(ClassToken(),),
    # What the last attention is given: the head reads the class token alone, so that the block's output at
    # the patches has no gradient.
    heatmap_layers=("encoder.layers.encoder_layer_11.ln_1",),
    imagenet=ViT_B_16_Weights.IMAGENET1K_V1,
    convert_state_dict=_convert_state_dict,
)
def vit_b_16(findings: int, size: int) -> nn.Module:
    """Make the network of Dosovitskiy et al., An Image is Worth 16x16 Words, arXiv:2010.11929.

    The head starts at zero (torchvision's choice, and the paper's), so every first logit is 0.
    """
    if size < PATCH or size % PATCH:
        raise ValueError(f"vit_b_16 takes images of a multiple of {PATCH} px, got {size}")
    network: nn.Module = torchvision.models.vit_b_16(num_classes=findings, image_size=size)
    return network
