"""Predicted probabilities with their labels, as arrays and as cached CSV files."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from eval.result_files import CacheKey, is_valid, remove
from shards.csv_tables import escape_formulas, unescape_formulas
from shards.errors import BadData
from shards.findings import FINDINGS
from shards.folder import ShardFolder

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


@dataclass(frozen=True, eq=False)
class Predictions:
    """The output of a model on every image of one split, in row order."""

    rows: npt.NDArray[np.int32]
    """[N], of entries.csv."""
    labels: npt.NDArray[np.uint8]
    """[N, 14], from the shards."""
    probabilities: npt.NDArray[np.float32]
    """[N, 14], 0..1."""
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
        table[_PROBABILITIES] = self.probabilities.astype(np.float64)
        table[_LABELS] = self.labels
        return escape_formulas(table).to_csv(index=False, lineterminator="\n")

    @classmethod
    def from_csv(cls, path: Path, shards: ShardFolder) -> "Predictions":
        """Read a CSV that `to_csv` wrote.

        Raises BadData for another kind of file, a probability outside 0..1, a duplicate row, or a row whose image,
        patient or labels differ from the shards.
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
            raise BadData(f"{path}: row {row} is {table['image'][other[0]]}, in the shards {images[other[0]]}")
        probabilities, labels = table[_PROBABILITIES].to_numpy(), table[_LABELS].to_numpy()
        truth, patients = entries[list(FINDINGS)].to_numpy(), entries["patient"].to_numpy(dtype=np.int64)
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
