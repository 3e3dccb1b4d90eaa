"""Options that are left to the program, settled once for a run: cache and loader."""

import dataclasses

import torch

from loaders import LoaderSpec, choose_loader
from models import Classifier, create_model, freeze
from shards.errors import BadData, ResourceMissing
from shards.folder import ShardFolder
from trainer.config import TrainConfig
from trainer.distributed import ALONE, Team
from trainer.frozen.features import place_of_cache
from trainer.optimization.precision import Precision
from trainer.run_directory import RunDirectory


def settle(
    config: TrainConfig,
    sources: dict[str, str],
    run: RunDirectory,
    shards: ShardFolder,
    precision: Precision,
    team: Team = ALONE,
) -> tuple[TrainConfig, dict[str, str]]:
    """Return the options with `auto` for cache and loader replaced by what it comes to here.

    What it came to is part of the run, so a run that is resumed keeps it, and what its sweep chose. Says
    what was chosen and why. The loader of a cached run is used once, and stays `auto`.

    Raises:
        ResourceMissing: a cache that was asked for fits nowhere.
        UsageError: the ranks cannot share the batch size.
    """
    chosen = [key for key in ("cache", "loader") if getattr(config, key) == "auto"]
    if run.has_checkpoint or run.model.is_file():
        stored = run.read_config()
        if config.sweep and stored.get("sweep") == config.sweep:
            chosen += [name.replace("-", "_") for name in config.sweep_points[0]]
        kept = {key: stored[key] for key in chosen if key in stored}
        return config.with_stored(kept, run.config), sources
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
        config.batch_size // team.size,
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
