"""Options that are left to the program, settled once for a run: cache, loader and batch size."""

import copy
import dataclasses
import gc

import torch

from loaders import LoaderSpec, choose_loader
from models import Classifier, create_model, feature_extractor, freeze, trainable_head
from shards.errors import BadData, ResourceMissing
from shards.findings import FINDINGS
from shards.folder import ShardFolder
from trainer.config import TrainConfig
from trainer.distributed import ALONE, Team
from trainer.frozen.features import SHARE, place_of_cache
from trainer.optimization.averaging import Average
from trainer.optimization.batch_size import AUTO, LARGEST, ON_CPU, fits_gpu, largest_power_of_two
from trainer.optimization.losses import make_loss
from trainer.optimization.optimizers import make_optimizer
from trainer.optimization.precision import Precision
from trainer.run_directory import RunDirectory
from trainer.step import Counters, Step


def settle(
    config: TrainConfig,
    sources: dict[str, str],
    run: RunDirectory,
    shards: ShardFolder,
    precision: Precision,
    team: Team = ALONE,
) -> tuple[TrainConfig, dict[str, str]]:
    """Return the options with `auto` for cache, loader and batch size replaced by what it comes to here.

    What it came to is part of the run, so a run that is resumed keeps it, and what its sweep chose. Says
    what was chosen and why. The loader of a cached run is used once, and stays `auto`.

    Raises:
        ResourceMissing: not even one image fits the GPU, or a cache that was asked for fits nowhere.
        UsageError: the ranks cannot share the batch size.
    """
    open_choices = {
        "cache": config.cache == "auto", "loader": config.loader == "auto",
        "batch_size": config.batch_size == AUTO,
    }  # fmt: skip
    chosen = [key for key, is_open in open_choices.items() if is_open]
    if run.has_checkpoint or run.model.is_file():
        stored = run.read_config()
        if config.sweep and stored.get("sweep") == config.sweep:
            chosen += [name.replace("-", "_") for name in config.sweep_points[0]]
        kept = {key: stored[key] for key in chosen if key in stored}
        return config.with_stored(kept, run.config), sources
    if config.batch_size != AUTO:
        team.batch_size_of_rank(config.batch_size, mirrored=config.flip == "both")
    if config.cache != "off":
        name, why = choose_cache(config, shards, precision)
        if name == "off" and (config.cache == "on" or config.sweep):
            asked = "--sweep" if config.sweep else "--cache on"
            raise ResourceMissing(f"{asked} cannot be had: the frozen part has to run in every epoch: {why}")
        if "cache" in chosen and config.freeze != "none":
            run.say(f"--cache auto is {name}: {why}")
            sources = {**sources, "cache": f"auto: {why}"}
        config = dataclasses.replace(config, cache=name)
    if "loader" in chosen and config.cache == "off":
        name, why = choose_loader(loader_spec(config, shards, precision.device, "train", team))
        run.say(f"--loader auto is {name}: {why}")
        sources = {**sources, "loader": f"auto: {why}"}
        config = dataclasses.replace(config, loader=name)
    if "batch_size" in chosen:
        size, why = _choose_batch_size(config, shards, precision, team)
        run.say(f"--batch-size auto is {size}: {why}")
        sources = {**sources, "batch_size": f"auto: {why}"}
        config = dataclasses.replace(config, batch_size=size)
    return config, sources


def choose_cache(config: TrainConfig, shards: ShardFolder, precision: Precision) -> tuple[str, str]:
    """Return what `--cache auto` is, and why, in words for the user."""
    if config.freeze == "none":
        return "off", "nothing is frozen"
    train, val = (loader_spec(config, shards, precision.device, split) for split in ("train", "val"))
    place, why = place_of_cache(
        build_frozen(config, shards, precision.device), config.freeze, train, val, precision
    )
    return ("off", why) if place is None else ("on", f"it fits in the memory of {place}")


def loader_spec(
    config: TrainConfig, shards: ShardFolder, device: torch.device, split: str, team: Team = ALONE
) -> LoaderSpec:
    """Return what a loader of this run is told about a split; alone, of the whole batches."""
    training = split == "train"
    return LoaderSpec(
        shards,
        split,
        (config.batch_size or images_on_cpu(team)) // team.size,
        device,
        training=training,
        flip=config.flip if training else "none",
        augment=config.augment if training else "none",
        seed=config.seed,
        rank=team.rank,
        world_size=team.size,
        threads=config.threads,
    )


def build_frozen(config: TrainConfig, shards: ShardFolder, device: torch.device) -> Classifier:
    """Return the arch for these shards, newly initialised and frozen as told; BadData if it cannot be."""
    try:
        model = create_model(config.arch, size=shards.manifest.size)
    except ValueError as error:
        raise BadData(f"{shards.path}: {error}") from error
    freeze(model, config.freeze)
    return model.to(device)


def images_on_cpu(team: Team) -> int:
    """Return what `--batch-size auto` is on a CPU, for all ranks together."""
    # Even on every rank, so that mirrors fit.
    return team.size * 2 * max(ON_CPU // (2 * team.size), 1)


def _choose_batch_size(
    config: TrainConfig, shards: ShardFolder, precision: Precision, team: Team
) -> tuple[int, str]:
    device = precision.device
    if device.type == "cpu":
        return images_on_cpu(team), "on a CPU larger ones are not faster"
    model, size, cached = build_frozen(config, shards, device), shards.manifest.size, config.cache == "on"
    image = torch.zeros(1, 1, size, size, dtype=torch.uint8, device=device)
    if cached:
        with precision.autocast():
            image = feature_extractor(model.eval(), config.freeze)(image)

    def try_step(images: int) -> None:
        # Uncompiled, which takes the more memory; with an average, as it is one more copy.
        trial = copy.deepcopy(model).train()
        average = Average(trial, config.ema) if config.ema else None
        optimizer = make_optimizer(config.optimizer, trial.parameters(), config.lr, config.weight_decay)
        loss = make_loss(config.loss, "none", shards.manifest.splits["train"], device)
        step = Step(
            trainable_head(trial, config.freeze) if cached else trial, loss, optimizer, torch.zeros_like,
            Counters(device), precision.autocast, precision.make_scaler(), config.clip, average,
        )  # fmt: skip
        labels = torch.zeros(images, len(FINDINGS), dtype=torch.uint8, device=device)
        step.add(image.repeat(images, *[1] * (image.dim() - 1)), labels, 1.0)
        step.apply(1)
        torch.cuda.synchronize(device)

    # The cache, which is made later, may take its share of the memory.
    fits = fits_gpu(try_step, device, 1 - SHARE if cached else 1.0)
    found = largest_power_of_two(fits, min(LARGEST, shards.manifest.splits["train"].images))
    gc.collect()
    torch.cuda.empty_cache()
    if not found:
        raise ResourceMissing(
            f"not one image fits {torch.cuda.get_device_name(device)}; take a smaller --arch"
        )
    why = f"the largest power of two whose step fits {torch.cuda.get_device_name(device)}"
    if team.size > 1:
        why += f", on each of {team.size} ranks"
    return team.size * (max(found, 2) if config.flip == "both" else found), why
