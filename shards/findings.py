"""Findings: what a list of them may be, and the 14 of ChestX-ray14 with their text.

A shard folder, a run and a model file each name their findings; label vectors follow that order. NIH's order is that of
Wang et al., "ChestX-ray8", CVPR 2017, pp. 3462-3471, extended by the dataset's authors to 14.
"""

import difflib
from collections.abc import Sequence

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

MOST_FINDINGS = 500

_POSITION = {name: position for position, name in enumerate(FINDINGS)}


def check_findings(findings: Sequence[str]) -> None:
    """Raise ValueError naming what is wrong unless these are 1 to MOST_FINDINGS different names of findings.

    A name has 1 to 64 characters, all printable and none of them `|`, no blank at an end, does not begin as a formula
    does in a spreadsheet, and is not that of a mean.
    """
    if not 1 <= len(findings) <= MOST_FINDINGS:
        raise ValueError(f"{len(findings)} findings, where 1 to {MOST_FINDINGS} are possible")
    for position, name in enumerate(findings):
        plain = name.isprintable() and "|" not in name and name == name.strip() and name[:1] not in ("=", "+", "-", "@")
        if not (plain and 1 <= len(name) <= 64) or name in ("macro", "micro"):
            raise ValueError(f"{name[:64]!r} is no name of a finding")
        if name in findings[:position]:
            raise ValueError(f"the finding {name!r} is named twice")


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
