"""Everything that can be set about a run, in one record: each field is an option of the command line."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import click

from loaders import LOADERS, Flip
from models import FREEZES, has_imagenet_weights, known_archs
from trainer.devices import DEVICE_CHOICES
from trainer.losses import POS_WEIGHTS


def _option(default: Any, kind: Any, text: str, unit: str | None = None, *, identity: bool = True) -> Any:
    # identity: a run resumes only with the same value.
    meta = {"type": kind, "help": text, "metavar": unit, "identity": identity}
    return dataclasses.field(default=default, metadata=meta)


@dataclass(frozen=True)
class TrainConfig:
    """One run. The fields' metadata holds each option's type, unit and help text."""

    arch: str = _option("resnet50", click.Choice(known_archs()), "Architecture.")
    shards: Path = _option(
        Path("data/shards"), click.Path(path_type=Path), "Folder of packed shards.", "FOLDER", identity=False
    )
    runs: Path = _option(
        Path("runs"), click.Path(path_type=Path), "Folder that holds the runs.", "FOLDER", identity=False
    )
    name: str = _option(
        "", str, "Of the run.  [default: the arch, with the freezing if any]", "NAME", identity=False
    )
    weights: str = _option(
        "auto", str, "Start from ImageNet weights, from none, or from a .pth or .safetensors file; "
        "auto: imagenet, where the arch has such weights.", "auto|imagenet|none|FILE",
    )  # fmt: skip
    freeze: str = _option(
        "none", click.Choice(FREEZES), "partial trains the last stage and the head, backbone the head only."
    )
    loader: str = _option("auto", click.Choice(list(LOADERS)), "Where batches come from; auto: dali.")
    flip: Flip = _option(
        "random",
        click.Choice(get_args(Flip)),
        "Mirror images left to right; both: each image and its mirror in every epoch.",
    )
    batch_size: int = _option(64, click.IntRange(1), "Images a step.", "IMAGES")
    epochs: int = _option(20, click.IntRange(1), "At most so many passes over train.", "N")
    patience: int = _option(
        1,
        click.IntRange(0),
        "Stop after so many epochs in a row without a lower val loss; 0: never.",
        "EPOCHS",
    )
    lr: float = _option(1e-4, click.FloatRange(0, min_open=True), "Learning rate of Adam.", "RATE")
    weight_decay: float = _option(
        1e-5, click.FloatRange(0), "L2 penalty in Adam's gradient; 0: off.", "FACTOR"
    )
    pos_weight: str = _option(
        "none",
        click.Choice(POS_WEIGHTS),
        "Weight of a finding's positives in the loss, from negatives/positives in train.",
    )
    precision: str = _option(
        "auto", click.Choice(["auto", "fp32", "bf16", "fp16"]),
        "auto: fp16 on a GPU; on a CPU bf16 where it has instructions for it, else fp32.",
    )  # fmt: skip
    device: str = _option("auto", str, "auto: the first GPU if there is one.", DEVICE_CHOICES)
    seed: int = _option(0, click.IntRange(0), "Of weights, order, flips and dropout.", "N")
    threads: int = _option(0, click.IntRange(0), "Decoding threads; 0: one a core.", "N", identity=False)
    log_every: int = _option(
        50, click.IntRange(1), "Steps between two lines of metrics.jsonl.", "STEPS", identity=False
    )

    @property
    def run_name(self) -> str:
        """The name given, or the one that follows from arch and freezing."""
        return self.name or (self.arch if self.freeze == "none" else f"{self.arch}-{self.freeze}")

    @property
    def start_weights(self) -> str:
        """`weights` with auto resolved for the arch."""
        if self.weights != "auto":
            return self.weights
        return "imagenet" if has_imagenet_weights(self.arch) else "none"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            key: str(value) if isinstance(value, Path) else value
            for key, value in dataclasses.asdict(self).items()
        }

    def identity(self) -> dict[str, Any]:
        """Return the fields that a run must keep to be resumed."""
        kept = {field.name for field in dataclasses.fields(self) if field.metadata["identity"]}
        return {key: value for key, value in self.to_json().items() if key in kept}
