"""Predicted probabilities beside the labels they are scored against, and their CSV."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from shards.findings import FINDINGS
from shards.folder import ShardFolder
from shards.publishing import publish_text


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model says of every image of one split, in row order."""

    rows: npt.NDArray[np.int32]
    """[N], of entries.csv."""
    labels: npt.NDArray[np.uint8]
    """[N, 14], from the shards."""
    probabilities: npt.NDArray[np.float32]
    """[N, 14], 0..1."""

    def to_csv(self, path: Path, shards: ShardFolder) -> None:
        """Write image, patient, row, `prob_FINDING` and `label_FINDING`, one line an image.

        Probabilities are written as float64 with all their digits: whoever reads them decides as
        the stored thresholds did.
        """
        entries = shards.entries.loc[self.rows]
        table = pd.DataFrame({"image": entries["image"], "patient": entries["patient"], "row": self.rows})
        for kind, values in (("prob", self.probabilities.astype(np.float64)), ("label", self.labels)):
            columns = [f"{kind}_{finding}" for finding in FINDINGS]
            table[columns] = pd.DataFrame(values, columns=columns, index=table.index)
        publish_text(path, table.to_csv(index=False, lineterminator="\n"))
