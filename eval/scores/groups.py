"""Groups of images by sex, age, view and visit, with the per-patient statistics to resample them."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.sparse import csr_array

from eval.scores.ranking import Ranking, rank
from eval.scores.thresholds import Floats

_OLDEST = 120  # years, as in shards.entries; the 2017 metadata has ages of up to 414
_LAST_DECADE = 90
UNKNOWN = "unknown"


class Group(NamedTuple):
    """Some of the images of a split."""

    attribute: str
    """sex, age, view or visit."""
    name: str
    images: npt.NDArray[np.bool_]
    """[N], which they are."""


def group_images(entries: pd.DataFrame) -> list[Group]:
    """Divide the images once by each attribute; every image is in one group of each.

    `entries` has a row for each image, with age (years), sex, view and follow_up. The groups, in
    this order: sex and view as they are spelt, decades of age from `0-9` to `80-89` and then `90+`, and
    `first` for NIH's follow-up number 0, which each patient has once, or `follow-up`. A group without
    an image is not there. A sex or view that is empty, and an age under 0 or over 120, is `unknown`.
    """
    decades = entries["age"].to_numpy() // 10 * 10
    age = [
        UNKNOWN if not 0 <= years <= _OLDEST else f"{decade}-{decade + 9}" if decade < _LAST_DECADE else f"{decade}+"
        for years, decade in zip(entries["age"], np.minimum(decades, _LAST_DECADE), strict=True)
    ]
    columns: dict[str, Any] = {
        "sex": entries["sex"].replace("", UNKNOWN),
        "age": age,
        "view": entries["view"].replace("", UNKNOWN),
        "visit": np.where(entries["follow_up"] == 0, "first", "follow-up"),
    }
    groups = []
    for attribute, column in columns.items():
        names = np.asarray(column, dtype=np.str_)
        groups += [Group(attribute, str(name), names == name) for name in np.unique(names)]
    return groups


Bools = npt.NDArray[np.bool_]

FEWEST = 10
"""Patients with, and patients without a finding that images must be of to be scored on it: a resample
of the patients then lacks one of the two with a probability of at most 2 exp(-10)."""


@dataclass(frozen=True, eq=False)
class GroupStats:
    """Some images, summed up per patient as far as weights of the patients allow."""

    images: int
    patients: int
    """Those that have an image here; weights are of all U patients of the split."""
    positives: npt.NDArray[np.int64]
    """[F], images."""
    enough: Bools
    """[F], whether FEWEST patients have the finding and FEWEST lack it."""
    rankings: tuple[Ranking, ...]
    recalled: csr_array
    """[F, U], true positives of each patient."""
    recallable: csr_array
    """[F, U], positives of each patient."""

    def measure(self, weights: Floats) -> tuple[Floats, Floats]:
        """Return AUROC and recall, both [F, R], where patients weigh `weights` [U, R]."""
        auroc = np.stack([ranking.measure(weights)[0] for ranking in self.rankings])
        with np.errstate(invalid="ignore"):  # no positive: NaN
            return auroc, np.asarray((self.recalled @ weights) / (self.recallable @ weights))


def group_stats(
    truth: Bools, probabilities: Floats, predicted: Bools, units: npt.NDArray[np.intp], patients: int
) -> GroupStats:
    """Sum up images: `units` is [N], below `patients`; the other arrays are [N, F]."""
    recallable, lacking = _per_patient(truth, units, patients), _per_patient(~truth, units, patients)
    return GroupStats(
        images=len(truth),
        patients=len(np.unique(units)),
        positives=truth.sum(axis=0),
        enough=(_patients_in(recallable) >= FEWEST) & (_patients_in(lacking) >= FEWEST),
        rankings=tuple(
            rank(positive, column, units, patients) for positive, column in zip(truth.T, probabilities.T, strict=True)
        ),
        recalled=_per_patient(truth & predicted, units, patients),
        recallable=recallable,
    )


def _per_patient(chosen: Bools, units: npt.NDArray[np.intp], patients: int) -> csr_array:
    rows, columns = np.nonzero(chosen)
    return csr_array((np.ones(len(rows)), (columns, units[rows])), shape=(chosen.shape[1], patients))


def _patients_in(sums: csr_array) -> npt.NDArray[np.intp]:
    sums.sum_duplicates()
    return np.asarray(np.diff(sums.indptr), dtype=np.intp)
