"""Predicted probabilities with their labels, as arrays and as CSV."""

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
from shards.documents import read_json
from shards.errors import BadData, ResourceMissing
from shards.files import atomic_write_text, sha256_of
from shards.findings import FINDINGS
from shards.folder import ShardFolder
from shards.formulas import escape_formulas, unescape_formulas

_PROBABILITIES = [f"prob_{finding}" for finding in FINDINGS]
_LABELS = [f"label_{finding}" for finding in FINDINGS]
_TYPES: dict[str, type] = {
    "image": str,
    "patient": np.int64,
    "row": np.int64,
    **dict.fromkeys(_PROBABILITIES, np.float64),
    **dict.fromkeys(_LABELS, np.int64),
}
# Bytes; 14 probabilities take 25 each at most.
_LONGEST_LINE = 4096
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
        atomic_write_text(path, escape_formulas(table).to_csv(index=False, lineterminator="\n"))

    @classmethod
    def from_csv(cls, path: Path, shards: ShardFolder) -> "Predictions":
        """Read what `to_csv` wrote.

        Raises BadData where it is another file, a probability is none, or a row stands there twice or is of
        another image, patient or labels than in the shards.
        """
        try:
            if path.stat().st_size > _LONGEST_LINE * (len(shards.entries) + 1):
                raise ValueError("it is longer than the predictions on all images are")
            # Whatever pandas may do to the last bit of a float64, the float32 it came from is the nearest.
            table = pd.read_csv(path, keep_default_na=False, usecols=list(_TYPES), dtype=_TYPES)
            table = unescape_formulas(table)
            entries = shards.entries.loc[table["row"]]
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise BadData(f"{path} is damaged: {(str(error) or type(error).__name__).strip()}") from error
        rows, images = table["row"].to_numpy(), entries["image"].to_numpy()
        other = np.flatnonzero(table["image"].to_numpy() != images)
        if len(other):
            row = rows[other[0]]
            raise BadData(
                f"{path}: row {row} is {table['image'][other[0]]}, in the shards {images[other[0]]}"
            )
        probabilities, labels = table[_PROBABILITIES].to_numpy(), table[_LABELS].to_numpy()
        truth, patients = entries[list(FINDINGS)].to_numpy(), entries["patient"].to_numpy(dtype=np.int64)
        for wrong, what in (
            (table["row"].duplicated().to_numpy(), "stands there twice"),
            ((labels != truth).any(axis=1), "has other labels than in the shards"),
            (table["patient"].to_numpy() != patients, "is of another patient in the shards"),
            (~((probabilities >= 0) & (probabilities <= 1)).all(axis=1), "has a probability not in 0..1"),
        ):
            if wrong.any():
                raise BadData(f"{path} is damaged: row {rows[wrong][0]} {what}")
        return cls(rows.astype(np.int32), labels.astype(np.uint8), probabilities.astype(np.float32), patients)


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
    atomic_write_text(path.with_suffix(".json"), json.dumps(record, indent=1) + "\n")


def forget(folder: Path, proof: Proof) -> None:
    """Remove every note under `folder`/*/ that says some CSV holds the predictions of this proof.

    Called before such are made anew: else the older ones, of an equal proof, could be found again. Raises
    ResourceMissing from the disk.
    """
    for path in list(_proved(folder, proof)):
        remove(path.parent, [path.with_suffix(".json").name])


def find_stored(
    folder: Path, proof: Proof, shards: ShardFolder, first: Path | None = None
) -> tuple[Path, Predictions] | None:
    """Return the predictions of this proof under `folder`/*/, and where; None where none are.

    `first` is looked at before all others. Those that were changed, or are no such predictions whatever
    their note says, are passed over.
    """
    for path in sorted(_proved(folder, proof), key=lambda path: path != first):
        try:
            found = Predictions.from_csv(path, shards)
        except BadData:
            continue
        if np.array_equal(found.rows, shards.rows(proof.split)):
            return path, found
    return None


def is_stored(path: Path, proof: Proof) -> bool:
    """Tell whether the CSV `path` is there, unchanged, and of this proof."""
    try:
        record = read_json(path.with_suffix(".json"), dict[str, Any])
        return path.is_file() and record == _record(proof, sha256_of(path))
    except (BadData, ResourceMissing, OSError):  # no such file, or one that was cut off
        return False


def _proved(folder: Path, proof: Proof) -> Iterator[Path]:
    for note in sorted(folder.glob("*/*predictions.json")):
        if is_stored(note.with_suffix(".csv"), proof):
            yield note.with_suffix(".csv")


def _record(proof: Proof, csv_sha256: str) -> dict[str, Any]:
    return {"format": _FORMAT, **dataclasses.asdict(proof), "csv_sha256": csv_sha256}
