"""The options of a run as one record: each field is an option of the command line. Nothing here imports torch."""

import dataclasses
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shards.console import PATH, SEED, FiniteRange
from shards.errors import BadData
from trainer.devices import DEVICE_CHOICES
from trainer.logging.loggers import LOGGERS
from trainer.run_directory import require_plain_name

if TYPE_CHECKING:  # they import torch
    from loaders import Augment, Flip

# tests/trainer/test_choices.py holds each of these to its registry, which imports torch: that takes seconds.
ARCHS = ("custom_cnn", "resnet50", "vit_b_16")
FREEZES = ("none", "partial", "backbone")
LOADERS = ("auto", "dali", "resident", "webdataset", "dataloader", "synthetic")
FLIPS = ("none", "random", "both")
AUGMENTS = ("none", "light", "strong")
OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("constant", "cosine", "onecycle")
LOSSES = ("bce", "focal", "asymmetric")
POS_WEIGHTS = ("none", "log", "sqrt", "ratio", "effective")

_SWITCH = ("auto", "on", "off")
SWEPT = ("lr", "weight-decay")
"""The options that a sweep can vary."""
_MOST_POINTS = 10_000  # heads of one sweep: at a second each, hours


def _option(
    default: Any, kind: Any, text: str, unit: str | None = None, *, identity: bool = True, flag: str = ""
) -> Any:
    # kind: a type of click's, or the names to choose from. identity: a run resumes only with the same value
    # (False also for --threads, see trainer.logging.checkpoints).
    # flag: the spelling on the command line, if it is not that of the field, which then is a hidden alias.
    kind = click.Choice(kind) if isinstance(kind, tuple) else kind
    meta = {"type": kind, "help": text, "metavar": unit, "identity": identity, "flag": flag}
    return dataclasses.field(default=default, metadata=meta)


@dataclass(frozen=True)
class TrainConfig:
    """One run. The fields' metadata holds each option's type, unit and help text.

    To add an option, add a field here and use it: the command line, CXRAPID_NAME, --config files, config.json and
    --dry-run follow, and a run older than the option resumes as long as the option has its default. Checks of two
    options together are in __post_init__.
    """

    arch: str = _option("resnet50", ARCHS, "Architecture.")
    shards: Path = _option(Path("data/shards"), PATH, "Folder of packed shards.", "FOLDER", identity=False)
    runs: Path = _option(Path("runs"), PATH, "Folder that holds the runs.", "FOLDER", identity=False)
    name: str = _option("", str, "Of the run.  [default: the arch, with the freezing if any]", "NAME", identity=False)
    weights: str = _option(
        "auto",
        str,
        "Initial weights: ImageNet, none, or a .pth or .safetensors file; auto: imagenet if the arch has such weights.",
        "auto|imagenet|none|FILE",
    )
    freeze: str = _option("none", FREEZES, "partial trains the last stage and the head, backbone the head only.")
    cache: str = _option(
        "auto",
        _SWITCH,
        "Run the frozen part once and train on its output, kept in memory; "
        "auto: with --freeze, if it fits and images are not augmented; off: run it in every epoch.",
    )
    loader: str = _option(
        "auto", LOADERS, "Data loader; auto: resident if the decoded split fits in memory, else dali."
    )
    flip: "Flip" = _option(
        "random", FLIPS, "Mirror images left to right; both: each image and its mirror in every epoch."
    )
    augment: "Augment" = _option(
        "none", AUGMENTS, "Small random rotations, shifts, scales, brightness and contrast of train images."
    )
    batch_size: int = _option(64, click.IntRange(1, 2**20), "Images per batch, of all ranks together.", "IMAGES")
    accumulate: int = _option(
        1,
        click.IntRange(1, 2**20),
        "Batches per step, whose gradients are added up.",
        "BATCHES",
        flag="grad-accum-steps",
    )
    epochs: int = _option(20, click.IntRange(1, 1_000_000), "Maximum number of passes over train.", "N")
    monitor: str = _option("loss", ("loss", "auroc"), "What the best epoch on val is chosen by: loss, or macro AUROC.")
    patience: int = _option(
        1, click.IntRange(0, 1_000_000), "Stop after so many epochs in a row without a new best; 0: never.", "EPOCHS"
    )
    optimizer: str = _option("adam", OPTIMIZERS, "sgd has Nesterov momentum 0.9; all run as one fused kernel.")
    lr: float = _option(1e-4, FiniteRange(0, min_open=True), "Highest learning rate.", "RATE")
    weight_decay: float = _option(
        1e-5, FiniteRange(0), "adam, sgd: L2 penalty in the gradient; adamw: decoupled; 0: off.", "FACTOR"
    )
    sweep: str = _option(
        "",
        str,
        'Train a head for every combination on one cache, "lr=1e-4,1e-3 weight-decay=0,1e-4", and '
        "continue with the values of the lowest val loss; needs --freeze and its cache.  [default: off]",
        '"OPTION=VALUE,.. .."',
    )
    schedule: str = _option("constant", SCHEDULES, "Of the learning rate over the steps of all epochs.")
    warmup: float = _option(
        0.0,
        FiniteRange(0),
        "Epochs (or parts of one) in which the rate rises; 0: none, for onecycle 30 % of the steps.",
        "EPOCHS",
    )
    clip: float = _option(
        0.0, FiniteRange(0), "Clip the gradient's L2 norm over all weights to this; 0: off.", "NORM", flag="clip-grad"
    )
    ema: float = _option(
        0.0,
        FiniteRange(0, 1, max_open=True),
        "Validate and save an exponential moving average of the weights with this decay a step; 0: off.",
        "DECAY",
    )
    loss: str = _option("bce", LOSSES, "focal and asymmetric weigh easy images less.")
    pos_weight: str = _option(
        "none", POS_WEIGHTS, "Weight of a finding's positives in the loss, from their number in train."
    )
    label_smoothing: float = _option(
        0.0,
        FiniteRange(0, 1, max_open=True),
        "Train towards SHARE/2 and 1 - SHARE/2 instead of 0 and 1; 0: off.",
        "SHARE",
    )
    precision: str = _option(
        "auto",
        ("auto", "fp32", "bf16", "fp16", "prefer-bf16"),
        "auto: fp16 on a GPU; on a CPU bf16 if it has instructions for it, else fp32. prefer-bf16: bf16 on a GPU that "
        "has instructions for it, else as auto.",
    )
    compile: str = _option(
        "auto",
        _SWITCH,
        "torch.compile; auto: on a GPU, if the epochs have 500,000 images together. If compiling fails, the run prints "
        "that and continues without.",
    )
    sync_bn: str = _option(
        "auto", _SWITCH, "Batch norm over the images of all ranks; auto: on GPUs with fewer than 16 images a rank."
    )
    device: str = _option(
        "auto",
        str,
        "auto: the first GPU if there is one; with torchrun each rank's own.",
        DEVICE_CHOICES,
        identity=False,
    )
    seed: int = _option(0, SEED, "Of weights, order, flips, augmentation and dropout.", "N")
    threads: int = _option(
        0, click.IntRange(0, 1024), "Decoding threads; 0: the loader's own choice.", "N", identity=False
    )
    log_every: int = _option(
        50, click.IntRange(1, 2**40), "Steps between two lines of metrics.jsonl.", "STEPS", identity=False
    )
    checkpoint_every: float = _option(
        10.0,
        FiniteRange(0),
        "Also save this often within an epoch; 0: at the end of epochs only.",
        "MINUTES",
        identity=False,
    )
    checkpoint_steps: int = _option(
        0, click.IntRange(0, 2**40), "Also save after every so many steps; 0: off.", "STEPS", identity=False
    )
    log_to: str = _option(
        "none", str, f"Also log metrics to, comma-separated: {', '.join(LOGGERS)}.", "NAME,..", identity=False
    )

    def __post_init__(self) -> None:
        """Raise UsageError for values that do not go together."""
        if self.flip == "both" and self.batch_size % 2:
            raise click.UsageError(f"--flip both needs an even --batch-size, not {self.batch_size}")
        require_plain_name(self.run_name)
        if self.warmup >= self.epochs:
            raise click.UsageError(f"--warmup {self.warmup:g} leaves nothing of --epochs {self.epochs}")
        if self.cache == "on" and self.freeze == "none":
            raise click.UsageError("--cache on keeps what a frozen part makes; add --freeze partial or backbone")
        if self.sweep:
            self._check_sweep()
        for name in self.extra_loggers:
            if name not in LOGGERS:
                raise click.UsageError(f"--log-to knows {', '.join(LOGGERS)} and none, not {name!r}")

    def _check_sweep(self) -> None:
        if self.freeze == "none" or self.cache == "off" or self.augment != "none":
            raise click.UsageError(
                "--sweep trains heads on the cache of a frozen part: it goes with --freeze partial or "
                "backbone, without --augment and without --cache off"
            )
        kinds = {field.name: field.metadata["type"] for field in dataclasses.fields(self)}
        for point in self.sweep_points:
            for name, value in point.items():
                try:
                    kinds[name.replace("-", "_")](value)
                except click.BadParameter as error:
                    raise click.UsageError(f"--sweep: {name}: {error.message}") from error

    @property
    def sweep_points(self) -> list[dict[str, float]]:
        """The combinations in `sweep`, named as on the command line; UsageError where it makes no sense."""
        return parse_sweep(self.sweep) if self.sweep else []

    @property
    def extra_loggers(self) -> list[str]:
        """The names in `log_to`."""
        return [name for name in self.log_to.replace(" ", "").split(",") if name not in ("", "none")]

    @property
    def run_name(self) -> str:
        """The name given, or the one that follows from arch and freezing."""
        return self.name or (self.arch if self.freeze == "none" else f"{self.arch}-{self.freeze}")

    @property
    def start_weights(self) -> str:
        """`weights` with auto resolved for the arch; imports torch."""
        from models import has_imagenet_weights

        if self.weights != "auto":
            return self.weights
        return "imagenet" if has_imagenet_weights(self.arch) else "none"

    def with_stored(self, values: dict[str, Any], source: Path) -> "TrainConfig":
        """Return this with options as a run has them on record in `source`.

        Raises BadData naming one that its option does not take.
        """
        kinds = {field.name: field.metadata["type"] for field in dataclasses.fields(self)}
        stored = {}
        for key, value in values.items():
            try:
                stored[key] = click.types.convert_type(kinds[key])(str(value))
            except click.BadParameter as error:
                raise BadData(f"{source}, {key} is damaged: {error.message}") from error
        return dataclasses.replace(self, **stored)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(self).items()
        }

    def identity(self) -> dict[str, Any]:
        """Return the fields that must stay the same for a run to be resumed."""
        kept = {field.name for field in dataclasses.fields(self) if field.metadata["identity"]}
        return {key: value for key, value in self.to_json().items() if key in kept}


def parse_sweep(text: str) -> list[dict[str, float]]:
    """Return every combination of `"lr=1e-4,1e-3 weight-decay=0,1e-4"`, the last name varying fastest.

    Raises UsageError for a name that is not in SWEPT or comes twice, a value that is no finite number, too many
    combinations, or none.
    """
    axes: dict[str, list[float]] = {}
    for axis in text.split():
        name, _, values = axis.partition("=")
        if name not in SWEPT:
            raise click.UsageError(f"--sweep cannot vary {name!r}; it can vary: {', '.join(SWEPT)}")
        if name in axes:
            raise click.UsageError(f"--sweep names {name} twice")
        axes[name] = [_finite(name, value) for value in values.split(",")]
    if not axes:
        raise click.UsageError('--sweep: an empty sweep; one looks like "lr=1e-4,1e-3 weight-decay=0,1e-4"')
    points = math.prod(map(len, axes.values()))
    if points > _MOST_POINTS:
        raise click.UsageError(f"--sweep asks for {points:,} combinations; at most {_MOST_POINTS:,} are trained")
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def _finite(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise click.UsageError(f"--sweep gives {name} the value {text!r}, which is no finite number")
    return value
