"""The header of model.safetensors, without torch: metadata read and added, weights named by a digest."""

import hashlib
import json
import math
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from shards.errors import BadData
from shards.findings import FINDINGS
from shards.publishing import publish

METADATA = "cxrapid"
"""The one key of the file's metadata. safetensors writes several in random order, and equal runs must
give equal files."""

# The format's own limit: https://github.com/huggingface/safetensors, "Format".
_LARGEST_HEADER = 100_000_000
# What batch norm counts and averages; the state holds it, but no optimizer ever sees it.
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class ModelHeader:
    """What model.safetensors says of its weights."""

    metadata: dict[str, Any]
    """arch, size, findings, manifest_sha256, epoch, val_loss; once scored also what val taught."""
    parameters: int
    """Numbers that training could change, frozen ones counted, as `models.parameter_counts` counts them."""
    weights_sha256: str
    """SHA-256 of the names, shapes, types and bytes of all tensors; metadata does not change it."""


def read_header(path: Path) -> ModelHeader:
    """Read the header, and every byte once for the digest (0.1 s for ResNet-50).

    Raises BadData where the file is missing, damaged, or of other findings than FINDINGS.
    """
    if not path.is_file():
        raise BadData(
            f"{path.parent} has no {path.name}: its training has not finished; run the same command again"
        )
    try:
        with path.open("rb") as file:
            tensors, metadata = _read_table(file)
            digest = hashlib.sha256(json.dumps(tensors, sort_keys=True).encode())
            while block := file.read(1 << 20):
                digest.update(block)
        parameters = sum(
            math.prod(tensor["shape"]) for name, tensor in tensors.items() if not name.endswith(_BUFFERS)
        )
        findings = list(metadata["findings"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise BadData(f"{path} cannot be loaded: {error or type(error).__name__}") from error
    if findings != list(FINDINGS):
        raise BadData(f"{path} was trained on other findings: {', '.join(map(str, findings))}")
    return ModelHeader(metadata, parameters, digest.hexdigest())


def add_metadata(path: Path, values: dict[str, Any]) -> None:
    """Put JSON `values` into the metadata of a model file, in the place of what stood under their names.

    The tensors' bytes stay as they are. A file that says all this already is not written again.
    Raises BadData as read_header does, ResourceMissing from the disk.
    """
    metadata = read_header(path).metadata
    if {**metadata, **values} == metadata:
        return
    with path.open("rb") as file, publish(path) as partial:
        tensors, _ = _read_table(file)
        text = json.dumps({**metadata, **values}, allow_nan=False)
        header = json.dumps({"__metadata__": {METADATA: text}, **tensors}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)  # the tensors begin at a multiple of 8 bytes
        with partial.open("wb") as out:
            out.write(struct.pack("<Q", len(header)) + header)
            shutil.copyfileobj(file, out)


def _read_table(file: BinaryIO) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the table of tensors and the metadata; the file then stands at the tensors' first byte."""
    (length,) = struct.unpack("<Q", file.read(8))
    if length > _LARGEST_HEADER:
        raise ValueError(f"its header would have {length} bytes")
    tensors = json.loads(file.read(length))
    return tensors, json.loads(tensors.pop("__metadata__")[METADATA])
