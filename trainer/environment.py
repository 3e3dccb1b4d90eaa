"""environment.json: the machine, versions and shards that a run was trained on."""

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from shards.folder import ShardFolder
from shards.processes import available_cores

if TYPE_CHECKING:  # what is written here can be read where torch is not wanted
    import torch

_PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "webdataset", "numpy", "pandas")


class Environment(TypedDict, total=False):
    """environment.json: what a run was trained on; files of other versions may lack some."""

    device_type: str
    precision: str
    world_size: int
    command: str
    commit: str | None
    manifest_sha256: str
    findings: list[str]
    device: str
    cores: int
    python: str
    platform: str
    versions: dict[str, str | None]
    cuda: str | None


def describe_environment(shards: ShardFolder, device: "torch.device") -> dict[str, Any]:
    """Return what environment.json says of shards, device, machine, command and versions."""
    import torch

    installed = {dist.metadata["Name"] for dist in metadata.distributions()}
    return {
        "command": " ".join([Path(sys.executable).name, "-m", "trainer", *sys.argv[1:]]),
        "commit": _commit(),
        "manifest_sha256": shards.digest,
        "findings": list(shards.manifest.findings),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "cores": available_cores(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: metadata.version(name) for name in _PACKAGES if name in installed},
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }


def _commit() -> str | None:
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return None
    return found.stdout.strip() or None
