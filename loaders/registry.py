"""The loaders by name, and the choice of `auto`; optional packages are imported when their loader is made."""

import functools
from collections.abc import Callable

from loaders.loader import Loader, SyntheticLoader
from loaders.resident import ResidentLoader, resident_device
from loaders.spec import LoaderSpec
from loaders.torch_loader import TorchLoader
from shards.errors import ResourceMissing


def _dali(spec: LoaderSpec) -> Loader:
    try:
        from loaders.dali import DaliLoader
    except ImportError as error:
        raise ResourceMissing(
            f"the loader dali needs NVIDIA DALI, which cannot be imported ({error}); Linux on x86-64: "
            "pip install nvidia-dali-cuda130. --loader dataloader does without"
        ) from error
    return DaliLoader(spec)


def _webdataset(spec: LoaderSpec) -> Loader:
    try:
        from loaders.web import WebLoader
    except ModuleNotFoundError as error:
        raise ResourceMissing(
            "the loader webdataset needs the package webdataset, which is not installed: "
            "pip install 'webdataset>=1.0,<2'"
        ) from error
    return WebLoader(spec)


def streaming_loader(spec: LoaderSpec) -> Loader:
    """Return the loader for a single pass: dali, or dataloader where DALI is not installed."""
    return make_loader("dali" if _has_dali() else "dataloader", spec)


LOADERS: dict[str, Callable[[LoaderSpec], Loader]] = {
    "dali": _dali,
    "resident": functools.partial(ResidentLoader, make_decoding=streaming_loader),
    "webdataset": _webdataset,
    "dataloader": TorchLoader,
    "synthetic": SyntheticLoader,
}
LOADER_CHOICES = ("auto", *LOADERS)


def choose_loader(spec: LoaderSpec) -> tuple[str, str]:
    """Return what `auto` takes for many epochs of a split, and why, for the user to read.

    resident where the decoded split fits in its share of the free memory of the device or of the
    host, else dali, else dataloader where DALI is not installed. Changes nothing.
    """
    device, figures = resident_device(spec)
    if device is not None:
        return "resident", f"kept in the memory of {device}: {figures}"
    if _has_dali():
        return "dali", f"decoded anew each epoch: {figures}"
    return "dataloader", f"decoded anew each epoch, without DALI, which cannot be imported: {figures}"


def make_loader(name: str, spec: LoaderSpec) -> Loader:
    """Return the loader of this name, for auto the one of choose_loader; ValueError lists the known ones."""
    if name not in LOADER_CHOICES:
        raise ValueError(f"unknown loader {name!r}; known are {', '.join(LOADER_CHOICES)}")
    return LOADERS[choose_loader(spec)[0] if name == "auto" else name](spec)


def _has_dali() -> bool:
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:  # not installed, or its libraries do not load
        return False
    return True
