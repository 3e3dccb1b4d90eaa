"""What a command would do: every option as it comes out here, where it came from, and the model's size."""

import json
from collections.abc import Iterator

import torch

from loaders import choose_loader
from models import create_model, freeze, parameter_counts
from shards.errors import BadData
from shards.folder import ShardFolder, open_shards
from trainer.config import TrainConfig
from trainer.config.settling import build_frozen, choose_cache, loader_spec
from trainer.devices import choose_device
from trainer.distributed import ALONE, Team
from trainer.optimization.compilation import compiles
from trainer.optimization.precision import choose_precision


def describe(config: TrainConfig, sources: dict[str, str], team: Team = ALONE) -> Iterator[str]:
    """Yield a line an option: its value, what `auto` comes to, where it came from; then parameter counts.

    The counts are for the size of the shards where they are there, else for the arch's own.
    """
    team.batch_size_of_rank(config.batch_size, mirrored=config.flip == "both")
    shards = _shards(config)
    resolved = _resolve(config, shards)
    for key, value in config.to_json().items():
        text = json.dumps(value)
        if resolved.get(key, value) != value:
            text += f" -> {resolved[key]}"
        yield f"{key:17} {text:36} {sources[key]}"
    if shards is None:
        model = create_model(config.arch)
        freeze(model, config.freeze)
    else:
        model = build_frozen(config, shards, torch.device("cpu"))
    trainable, total = parameter_counts(model)
    yield f"trainable parameters {trainable:,} of {total:,}"
    if team.size > 1:
        yield f"ranks {team.size}"


def _shards(config: TrainConfig) -> ShardFolder | None:
    try:
        return open_shards(config.shards)
    except BadData:
        return None


def _resolve(config: TrainConfig, shards: ShardFolder | None) -> dict[str, object]:
    """Return what options that are left to the program come to."""
    device = choose_device(config.device)
    resolved: dict[str, object] = {
        "name": config.run_name,
        "weights": config.start_weights,
        "device": str(device),
        "precision": choose_precision(config.precision, device).name,
        "compile": "on" if compiles(config.compile, device) else "off",
    }
    precision = choose_precision(config.precision, device)
    for key in ("cache", "loader"):
        if getattr(config, key) != "auto":
            continue
        if shards is None:
            resolved[key] = f"by the size of the shards, once they are in {config.shards}"
        elif key == "cache":
            resolved[key] = choose_cache(config, shards, precision)[0]
        elif resolved.get("cache", config.cache) != "off":
            resolved[key] = "by what is installed, for one pass"
        else:
            resolved[key] = choose_loader(loader_spec(config, shards, device, "train"))[0]
    return resolved
