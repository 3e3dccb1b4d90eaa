"""Load initial weights: all or nothing, never from a pickle, and named for the log."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from models.classifier import Classifier, State
from models.registry import get_arch

IMAGENET_CLASSES = 1000
PREFIX = "network."


class WeightsUnavailable(RuntimeError):  # noqa: N818  the name says it
    """The published weights cannot be loaded; the message names their URL and what to do instead."""


def has_imagenet_weights(arch: str) -> bool:
    """Return whether an arch has published ImageNet weights; UnknownArch if there is no such arch."""
    return get_arch(arch).imagenet is not None


def load_weights(model: Classifier, source: str | Path) -> str:
    """Load the weights that training starts from; after an error the model is unchanged.

    Returns one phrase for the log: what was loaded.

    Args:
        model: is changed in place.
        source: `imagenet`: torchvision's published weights, from the cache of torch.hub or downloaded.
            `none`: nothing is loaded. Else the path of a state dict in a `.pth`, `.pt` or `.safetensors`
            file, with or without the prefix `network.`: its head is loaded if it is of this model's
            shape, and left out if it is a torchvision head of 1,000 classes. Everything else must match
            in names and shapes; only a ViT's positions are interpolated to the model's size.

    Raises:
        WeightsUnavailable: `imagenet` is neither cached nor can it be downloaded.
        FileNotFoundError: there is no such file.
        ValueError: the arch has no ImageNet weights, or the file is not readable or not of this arch.
    """
    if source == "none":
        return "no weights loaded, all newly initialised"
    if source == "imagenet":
        state, origin = _imagenet(model), "ImageNet weights"
    else:
        state, origin = _read(Path(source)), f"weights of {source}"
    try:
        head_is_new = _apply(model, state)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{origin} do not fit {model.arch}: {_first_line(error)}") from error
    return f"{origin}, head {'newly initialised' if head_is_new else 'included'}"


def _imagenet(model: Classifier) -> State:
    weights = model.arch_spec.imagenet
    if weights is None:
        raise ValueError(f"{model.arch} has no ImageNet weights: use --weights none or --weights FILE")
    try:
        state: State = weights.get_state_dict(
            progress=sys.stderr.isatty(), check_hash=True, weights_only=True, map_location="cpu"
        )
    # torch.hub has no error of its own: network, disk, hash and a damaged cache fail each in their way.
    except Exception as error:
        cached = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
        raise WeightsUnavailable(
            f"cannot get {weights.url} ({_first_line(error)}): download it where there is a network, then "
            f"pass --weights FILE or put it at {cached}; or start without it: --weights none"
        ) from error
    return state


def _read(path: Path) -> State:
    """Return the state dict in a file, keys without the prefix."""
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    if path.suffix not in {".pth", ".pt", ".safetensors"}:
        raise ValueError(f"{path}: weights are read from .pth, .pt and .safetensors files")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    # Damaged bytes make torch's reader fail in any way; with weights_only nothing of them is executed.
    except Exception as error:
        raise ValueError(f"{path}: not readable as weights ({_first_line(error)})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: not a state dict (names to tensors); a run's is its model.safetensors")
    return {str(name).removeprefix(PREFIX): tensor for name, tensor in state.items()}


def _apply(model: Classifier, state: State) -> bool:
    """Load a state into the network; return whether the head was left as it was."""
    if model.arch_spec.convert_state_dict is not None:
        state = model.arch_spec.convert_state_dict(state, model.size)
    own: State = model.network.state_dict()
    head = {name for name in own if name.startswith(f"{model.arch_spec.head}.")}
    # shape[:1], since a tensor of a strange file may have no dimension at all
    drop = model.arch_spec.imagenet is not None and all(
        name in state and state[name].shape[:1] == (IMAGENET_CLASSES,) != own[name].shape[:1] for name in head
    )
    if drop:
        state = state | {name: own[name] for name in head}
    _require_match(state, own)
    model.network.load_state_dict(own | state)
    return drop


def _require_match(state: State, own: State) -> None:
    """Raise ValueError with the first name of each kind of difference."""
    # Counters of batch norm, which files from before PyTorch 0.4.1 lack and nothing here reads.
    missing = [name for name in own if name not in state and not name.endswith(".num_batches_tracked")]
    unexpected = sorted(state.keys() - own.keys())
    misshaped = [
        f"{name} is {list(state[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped))
    differences = [f"{len(names)} {kind}, first {names[0]}" for kind, names in kinds if names]
    if differences:
        raise ValueError("; ".join(differences))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
