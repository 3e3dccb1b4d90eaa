"""Split entries by patient into train, val and test, and verify that no patient is in two of them.

Every rule is a pure function from a table of entries to one split name per entry. Whole patients are assigned, never
single images: follow-ups of one patient look alike, and a model that saw one in training would be scored on its memory.
"""

import itertools
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from shards.documents import read_bytes
from shards.errors import BadData

SPLITS = ("train", "val", "test")
Names = npt.NDArray[np.str_]
VAL_FRACTION = 0.125  # 1/8 of train_val, as the common 70/10/20 split has it
RANDOM_FRACTIONS = (0.7, 0.1, 0.2)


def split_official(
    entries: pd.DataFrame, train_val: frozenset[str], test: frozenset[str], val_fraction: float, seed: int
) -> Names:
    """Follow NIH's lists; val is drawn out of train_val by patient, seeded.

    `val_fraction` is the share of train_val's images that val gets, to within one patient. Returns one name of SPLITS
    per entry. Raises BadData for an image on neither or both lists.
    """
    names = split_by_lists(entries, train_val, frozenset(), test)
    pool = entries[names == "train"]
    val_patients = _draw_patients(pool["patient"].to_numpy(), (1 - val_fraction, val_fraction), seed)[1]
    names[(names == "train") & entries["patient"].isin(val_patients).to_numpy()] = "val"
    return names


def split_random(entries: pd.DataFrame, fractions: tuple[float, float, float], seed: int) -> Names:
    """Draw patients at random, seeded, so that train, val and test get these shares of images."""
    names = np.full(len(entries), "train", dtype="<U5")
    drawn = _draw_patients(entries["patient"].to_numpy(), fractions, seed)
    for split, patients in zip(SPLITS, drawn, strict=True):
        names[entries["patient"].isin(patients).to_numpy()] = split
    return names


def split_by_lists(entries: pd.DataFrame, train: frozenset[str], val: frozenset[str], test: frozenset[str]) -> Names:
    """Follow three lists of image names; raises BadData for an image on none or on two."""
    image = entries["image"]
    names = np.full(len(image), "", dtype="<U5")
    for split, listed in zip(SPLITS, (train, val, test), strict=True):
        on_list = image.isin(listed).to_numpy()
        twice = on_list & (names != "")
        if twice.any():
            raise BadData(f"image {image.to_numpy()[twice][0]} is on two lists of the split")
        names[on_list] = split
    if (names == "").any():
        missing = image.to_numpy()[names == ""]
        raise BadData(f"{len(missing)} images are on no list of the split, the first is {missing[0]}")
    return names


def verify_disjoint(entries: pd.DataFrame, names: Names) -> dict[str, int]:
    """Return the number of patients per split; raise BadData naming a patient found in two."""
    patients = {split: set(entries.loc[names == split, "patient"].tolist()) for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        shared = patients[one] & patients[other]
        if shared:
            raise BadData(
                f"{len(shared)} patients are in both {one} and {other}, the first is patient {min(shared)}; "
                "a split must be by patient"
            )
    return {split: len(patients[split]) for split in SPLITS}


def read_list(path: Path) -> frozenset[str]:
    """Read a list of image names, one a line; raise BadData where it is missing or empty."""
    try:
        names = frozenset(read_bytes(path).decode("utf-8-sig").split())
    except (BadData, UnicodeDecodeError) as error:
        raise BadData(f"cannot read the list {path}: {error}") from error
    if not names:
        raise BadData(f"the list {path} names no image")
    return names


def _draw_patients(
    patient_of_image: npt.NDArray[np.int64], fractions: tuple[float, ...], seed: int
) -> list[npt.NDArray[np.int64]]:
    # Shuffled patients in a row, cut where the running count of images is nearest to each share.
    patients, images = np.unique(patient_of_image, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(patients))
    running = np.concatenate([[0], np.cumsum(images[order])])
    targets = np.cumsum(fractions)[:-1] * running[-1]
    cuts = [int(np.abs(running - target).argmin()) for target in targets]
    return [np.sort(part) for part in np.split(patients[order], cuts)]
