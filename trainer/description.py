"""What a command would do: every option as it comes out here, where it came from, and the model's size."""

import json
from collections.abc import Iterator

from loaders import choose_loader
from models import build, freeze, parameter_counts
from shards.errors import BadData
from shards.folder import open_shards
from trainer.batch_size import AUTO, ON_CPU
from trainer.compilation import compiles
from trainer.config import TrainConfig
from trainer.devices import choose_device
from trainer.precision import choose_precision
from trainer.settling import choose_cache, loader_spec


def describe(config: TrainConfig, sources: dict[str, str]) -> Iterator[str]:
    """Yield a line an option: its value, what `auto` comes to, where it came from; then parameter counts."""
    resolved = _resolve(config)
    for key, value in config.to_json().items():
        text = json.dumps("auto" if key == "batch_size" and value == AUTO else value)
        if resolved.get(key, value) != value:
            text += f" -> {resolved[key]}"
        yield f"{key:17} {text:36} {sources[key]}"
    model = build(config.arch)
    freeze(model, config.freeze)
    trainable, total = parameter_counts(model)
    yield f"trainable parameters {trainable:,} of {total:,}"


def _resolve(config: TrainConfig) -> dict[str, object]:
    """Return what options that are left to the program come to."""
    device = choose_device(config.device)
    resolved: dict[str, object] = {
        "name": config.run_name,
        "weights": config.start_weights,
        "device": str(device),
        "precision": choose_precision(config.precision, device).name,
        "compile": "on" if compiles(config.compile, device) else "off",
    }
    if config.batch_size == AUTO:
        resolved["batch_size"] = ON_CPU if device.type == "cpu" else "measured on the GPU at the start"
    precision = choose_precision(config.precision, device)
    for key in ("cache", "loader"):
        if getattr(config, key) != "auto":
            continue
        try:
            shards = open_shards(config.shards)
            if key == "cache":
                resolved[key] = choose_cache(config, shards, precision)[0]
            elif resolved.get("cache", config.cache) != "off":
                resolved[key] = "by what is installed, for one pass"
            else:
                resolved[key] = choose_loader(loader_spec(config, shards, device, "train"))[0]
        except BadData:
            resolved[key] = f"by the size of the shards, once they are in {config.shards}"
    return resolved
