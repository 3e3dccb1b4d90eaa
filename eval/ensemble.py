"""Average the predictions of several runs on the same images, and check that they are the same."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eval.predict.predictions import Predictions
from shards.errors import BadData
from shards.folder import ShardFolder
from trainer.run_directory import RunDirectory

_LONGEST_NAME = 200  # bytes; file systems stop at 255, and temporary files add a little


@dataclass(frozen=True, eq=False)
class Images:
    """The images that a run is scored on, in their order."""

    run: str
    names: npt.NDArray[Any]
    """[N], as in the metadata."""
    findings: tuple[str, ...]
    labels: npt.NDArray[Any]
    """[N, F]."""
    patients: npt.NDArray[np.int64]
    """[N]."""

    @classmethod
    def of_rows(cls, run: str, shards: ShardFolder, rows: npt.NDArray[np.int32]) -> "Images":
        """Return the images in these rows of the shards' entries."""
        entries = shards.entries.loc[rows]
        findings = shards.manifest.findings
        labels, patients = entries[list(findings)].to_numpy(), entries["patient"].to_numpy(dtype=np.int64)
        return cls(run, entries["image"].to_numpy(), findings, labels, patients)

    @classmethod
    def of_predictions(cls, run: str, shards: ShardFolder, predictions: Predictions) -> "Images":
        """Return the images that were predicted."""
        names = shards.entries.loc[predictions.rows]["image"].to_numpy()
        return cls(run, names, shards.manifest.findings, predictions.labels, predictions.patients)


def require_same_images(all_images: Sequence[Images], split: str) -> None:
    """Raise BadData, naming the first image that differs, unless all are the same images and labels.

    The shards may differ in their pixels: runs of different input sizes have different ones. Where each run was trained
    on the shards it is scored on, equal val and equal test images also mean that none was trained on what another is
    scored on; under --allow-other-shards they do not.
    """
    for other in all_images[1:]:
        first = all_images[0]
        here = f"{first.run} and {other.run} cannot be put together on {split}"
        if first.findings != other.findings:
            raise BadData(f"{here}: they predict other findings, or in another order")
        if only := set(first.names) ^ set(other.names):
            example = min(only)
            whose = first.run if example in set(first.names) else other.run
            raise BadData(
                f"{here}: {len(only)} images are scored for one of them alone, the first is {example}, of "
                f"{whose}; train both on shards with the same split"
            )
        differing = np.flatnonzero(first.names != other.names)
        if len(differing):
            raise BadData(
                f"{here}: the same images are in another order, from {first.names[differing[0]]} on; pack both "
                "from the same metadata"
            )
        wrong = (first.labels != other.labels).any(axis=1) | (first.patients != other.patients)
        if wrong.any():
            raise BadData(f"{here}: the labels or the patient of {first.names[wrong][0]} differ")


Named = tuple[str, ShardFolder, Predictions]
"""The name of a run, the shards it was scored on, and its predictions on one split of them."""


def average(members: Sequence[Named], split: str) -> Predictions:
    """Return the mean of the members' probabilities, with the rows of the first member's shards.

    The mean is taken in float64 and rounded to float32. Raises BadData as `require_same_images` does.
    """
    require_same_images([Images.of_predictions(*member) for member in members], split)
    _, _, first = members[0]
    total = sum(predictions.probabilities.astype(np.float64) for _, _, predictions in members)
    mean = np.asarray(total / len(members), dtype=np.float32)
    return Predictions(first.rows, first.labels, mean, first.patients)


def joint_folder(runs: Sequence[RunDirectory], sign: str) -> Path:
    """Return where results of several runs go: A+B/eval or A-vs-B/eval beside the first run."""
    return runs[0].path.parent / joint_name(runs, sign) / "eval"


def joint_name(runs: Sequence[RunDirectory], sign: str) -> str:
    """Return the runs' names joined by the sign; a digest of them where that is too long."""
    name = sign.join(run.name for run in runs)
    if len(name.encode()) <= _LONGEST_NAME:
        return name
    return f"{len(runs)}-runs-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
