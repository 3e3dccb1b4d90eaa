"""Predicted probabilities with their labels, as arrays and as cached CSV files."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from eval.result_files import CacheKey, is_valid, remove
from shards.csv_tables import escape_formulas, unescape_formulas
from shards.errors import BadData
from shards.folder import ShardFolder

# Bytes of a line; a finding's probability and label take 30 at most.
_LONGEST_BEGINNING, _LONGEST_FINDING = 4096, 32


@dataclass(frozen=True, eq=False)
class Predictions:
    """The output of a model on every image of one split, in row order."""

    rows: npt.NDArray[np.int32]
    """[N], of entries.csv."""
    labels: npt.NDArray[np.uint8]
    """[N, F], from the shards."""
    probabilities: npt.NDArray[np.float32]
    """[N, F], 0..1."""
    patients: npt.NDArray[np.int64]
    """[N], of each image."""

    def select(self, rows: npt.NDArray[np.int32]) -> "Predictions":
        """Return the predictions on these rows, in row order; rows without one are skipped."""
        chosen = np.isin(self.rows, rows)
        return Predictions(self.rows[chosen], self.labels[chosen], self.probabilities[chosen], self.patients[chosen])

    def to_csv(self, shards: ShardFolder) -> str:
        """Return a CSV of image, patient, row, `prob_FINDING` and `label_FINDING`, one line per image.

        Probabilities are written as float64 with all digits: `from_csv` returns them to the last bit, and stored
        thresholds decide alike.
        """
        images = shards.entries.loc[self.rows]["image"].to_numpy()
        table = pd.DataFrame({"image": images, "patient": self.patients, "row": self.rows})
        columns: dict[str, npt.NDArray[Any]] = {}
        for prefix, values in (("prob", self.probabilities.astype(np.float64)), ("label", self.labels)):
            columns |= {f"{prefix}_{name}": values[:, n] for n, name in enumerate(shards.manifest.findings)}
        table = pd.concat([table, pd.DataFrame(columns)], axis="columns")
        return escape_formulas(table).to_csv(index=False, lineterminator="\n")

    @classmethod
    def from_csv(cls, path: Path, shards: ShardFolder) -> "Predictions":
        """Read a CSV that `to_csv` wrote.

        Raises BadData for another kind of file, a probability outside 0..1, a duplicate row, or a row whose image,
        patient or labels differ from the shards.
        """
        findings = shards.manifest.findings
        probability_of, label_of = ([f"{prefix}_{finding}" for finding in findings] for prefix in ("prob", "label"))
        types: dict[str, type] = {
            "image": str,
            "patient": np.int64,
            "row": np.int64,
            **dict.fromkeys(probability_of, np.float64),
            **dict.fromkeys(label_of, np.int64),
        }
        longest = _LONGEST_BEGINNING + _LONGEST_FINDING * len(findings)
        try:
            if path.stat().st_size > longest * (len(shards.entries) + 1):
                raise ValueError("it is longer than the predictions on all images are")
            # Whatever pandas may do to the last bit of a float64, the float32 it came from is the nearest.
            table = pd.read_csv(path, keep_default_na=False, usecols=list(types), dtype=types)
            table = unescape_formulas(table)
            entries = shards.entries.loc[table["row"]]
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise BadData(f"{path} is damaged: {(str(error) or type(error).__name__).strip()}") from error
        rows, images = table["row"].to_numpy(), entries["image"].to_numpy()
        other = np.flatnonzero(table["image"].to_numpy() != images)
        if len(other):
            row = rows[other[0]]
            raise BadData(f"{path}: row {row} is {table['image'][other[0]]}, in the shards {images[other[0]]}")
        probabilities, labels = table[probability_of].to_numpy(), table[label_of].to_numpy()
        truth, patients = entries[list(findings)].to_numpy(), entries["patient"].to_numpy(dtype=np.int64)
        for wrong, what in (
            (table["row"].duplicated().to_numpy(), "occurs twice"),
            ((labels != truth).any(axis=1), "has other labels than in the shards"),
            (table["patient"].to_numpy() != patients, "is of another patient in the shards"),
            (~((probabilities >= 0) & (probabilities <= 1)).all(axis=1), "has a probability not in 0..1"),
        ):
            if wrong.any():
                raise BadData(f"{path} is damaged: row {rows[wrong][0]} {what}")
        return cls(rows.astype(np.int32), labels.astype(np.uint8), probabilities.astype(np.float32), patients)


def find_stored(
    folder: Path, key: CacheKey, shards: ShardFolder, first: Path | None = None
) -> tuple[Path, Predictions] | None:
    """Return a CSV under `folder`/*/ and the predictions of this key in it; None where there is none.

    Tries `first` before all others. Skips files that changed, and files that hold no such predictions whatever their
    record says.
    """
    for path in _valid(folder, key, first):
        try:
            found = Predictions.from_csv(path, shards)
        except BadData:
            continue
        if np.array_equal(found.rows, shards.rows(key.options["split"])):
            return path, found
    return None


def forget_stored(folder: Path, key: CacheKey) -> None:
    """Invalidate all predictions of this key under `folder`/*/; ResourceMissing from the disk.

    Called before new ones are stored, lest older ones of an equal key be found again.
    """
    for path in list(_valid(folder, key)):
        remove(path.parent, [path.with_suffix(".json").name])


def _valid(folder: Path, key: CacheKey, first: Path | None = None) -> Iterator[Path]:
    """Yield the CSVs of predictions of this key: `first`, then in the order of names."""
    paths = sorted(record.with_suffix(".csv") for record in folder.glob("*/*predictions.json"))
    for path in sorted(paths, key=lambda path: path != first):
        if is_valid(path, key):
            yield path
