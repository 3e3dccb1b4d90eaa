"""model.safetensors: the best weights of a run, and what it takes to use them without the run."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from models import Classifier, create_model
from shards.errors import BadData
from shards.files import atomic_write, atomic_write_text, sha256_of
from trainer.model_header import METADATA, hash_file, read_header


def save_model(path: Path, state: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    """Write weights and `metadata`: arch, size, findings, manifest_sha256, epoch, val_loss.

    The SHA-256 of the file is published before it, in `path.sha256`, beside that of a file which has the
    name already: a kill at any moment leaves a model with a hash that fits it, or none.
    Raises ResourceMissing where the disk is full.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    content = save(tensors, {METADATA: json.dumps(metadata)})
    before = [sha256_of(path)] if path.is_file() else []
    with atomic_write(path) as partial:
        partial.write_bytes(content)
        atomic_write_text(hash_file(path), "\n".join([hashlib.sha256(content).hexdigest(), *before]) + "\n")


def load_model(path: Path) -> tuple[Classifier, dict[str, Any]]:
    """Return the model in evaluation mode on the CPU, and the metadata.

    Raises BadData if the file is missing, damaged, not the one its hash is of, or of other findings than
    FINDINGS: a model is never scored with weights that were not trained.
    """
    metadata = read_header(path).metadata
    try:
        model = create_model(metadata["arch"], size=metadata["size"])
        state = load_file(path)
        _check_fits(state, model)
        model.load_state_dict(state)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise BadData(f"{path} cannot be loaded: {reason}") from error
    return model.eval(), metadata


def _check_fits(state: dict[str, torch.Tensor], model: Classifier) -> None:
    expected = model.state_dict()
    for name in sorted({*state, *expected}):
        found, wanted = (each[name].shape if name in each else None for each in (state, expected))
        if found != wanted:
            raise ValueError(f"its {name} is not that of the arch at this size")
