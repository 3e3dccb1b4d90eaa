"""What `auto` comes to, for the run and for --dry-run, and the context of a run in which it is resolved.

--device     the first GPU, under torchrun each rank's own; without one the CPU (devices.choose_device,
             distributed.join)
--precision  fp16 on a GPU; on a CPU bf16 where it has instructions for it, else fp32 (precision.choose_precision)
--compile    on for a GPU if the run has 500,000 images or more in all its epochs; else off (compilation.should_compile)
--sync-bn    on for GPUs with fewer than 16 images a rank; else off (distributed.should_sync_bn)
--cache      on if --freeze is given, --augment is not, and the features take at most 0.6 of the free memory of the
             GPU or the host; else off (features.choose_device_of_cache)
--loader     resident if the decoded split takes at most 0.4 of that memory, else dali; dataloader where DALI is not
             installed (loaders.choose_loader)

With cached features the images are read only once: config.json keeps loader auto, and that pass uses dali, or
dataloader where DALI is not installed. On resume a cache or loader of auto takes the value in config.json
(restore_auto), and a run on another device type or in another precision is refused; --dry-run shows what a new run
would get.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

import click
import torch

from loaders import LoaderSpec, choose_loader
from models import Classifier, create_model, freeze, parameter_counts
from shards.errors import BadData, ResourceMissing
from shards.folder import ShardFolder, open_shards
from trainer.devices import choose_device, ranks_of_machine
from trainer.distributed import SINGLE_PROCESS, Distributed, should_sync_bn
from trainer.feature_cache.features import choose_device_of_cache
from trainer.optim.compilation import should_compile
from trainer.optim.precision import Precision, choose_precision
from trainer.options import TrainConfig
from trainer.run_directory import RunDirectory
from trainer.stop_signal import StopSignal


@dataclass(frozen=True)
class RunContext:
    """Fixed for the run. In `config`, cache and loader are resolved; weights and compile stay as given.

    Device and precision are resolved in `precision`.
    """

    config: TrainConfig
    run: RunDirectory
    shards: ShardFolder
    precision: Precision
    stop: StopSignal
    dist: Distributed = SINGLE_PROCESS

    @property
    def device(self) -> torch.device:
        """Of this rank."""
        return self.precision.device

    @property
    def should_compile(self) -> bool:
        """Whether the model is compiled for training."""
        return resolve_compile(self.config, self.shards, self.device)

    def stop_agreed(self) -> bool:
        """Return whether any rank got a signal; all ranks must ask."""
        return self.stop.agreed(self.dist)[0]

    def loader_spec(self, split: str) -> LoaderSpec:
        """Return the spec of this rank's loader of a split."""
        return loader_spec(self.config, self.shards, self.device, split, self.dist)


def loader_spec(
    config: TrainConfig, shards: ShardFolder, device: torch.device, split: str, dist: Distributed = SINGLE_PROCESS
) -> LoaderSpec:
    """Return the spec of a rank's loader of a split."""
    training = split == "train"
    return LoaderSpec(
        shards,
        split,
        config.batch_size // dist.size,
        device,
        training=training,
        flip=config.flip if training else "none",
        augment=config.augment if training else "none",
        seed=config.seed,
        rank=dist.rank,
        world_size=dist.size,
        local_world_size=ranks_of_machine(),
        threads=config.threads,
    )


def resolve_compile(config: TrainConfig, shards: ShardFolder, device: torch.device) -> bool:
    """Resolve --compile for a run on these shards."""
    images = config.epochs * shards.manifest.splits["train"].images
    return should_compile(config.compile, device, 2 * images if config.flip == "both" else images)


def build_model(config: TrainConfig, shards: ShardFolder) -> Classifier:
    """Seed torch and return a new model for these shards with --freeze applied; BadData if there can be none."""
    torch.manual_seed(config.seed)
    try:
        model = create_model(config.arch, findings=len(shards.manifest.findings), size=shards.manifest.size)
    except ValueError as error:
        raise BadData(f"{shards.path}: {error}") from error
    freeze(model, config.freeze)
    return model


@dataclass(frozen=True)
class Resolved:
    """Options with cache and loader resolved, as config.json stores them."""

    config: TrainConfig
    """With cache and loader by name; the loader of a cached run, for one pass, stays auto."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Of cache and loader where they were auto -> why."""
    model: Classifier | None = None
    """As build_model returns it, on the device, if its features were measured."""


def resolve_auto(config: TrainConfig, shards: ShardFolder, precision: Precision, dist: Distributed) -> Resolved:
    """Resolve cache and loader by what fits in memory; stores and deletes nothing.

    Raises ResourceMissing if a cache that was asked for fits nowhere, UsageError if the ranks cannot share the batch
    size.
    """
    dist.verify_batch_size(config.batch_size, mirrored=config.flip == "both")
    if config.sync_bn == "on" and precision.device.type == "cpu":
        raise click.UsageError("--sync-bn on is for GPUs: torch's SyncBatchNorm does not run on a CPU")
    model, reasons = None, {}
    if config.freeze == "none":
        config = dataclasses.replace(config, cache="off")
    elif config.cache != "off":
        train, val = (loader_spec(config, shards, precision.device, split) for split in ("train", "val"))
        model = build_model(config, shards).to(precision.device)
        device, why = choose_device_of_cache(model, config.freeze, train, val, precision)
        if device is None and (config.cache == "on" or config.sweep):
            option = "--sweep" if config.sweep else "--cache on"
            raise ResourceMissing(f"{option} cannot be had: the frozen part has to run in every epoch: {why}")
        if config.cache == "auto":
            reasons["cache"] = why if device is None else f"it fits in the memory of {device}"
        config = dataclasses.replace(config, cache="off" if device is None else "on")
    if config.loader == "auto" and config.cache == "off":
        spec = loader_spec(config, shards, precision.device, "train", dist)
        loader, reasons["loader"] = choose_loader(spec)
        config = dataclasses.replace(config, loader=loader)
    return Resolved(config, reasons, model)


def restore_auto(config: TrainConfig, run: RunDirectory) -> TrainConfig:
    """Return the options with what `auto` and the sweep came to when the run was started."""
    stored = run.read_config()
    keys = [key for key in ("cache", "loader") if getattr(config, key) == "auto"]
    if config.sweep and stored.get("sweep") == config.sweep:
        keys += [name.replace("-", "_") for name in config.sweep_points[0]]
    if missing := [key for key in keys if key not in stored]:
        raise BadData(f"{run.config} is damaged: it has no {missing[0]}")
    config = config.with_stored({key: stored[key] for key in keys}, run.config)
    if config.cache == "auto":
        raise BadData(f"{run.config}, cache is damaged: a run has on or off")
    return config


def describe(config: TrainConfig, sources: dict[str, str], dist: Distributed) -> Iterator[str]:
    """Yield one line per option: its value, what `auto` comes to, where it came from; then parameter counts.

    The counts are for the size of the shards if these exist, else for the arch's own.
    """
    dist.verify_batch_size(config.batch_size, mirrored=config.flip == "both")
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    values = {
        "name": config.run_name,
        "weights": config.start_weights,
        "device": str(device),
        "precision": precision.name,
        "compile": "on" if config.compile == "on" else "off",
        "sync_bn": "on" if should_sync_bn(config.sync_bn, config.batch_size, device, dist) else "off",
    }
    try:
        shards = open_shards(config.shards)
    except BadData:
        model = create_model(config.arch)
        freeze(model, config.freeze)
        later = f"by the size of the shards, once they are in {config.shards}"
        unknown = ("cache", "loader", "compile") if device.type == "cuda" else ("cache", "loader")
        values |= {key: later for key in unknown if getattr(config, key) == "auto"}
    else:
        resolved = resolve_auto(config, shards, precision, dist)
        model = resolved.model or build_model(config, shards)
        values |= {"cache": resolved.config.cache, "loader": resolved.config.loader}
        values["compile"] = "on" if resolve_compile(config, shards, device) else "off"
        if values["loader"] == "auto":
            values["loader"] = "by what is installed, for one pass"
    for key, value in config.to_json().items():
        text = json.dumps(value)
        if values.get(key, value) != value:
            text += f" -> {values[key]}"
        yield f"{key:17} {text:36} {sources[key]}"
    trainable, total = parameter_counts(model)
    yield f"trainable parameters {trainable:,} of {total:,}"
    if dist.size > 1:
        yield f"ranks {dist.size}"
