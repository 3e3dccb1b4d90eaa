"""model.safetensors: the best weights of a run, and what it takes to use them without the run.

Reading the header alone does not import torch.
"""

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

from msgspec import Meta

from shards.documents import convert, parse_json, read_bytes
from shards.errors import BadData, ResourceMissing
from shards.files import hash_file, write_with_hash
from shards.findings import check_findings

if TYPE_CHECKING:
    import torch

    from models import Classifier

_METADATA = "cxrapid"
"""The one key of the file's metadata. safetensors writes several in random order, and equal runs must
give equal files."""

# The format allows 100 MB (https://github.com/huggingface/safetensors, "Format"); ViT-B/16's has 20 KB.
_LARGEST_HEADER = 4 * 2**20
# What batch norm counts and averages; the state holds it, but no optimizer ever sees it.
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

_Size = Annotated[int, Meta(ge=0)]


class _Tensor(TypedDict):
    dtype: Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
    shape: Annotated[list[_Size], Meta(max_length=8)]
    data_offsets: tuple[_Size, _Size]


class _Metadata(TypedDict):
    arch: str
    size: Annotated[int, Meta(ge=1, le=4096)]
    """Shards have at most 1,024 px; ViT-B/16 at 4,096 px has 200 MB of positions."""
    findings: list[str]
    manifest_sha256: str


@dataclass(frozen=True)
class ModelHeader:
    """What model.safetensors says of its weights."""

    metadata: dict[str, Any]
    """arch, size, findings, manifest_sha256, epoch, val_loss."""
    parameters: int
    """Numbers that training could change, frozen ones counted, as `models.parameter_counts` counts them."""
    weights_sha256: str
    """SHA-256 of the names, shapes, types and bytes of all tensors; metadata does not change it."""


def save_model(path: Path, state: "dict[str, torch.Tensor]", metadata: dict[str, Any]) -> None:
    """Write weights and `metadata`: arch, size, findings, manifest_sha256, epoch, val_loss.

    A kill at any moment leaves a model with a hash that fits it, or none. ResourceMissing where the disk is full.
    """
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    content = save(tensors, {_METADATA: json.dumps(metadata)})
    write_with_hash(path, lambda file: file.write(content))


def load_model(path: Path) -> "tuple[Classifier, dict[str, Any]]":
    """Return the model in evaluation mode on the CPU, and the metadata.

    Raises BadData if the file is missing, damaged, or not the one its hash is of: a model is never scored with weights
    that were not trained.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from models import create_model

    metadata = read_header(path).metadata
    try:
        model = create_model(metadata["arch"], findings=len(metadata["findings"]), size=metadata["size"])
        state, expected = load_file(path), model.state_dict()
        for name in sorted({*state, *expected}):
            found, wanted = (each[name].shape if name in each else None for each in (state, expected))
            if found != wanted:
                raise ValueError(f"its {name} is not that of the arch at this size")
        model.load_state_dict(state)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise BadData(f"{path} cannot be loaded: {reason}") from error
    return model.eval(), metadata


def read_header(path: Path) -> ModelHeader:
    """Read the header, and every byte once for the digests (0.2 s for ResNet-50).

    The file must be the one that its hash file was written for; runs of before there were hash files are
    read without. Raises BadData where the file is missing, damaged, or another than its hash file says;
    ResourceMissing where it may not be read.
    """
    if not path.is_file():
        raise BadData(f"{path.parent} has no {path.name}: its training has not finished; run the same command again")
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if length > min(size - 8, _LARGEST_HEADER):
                raise BadData(f"{path} is damaged: it is no safetensors file, or was cut off")
            header = file.read(length)
            tensors, metadata = _parse(header, path)
            of_file = hashlib.sha256(prefix + header)
            of_weights = hashlib.sha256(json.dumps(tensors, sort_keys=True).encode())
            while block := file.read(1 << 20):
                of_file.update(block)
                of_weights.update(block)
    except OSError as error:
        raise ResourceMissing(f"{path} cannot be read: {error.strerror}") from error
    _check_tensors(tensors, size - 8 - len(header), path)
    recorded = hash_file(path)
    if recorded.exists() and of_file.hexdigest() not in read_bytes(recorded, 1024).decode("ascii", "replace").split():
        raise BadData(
            f"{path} is damaged: its SHA-256 is not in {recorded.name}; copy it again from where it is "
            "whole, or train the run anew"
        )
    try:
        check_findings(convert(metadata, _Metadata, path)["findings"])
    except ValueError as error:
        raise BadData(f"{path} is damaged: {error}") from error
    parameters = sum(math.prod(tensor["shape"]) for name, tensor in tensors.items() if not name.endswith(_BUFFERS))
    return ModelHeader(metadata, parameters, of_weights.hexdigest())


def _parse(header: bytes, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the table of tensors and the metadata, both as they stand in the file."""
    tensors = parse_json(header, dict[str, dict[str, Any]], path)
    text = tensors.pop("__metadata__", {}).get(_METADATA)
    if not isinstance(text, str):
        raise BadData(f"{path} is no model of this trainer: its metadata has no {_METADATA}")
    return tensors, parse_json(text, dict[str, Any], path)


def _check_tensors(tensors: dict[str, Any], data: int, path: Path) -> None:
    """Raise BadData unless the tensors fill the bytes behind the header without gap or overlap."""
    end = 0
    table = convert(tensors, dict[str, _Tensor], path)
    for name, tensor in sorted(table.items(), key=lambda item: item[1]["data_offsets"]):
        begin, behind = tensor["data_offsets"]
        if begin != end or behind - begin != math.prod(tensor["shape"]) * _BYTES[tensor["dtype"]]:
            raise BadData(f"{path} is damaged: {name} does not lie where its shape and type have it")
        end = behind
    if end != data:
        raise BadData(f"{path} is damaged: its tensors take {end:,} bytes, and it has {data:,} for them")
