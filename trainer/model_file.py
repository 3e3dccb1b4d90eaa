"""model.safetensors: the weights a run kept, and what is needed to use them without the run."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from models import Classifier, build
from shards.errors import BadData
from shards.publishing import publish
from trainer.model_header import METADATA, read_header


def save_model(path: Path, state: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    """Write weights and `metadata`: arch, size, findings, manifest_sha256, epoch, val_loss."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with publish(path) as partial:
        partial.write_bytes(save(tensors, {METADATA: json.dumps(metadata)}))


def load_model(path: Path) -> tuple[Classifier, dict[str, Any]]:
    """Return the model in evaluation mode on the CPU, and the metadata.

    Raises BadData where the file is missing, damaged, or of other findings than FINDINGS:
    a model is never scored with weights that were not trained.
    """
    metadata = read_header(path).metadata
    try:
        model = build(metadata["arch"], size=metadata["size"])
        model.load_state_dict(load_file(path))
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise BadData(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from error
    return model.eval(), metadata
