"""Select the images to score: val, test, or a list of names."""

import re
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

from shards.errors import BadData
from shards.folder import ShardFolder
from shards.splits import SPLITS, read_list

SCORED = ("val", "test")
# How the folder of a what-if ends: with the mirror, another rule or another calibration.
_WHAT_IF = re.compile(r"-(tta|youden|\w+=.*)$")


@dataclass(frozen=True)
class Selection:
    """What `--split` names."""

    name: str
    """val, test, or the list's file name without its suffix; also the name of the results folder."""
    images: frozenset[str] | None = None
    """The names on the list; None for a whole split."""

    @classmethod
    def parse(cls, text: str) -> "Selection":
        """Read `val`, `test` or the path of a list of image names, one a line.

        UsageError for anything else, and for a list named like a split or like the folder of a what-if; BadData for a
        list that cannot be read or is empty.
        """
        if text in SCORED:
            return cls(text)
        path = Path(text)
        if not path.is_file():
            why = "the model was fitted on train" if text == "train" else "there is no such file"
            raise click.UsageError(f"--split {text!r} is neither val nor test, nor a list of images: {why}")
        if path.stem in SPLITS:
            raise click.UsageError(f"--split {text!r}: a list named {path.stem} would pass for that split")
        if _WHAT_IF.search(path.stem):
            raise click.UsageError(f"--split {text!r}: a list named {path.stem} would pass for that split of a what-if")
        return cls(path.stem, read_list(path))

    def rows(self, shards: ShardFolder) -> npt.NDArray[np.int32]:
        """Return the rows to score, ascending.

        Raises BadData naming an image that the shards do not hold, or that is in train.
        """
        if self.images is None:
            return shards.rows(self.name)
        listed = shards.entries[shards.entries["image"].isin(self.images)]
        if missing := sorted(self.images.difference(listed["image"])):
            raise BadData(
                f"{len(missing)} of {len(self.images)} images on the list {self.name} are not in "
                f"{shards.path}, the first is {missing[0]}"
            )
        train = listed["image"][listed["split"] == "train"]
        if len(train):
            raise BadData(
                f"{len(train)} of {len(self.images)} images on the list {self.name} are in train, where "
                f"models are fitted, the first is {train.iloc[0]}; leave them out"
            )
        return np.sort(listed.index.to_numpy(dtype=np.int32))
