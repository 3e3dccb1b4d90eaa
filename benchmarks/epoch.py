"""How fast an epoch trains and what limits it: `python -m benchmarks.epoch`.

Every arch trains with each loader and on `synthetic`, one fixed batch, in turns: the ceiling that no
loader can pass. Utilisation is the ceiling's step time by the real one, as MLPerf Storage defines it.
`plain loop` is the same model and precision on the fastest loader's batches (resident, where it takes
part), in a loop that a good engineer writes by hand.
The ablation goes from the baseline paper's way to this project's, one change a variant. With --freeze,
running the frozen network in every epoch is compared with caching its output once.
"""

if __name__ == "__main__":
    import shards.startup  # noqa: F401  first: Ctrl-C ends in one line while the rest is imported

import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.bench_shards import OUT, default_shards, make_bench_shards
from benchmarks.harness import interleave, summary, trainer_log, utilisation, write_result
from benchmarks.plot import plot_epoch
from benchmarks.training_run import VARIANTS, TrainingRun, Variant, fresh_compiler, frozen_against_cached, peak_memory
from loaders import LOADER_CHOICES
from models import list_models
from shards.console import PATH, Command, echo
from shards.folder import ShardFolder, open_shards
from trainer.devices import DEVICE_CHOICES, use_device
from trainer.optim.precision import Precision, choose_precision

# Images of an epoch: NIH's official train_val, and the baseline paper's 112,120 with their mirrors. The
# names are keys of the results on disk.
EPOCHS = {"train_val of NIH": 86_524, "the report's doubled set": 224_240}

SMALL = OUT.with_name(f"{OUT.name}-small")
"""With --freeze the whole network runs over every image in every epoch, so few images are enough."""


@click.command(cls=Command, context_settings={"show_default": True, "max_content_width": 110})
@click.option(
    "--shards",
    type=PATH,
    metavar="FOLDER",
    help="Packed shards to train on.  [default: data/shards, or a set that is made]",
)
@click.option(
    "--arch",
    "archs",
    multiple=True,
    type=click.Choice(list_models()),
    default=("resnet50", "vit_b_16", "custom_cnn"),
    help="Once for each.",
)
@click.option(
    "--loader",
    "loaders",
    multiple=True,
    type=click.Choice(LOADER_CHOICES),
    default=("dali", "resident"),
    help="Once for each; synthetic always takes part.",
)
@click.option(
    "--batch-size", type=click.IntRange(1), metavar="IMAGES", help="Images a step.  [default: 256 on a GPU, else 32]"
)
@click.option("--steps", type=click.IntRange(1), metavar="N", help="Steps a turn.  [default: 50 on a GPU, else 4]")
@click.option("--runs", type=click.IntRange(1), default=5, metavar="N", help="Counted rounds.")
@click.option("--device", default="auto", metavar=DEVICE_CHOICES)
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), default="auto")
@click.option(
    "--compile/--no-compile", "compiled", default=None, help="Compile the models.  [default: compiled on a GPU]"
)
@click.option(
    "--ablation/--no-ablation",
    default=True,
    help="From the baseline paper's way to this project's, with the first arch.",
)
@click.option("--ladder/--no-ladder", default=None, hidden=True)
@click.option(
    "--freeze",
    type=click.Choice(["none", "partial", "backbone"]),
    default="none",
    help="Instead of all this: the frozen network streamed against cached, with the first arch.",
)
@click.option("--images", type=click.IntRange(32), default=256, metavar="N", help="Of train, with --freeze.")
@click.option("--epochs", type=click.IntRange(1), default=5, metavar="N", help="With --freeze.")
@click.option(
    "--json",
    "out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where the figures go, and beside them the plot.  [default: in benchmarks/results]",
)
def main(
    shards: Path | None,
    archs: tuple[str, ...],
    loaders: tuple[str, ...],
    batch_size: int | None,
    steps: int | None,
    runs: int,
    device: str,
    precision: str,
    compiled: bool | None,
    ablation: bool,
    ladder: bool | None,
    freeze: str,
    images: int,
    epochs: int,
    out: Path | None,
) -> None:
    """Measure training end to end and write benchmarks/results/epoch_*.json and .png."""
    if freeze != "none" and shards is None:
        folder = make_bench_shards(SMALL, images)
    else:
        folder = open_shards(shards or default_shards())
    where = use_device(device)
    number = choose_precision(precision, where)
    batch_size, steps, compiled = by_device(where, batch_size, steps, compiled)
    record: dict[str, Any] = {
        "size": folder.manifest.size,
        "batch_size": batch_size,
        "steps": steps,
        "device": str(where),
        "precision": number.name,
        "compiled": compiled,
    }
    if freeze != "none":
        record["frozen"] = frozen_against_cached(archs[0], freeze, folder, number, epochs, batch_size)
        _show_frozen(record["frozen"])
        echo(write_result("frozen", record, out))
        return
    with trainer_log() as lines:
        record["archs"] = {
            arch: _arch(arch, loaders, folder, number, batch_size, steps, runs, compiled) for arch in archs
        }
        if ablation if ladder is None else ladder:  # --ladder: the former name
            fresh_compiler()
            trainings = {one.name: TrainingRun(archs[0], one, folder, number, batch_size) for one in VARIANTS}
            rungs = {name: summary(figures) for name, figures in _rates(trainings, steps, runs).items()}
            record["ladder"] = {"arch": archs[0], "rungs": rungs}
            _show_ablation(record["ladder"])
    if lines:  # a torch.compile that failed, for example
        record["log"] = lines
        echo("\n".join(lines), err=True)
    written = write_result("epoch", record, out)
    echo(f"{written}\n{plot_epoch(record, written.with_suffix('.png'))}")


def by_device(
    device: torch.device, batch_size: int | None, steps: int | None, compiled: bool | None
) -> tuple[int, int, bool]:
    """Return images a step, steps a turn and whether to compile: those given, else what suits the device."""
    gpu = device.type == "cuda"
    return (batch_size or (256 if gpu else 32), steps or (50 if gpu else 4), gpu if compiled is None else compiled)


def _arch(
    arch: str,
    loaders: tuple[str, ...],
    folder: ShardFolder,
    precision: Precision,
    batch_size: int,
    steps: int,
    runs: int,
    compiled: bool,
) -> dict[str, Any]:
    # The results by loader, synthetic and the plain loop with them.
    fresh_compiler()
    variants = [
        Variant(loader, loader, channels_last=True, autocast=True, compiled=compiled, fused=True)
        for loader in dict.fromkeys((*loaders, "synthetic"))
    ]
    fastest = next((one for one in variants if one.loader == "resident"), variants[0])
    variants.append(replace(fastest, name="plain loop", by_hand=True))
    trainings = {one.name: TrainingRun(arch, one, folder, precision, batch_size) for one in variants}
    rates = _rates(trainings, steps, runs)
    result = {}
    for one in variants:
        name, training = one.name, trainings[one.name]
        if precision.device.type == "cuda":
            peak = training.peak_bytes
        else:
            peak = peak_memory(arch, one, folder.path, precision, batch_size)
        result[name] = {
            "loader": one.loader,
            "images_per_second": summary(rates[name]),
            "utilisation": utilisation(rates[name], rates["synthetic"]),
            **training.figures(),
            "epoch_seconds": {what: n / statistics.median(rates[name]) for what, n in EPOCHS.items()},
            "memory_mib": peak / 2**20,
        }
    _show_arch(arch, result)
    return result


def _rates(trainings: dict[str, TrainingRun], steps: int, runs: int) -> dict[str, list[float]]:
    # Images/s in every round; closes what was measured.
    rates = interleave({name: partial(training.train, steps) for name, training in trainings.items()}, runs)
    for training in trainings.values():
        training.close()
    return rates


def _show_arch(arch: str, loaders: dict[str, Any]) -> None:
    echo(
        f"\n{arch:16} {'images/s':>9} {'utilisation':>12} {'data wait':>10} {'step p50':>9} {'p99, ms':>9} {'MiB':>7} "
        + " ".join(f"{what:>26}" for what in EPOCHS)
    )
    for name, one in loaders.items():
        echo(
            f"{name:16} {one['images_per_second']['median']:9.1f} {one['utilisation']:12.3f} "
            f"{one['data_wait']:10.2%} {one['step_ms_p50']:9.1f} {one['step_ms_p99']:9.1f} {one['memory_mib']:7,.0f} "
            + " ".join(f"{seconds / 60:22.1f} min" for seconds in one["epoch_seconds"].values())
        )


def _show_ablation(ladder: dict[str, Any]) -> None:
    echo(f"\n{ladder['arch'] + ', each variant adds':28} {'images/s':>9} {'gain':>6} {'in all':>7}")
    first = before = None
    for name, figures in ladder["rungs"].items():
        median = figures["median"]
        first, before = first or median, before or median
        echo(f"{name:28} {median:9.1f} {median / before:6.2f} {median / first:7.2f}")
        before = median


def _show_frozen(frozen: dict[str, Any]) -> None:
    echo(
        f"{frozen['arch']}, --freeze {frozen['freeze']}, {frozen['images']} images: an epoch takes "
        f"{frozen['streamed_seconds']:.2f} s streaming the frozen network, {frozen['cached_seconds']:.4f} s on "
        f"its cached output, {frozen['speedup']:.0f} times faster; caching took {frozen['caching_seconds']:.1f} s. "
        f"Final val loss {frozen['streamed_val_loss']:.6f} and {frozen['cached_val_loss']:.6f}"
    )


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.epoch")
