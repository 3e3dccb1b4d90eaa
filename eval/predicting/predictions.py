"""Predicted probabilities beside their labels, as a CSV too, and the proof of what they are of."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from eval.result_files import remove
from shards.errors import BadData
from shards.findings import FINDINGS
from shards.folder import ShardFolder
from shards.formulas import escape_formulas, unescape_formulas
from shards.publishing import publish_text, sha256_of

_PROBABILITIES = [f"prob_{finding}" for finding in FINDINGS]
_LABELS = [f"label_{finding}" for finding in FINDINGS]
# Goes up when the same weights on the same images get other numbers, or the CSV another form.
_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model says of every image of one split, in row order."""

    rows: npt.NDArray[np.int32]
    """[N], of entries.csv."""
    labels: npt.NDArray[np.uint8]
    """[N, 14], from the shards."""
    probabilities: npt.NDArray[np.float32]
    """[N, 14], 0..1."""
    patients: npt.NDArray[np.int64]
    """[N], whose image each is."""

    def select(self, rows: npt.NDArray[np.int32]) -> "Predictions":
        """Return those of these rows, in row order; rows without a prediction are passed over."""
        chosen = np.isin(self.rows, rows)
        return Predictions(
            self.rows[chosen], self.labels[chosen], self.probabilities[chosen], self.patients[chosen]
        )

    def to_csv(self, path: Path, shards: ShardFolder) -> None:
        """Write image, patient, row, `prob_FINDING` and `label_FINDING`, one line an image.

        Probabilities are written as float64 with all their digits: whoever reads them decides as
        the stored thresholds did, and `from_csv` returns them to the last bit.
        """
        images = shards.entries.loc[self.rows]["image"].to_numpy()
        table = pd.DataFrame({"image": images, "patient": self.patients, "row": self.rows})
        table[_PROBABILITIES] = self.probabilities.astype(np.float64)
        table[_LABELS] = self.labels
        publish_text(path, escape_formulas(table).to_csv(index=False, lineterminator="\n"))

    @classmethod
    def from_csv(cls, path: Path, shards: ShardFolder) -> "Predictions":
        """Read what `to_csv` wrote; BadData where it is another file, or its rows are other images."""
        try:
            # Whatever pandas may do to the last bit of a float64, the float32 it came from is the nearest.
            table = unescape_formulas(pd.read_csv(path, keep_default_na=False))
            probabilities = table[_PROBABILITIES].to_numpy(dtype=np.float32)
            labels, patients = table[_LABELS].to_numpy(dtype=np.uint8), table["patient"].to_numpy(np.int64)
            rows = table["row"].to_numpy(dtype=np.int32)
            images = shards.entries.loc[rows]["image"].to_numpy()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadData(f"{path} is damaged: {error or type(error).__name__}") from error
        other = np.flatnonzero(table["image"].to_numpy() != images)
        if len(other):
            row = rows[other[0]]
            raise BadData(
                f"{path}: row {row} is {table['image'][other[0]]}, in the shards {images[other[0]]}"
            )
        return cls(rows, labels, probabilities, patients)


@dataclass(frozen=True)
class Proof:
    """What decides predictions: equal proofs, equal predictions up to the rounding of another device."""

    weights_sha256: str
    """As `ModelHeader` has it."""
    manifest_sha256: str
    """Of the shards; it names their pixels and labels."""
    split: str
    tta: bool
    """Whether images and their mirrors were averaged."""


def store(predictions: Predictions, path: Path, proof: Proof, shards: ShardFolder) -> None:
    """Write the CSV `path` and beside it, as .json, the proof of what it holds; the proof last."""
    predictions.to_csv(path, shards)
    record = _record(proof, sha256_of(path))
    publish_text(path.with_suffix(".json"), json.dumps(record, indent=1) + "\n")


def forget(folder: Path, proof: Proof) -> None:
    """Remove every note under `folder`/*/ that says some CSV holds the predictions of this proof.

    Called before such are made anew: else the older ones, of an equal proof, could be found again. Raises
    ResourceMissing from the disk.
    """
    for path in list(_proved(folder, proof)):
        remove(path.parent, [path.with_suffix(".json").name])


def find_stored(folder: Path, proof: Proof, shards: ShardFolder) -> Predictions | None:
    """Return the predictions of this proof under `folder`/*/, None where none are or they were changed."""
    for path in _proved(folder, proof):
        return Predictions.from_csv(path, shards)
    return None


def is_stored(path: Path, proof: Proof) -> bool:
    """Tell whether the CSV `path` is there, unchanged, and of this proof."""
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return bool(
            record == _record(proof, record["csv_sha256"]) and record["csv_sha256"] == sha256_of(path)
        )
    except (OSError, ValueError, KeyError, TypeError):  # no such file, or one that was cut off
        return False


def _proved(folder: Path, proof: Proof) -> Iterator[Path]:
    for note in sorted(folder.glob("*/*predictions.json")):
        if is_stored(note.with_suffix(".csv"), proof):
            yield note.with_suffix(".csv")


def _record(proof: Proof, csv_sha256: str) -> dict[str, Any]:
    return {"format": _FORMAT, **dataclasses.asdict(proof), "csv_sha256": csv_sha256}
