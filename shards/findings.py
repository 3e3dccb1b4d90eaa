"""The 14 findings of ChestX-ray14, in the order of every label vector.

The order is that of Wang et al., "ChestX-ray8", CVPR 2017, pp. 3462-3471, extended by the
dataset's authors to 14. Label vectors in shards, batches, models and reports follow it.
"""

import difflib

import numpy as np
import numpy.typing as npt

FINDINGS: tuple[str, ...] = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
NO_FINDING = "No Finding"
# Spellings found in releases of the metadata (`Infiltrate` in BBox_List_2017.csv).
ALIASES: dict[str, str] = {"Pleural Thickening": "Pleural_Thickening", "Infiltrate": "Infiltration"}

_POSITION = {name: position for position, name in enumerate(FINDINGS)}


def canonical(name: str) -> str:
    """Return the name that FINDINGS has for `name`, which may be an alias.

    Raises ValueError naming the nearest valid finding for any other text.
    """
    known = ALIASES.get(name, name)
    if known in _POSITION:
        return known
    nearest = difflib.get_close_matches(name, [*FINDINGS, NO_FINDING], n=1, cutoff=0.0)
    raise ValueError(f"unknown finding {name!r}; the nearest valid name is {nearest[0]!r}")


def to_multi_hot(text: str) -> npt.NDArray[np.uint8]:
    """Turn `"Mass|Nodule"` into a uint8 vector of shape [14] in FINDINGS order.

    `"No Finding"` alone is the zero vector; blanks around a name are passed over. Raises ValueError for an unknown
    finding, an empty text, a finding named twice, or `No Finding` beside a finding.

    >>> to_multi_hot("Hernia").tolist()
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    """
    labels = np.zeros(len(FINDINGS), dtype=np.uint8)
    names = [name.strip() for name in text.split("|")]
    if names == [NO_FINDING]:
        return labels
    for name in names:
        if name == NO_FINDING:
            raise ValueError(f"{NO_FINDING!r} beside a finding in {text!r}")
        position = _POSITION[canonical(name)]
        if labels[position]:
            raise ValueError(f"{name!r} occurs twice in {text!r}")
        labels[position] = 1
    return labels


def to_text(labels: npt.NDArray[np.uint8]) -> str:
    """Turn a multi-hot vector of shape [14] back into NIH's text, `"No Finding"` for zeros."""
    return "|".join(name for name, hot in zip(FINDINGS, labels, strict=True) if hot) or NO_FINDING
