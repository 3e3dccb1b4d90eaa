"""Which images belong to which group: by sex, decade of age, view, and first visit or follow-up."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

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
        UNKNOWN
        if not 0 <= years <= _OLDEST
        else f"{decade}-{decade + 9}"
        if decade < _LAST_DECADE
        else f"{decade}+"
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
