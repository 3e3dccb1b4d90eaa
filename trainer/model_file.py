"""model.safetensors: the weights a run kept, and what is needed to use them without the run."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from models import Classifier, build
from shards.errors import BadData
from shards.findings import FINDINGS
from shards.publishing import publish

_METADATA = "cxrapid"


def save_model(path: Path, state: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    """Write weights and `metadata`: arch, size, findings, manifest_sha256, epoch, val_loss."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    # One key: safetensors writes several in random order, and equal runs must give equal files.
    with publish(path) as partial:
        partial.write_bytes(save(tensors, {_METADATA: json.dumps(metadata)}))


def save_thresholds(path: Path, thresholds: dict[str, float]) -> None:
    """Put the thresholds fitted on val, null where there is none, into the metadata of a model file."""
    state, metadata = _read(path)
    known = {finding: None if math.isnan(cut) else cut for finding, cut in thresholds.items()}
    save_model(path, state, {**metadata, "thresholds": known})


def load_model(path: Path) -> tuple[Classifier, dict[str, Any]]:
    """Return the model in evaluation mode on the CPU, and the metadata.

    Raises BadData where the file is missing, damaged, or of other findings than FINDINGS:
    a model is never scored with weights that were not trained.
    """
    if not path.is_file():
        raise BadData(
            f"{path.parent} has no {path.name}: its training has not finished; run the same command again"
        )
    try:
        state, metadata = _read(path)
        if metadata["findings"] != list(FINDINGS):
            raise BadData(f"{path} was trained on other findings: {', '.join(metadata['findings'])}")
        model = build(metadata["arch"], size=metadata["size"])
        model.load_state_dict(state)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise BadData(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from error
    return model.eval(), metadata


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        metadata = json.loads((file.metadata() or {})[_METADATA])
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118  no mapping
