"""The cells of `benchmarks.gpu` by stage, the most important first, and the estimates that they are compared with."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from shards.processes import available_cores

_BATCHES = {"resnet50": (256, 64, 512), "vit_b_16": (256, 64, 512), "custom_cnn": (1024, 256, 4096)}
"""Images a step by arch, the one that was estimated first."""
_PRECISIONS = {"fp16": 0, "bf16": 2, "fp32": 3}
"""By how late the matrix comes to it: as late as an uncompiled model (1) and another batch (2) together, and so on."""
_FEATURES = 86_524  # images of NIH's train_val: with their mirrors, 173,048 features an epoch
_SHARES = (0.0, 0.12, 0.3, 0.65)  # of the images, what the GPU's JPEG engine gets
_IN_NAME = ("arch", "precision", "compiled", "dtype", "decode_on", "threads", "hardware_share", "batch_size", "loader")


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    kind: str
    """A name of gpu_cells.KINDS."""
    options: dict[str, Any]
    """What that function takes."""
    limit: float
    """Seconds after which its process is ended."""

    @property
    def name(self) -> str:
        """Kind and options in words, different for every cell of a stage."""
        values = [self.options[key] for key in _IN_NAME if key in self.options]
        words = [("eager", "compiled")[value] if isinstance(value, bool) else str(value) for value in values]
        return " ".join([self.kind, *words])


def _train(arch: str, precision: str, compiled: bool, batch_size: int, loader: str = "auto", rounds: int = 2) -> Cell:
    options = {"arch": arch, "precision": precision, "compiled": compiled, "batch_size": batch_size, "loader": loader}
    return Cell("train", {**options, "rounds": rounds, "steps": 0}, 240 if compiled else 120)


def _head(batch_size: int) -> Cell:
    options = {"arch": "resnet50", "precision": "fp16", "batch_size": batch_size, "images": _FEATURES, "epochs": 3}
    return Cell("head", options, 60)


def _ceilings() -> Iterator[Cell]:
    yield Cell("copy", {"mib": 2048, "repeats": 50}, 60)
    for dtype in ("fp16", "bf16", "tf32", "fp32"):
        yield Cell("matmul", {"dtype": dtype, "side": 8192, "repeats": 50}, 60)


def _matrix() -> Iterator[Cell]:
    cells = [
        (_PRECISIONS[precision] + (not compiled) + 2 * (batch != batches[0]), _train(arch, precision, compiled, batch))
        for precision in _PRECISIONS
        for compiled in (True, False)
        for arch, batches in _BATCHES.items()
        for batch in batches
    ]
    cells += [(0, _head(batch)) for batch in (4096, 64)]
    yield from (cell for _, cell in sorted(cells, key=lambda pair: pair[0]))


def _dali() -> Iterator[Cell]:
    names = "limit,dali,resident,dataloader,tuned"
    yield from (_train(arch, "fp16", True, batches[0], "dali") for arch, batches in _BATCHES.items())
    yield Cell("loaders", {"names": names, "batch_size": 256, "runs": 3}, 240)
    cores = available_cores()
    options = {"threads": cores, "batch_size": 256, "epochs": 2}
    yield Cell("decoder", {"decode_on": "cpu", "hardware_share": 0.0, **options}, 60)
    for threads in sorted({max(cores // 4, 1), cores}):
        for share in _SHARES:
            yield Cell("decoder", {"decode_on": "mixed", "hardware_share": share, **options, "threads": threads}, 60)


def _profile() -> Iterator[Cell]:
    for arch, batches in _BATCHES.items():
        options = {
            "arch": arch,
            "precision": "fp16",
            "compiled": True,
            "batch_size": batches[0],
            "steps": 10,
            "rows": 15,
        }
        yield Cell("profile", options, 240)


def _final() -> Iterator[Cell]:
    yield from (_train(arch, "fp16", True, batches[0], rounds=5) for arch, batches in _BATCHES.items())
    yield _head(4096)
    yield Cell("save", {"arch": "vit_b_16", "batch_size": 256, "every": 16}, 240)


STAGES = {"ceilings": _ceilings, "matrix": _matrix, "dali": _dali, "profile": _profile, "final": _final}
"""By name, each a function that yields its cells, the most important first."""

_TINY: dict[str, Any] = {
    "batch_size": 2,
    "decode_on": "cpu",
    "dtype": "fp32",
    "epochs": 1,
    "every": 8,
    "images": 32,
    "mib": 8,
    "names": "dali",
    "precision": "auto",
    "repeats": 2,
    "rounds": 1,
    "rows": 5,
    "runs": 1,
    "side": 128,
    "steps": 2,
    "threads": 2,
}


def plan(stage: str, *, tiny: bool = False) -> list[Cell]:
    """Return the cells of a stage; with `tiny` one of each kind, of the matrix one for each arch.

    Then only custom_cnn is compiled, in the matrix: on a CPU that takes half a minute.
    """
    cells: dict[Any, Cell] = {}
    for cell in STAGES[stage]():
        options, key = dict(cell.options), cell.name
        if tiny:
            options |= {name: value for name, value in _TINY.items() if name in options}
            if "arch" in options and stage != "matrix":
                options["arch"] = "custom_cnn"
            if "compiled" in options:
                options["compiled"] = stage == "matrix" and options["arch"] == "custom_cnn"
            key = f"{cell.kind} {options.get('arch')}"
        cells.setdefault(key, replace(cell, options=options))
    return list(cells.values())


@dataclass(frozen=True)
class Estimate:
    """A figure that was estimated before any GPU was at hand, and where it is measured."""

    what: str
    kind: str
    options: dict[str, Any]
    """Those that the cell has."""
    figure: str
    h200: str
    h100: str

    def best(self, results: list[dict[str, Any]]) -> tuple[float, str] | None:
        """Return the best figure among the cells that fit and the name of its cell, None without any."""
        found = [
            (one["figures"][self.figure], one["name"])
            for one in results
            if one["status"] == "done" and one["kind"] == self.kind and one["options"].items() >= self.options.items()
        ]
        if not found:
            return None
        return min(found) if "seconds" in self.figure else max(found)


def _of(arch: str) -> dict[str, Any]:
    return {"arch": arch, "batch_size": _BATCHES[arch][0], "compiled": True, "loader": "auto"}


_RATE = "images_per_second"
ESTIMATES = (
    Estimate("resnet50, images/s", "train", _of("resnet50"), _RATE, "4,200 to 5,200", "3,300 to 4,000"),
    Estimate("vit_b_16, images/s", "train", _of("vit_b_16"), _RATE, "2,800 to 3,400", "2,800 to 3,400"),
    Estimate("custom_cnn, images/s", "train", _of("custom_cnn"), _RATE, "33,000 to 40,000", "27,000 to 36,000"),
    Estimate("resnet50, utilisation", "train", _of("resnet50"), "utilisation", "at least 0.98", "at least 0.98"),
    Estimate(
        "resnet50, s for 224,240 images", "train", _of("resnet50"), "paper_epoch_seconds", "at most 60", "at most 75"
    ),
    Estimate("head, s for 173,048 features", "head", {"images": _FEATURES}, "epoch_seconds", "under 0.1", "under 0.1"),
    Estimate("vit_b_16, s for a checkpoint", "save", {"arch": "vit_b_16"}, "blocked_seconds", "under 0.2", "under 0.2"),
)
"""Compiled, batches of 256 (custom_cnn 1,024), end to end with `auto`; from the cards' bandwidth and TFLOP/s."""
