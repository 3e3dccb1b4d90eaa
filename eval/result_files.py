"""Result files: JSON without NaN, CSV tables, and cached results beside the key they were computed from."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from shards.csv_tables import escape_formulas
from shards.documents import read_json
from shards.errors import BadData, ResourceMissing
from shards.files import atomic_write_text, sha256_of

# Goes up when the same key gives other numbers; that invalidates stored predictions, too.
_FORMAT = 1


def json_text(record: dict[str, Any]) -> str:
    """Return a record as the text of a JSON file; ValueError for NaN, which JSON does not have."""
    return json.dumps(record, indent=1, allow_nan=False) + "\n"


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write `json_text` to `path` atomically; ResourceMissing from the disk."""
    atomic_write_text(path, json_text(record))


def write_table(path: Path, frame: pd.DataFrame, *, index: bool = True) -> None:
    """Write a table as CSV with all digits, atomically; ResourceMissing from the disk.

    Text that a spreadsheet would calculate is escaped as `shards.csv_tables` does it.
    """
    atomic_write_text(path, escape_formulas(frame).to_csv(index=index, lineterminator="\n"))


def remove(folder: Path, patterns: Iterable[str]) -> None:
    """Remove the files of `folder` whose names match one of the patterns; ResourceMissing from the disk."""
    try:
        for path in [path for pattern in patterns for path in folder.glob(pattern)]:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise ResourceMissing(f"cannot write to {folder}: {error.strerror}") from error


@dataclass(frozen=True)
class CacheKey:
    """Everything that determines a result: equal keys, equal results up to the rounding of another device."""

    weights_sha256: str
    """`ModelHeader.weights_sha256`."""
    manifest_sha256: str
    """Of the shards; it determines their pixels and labels."""
    options: dict[str, Any]
    """JSON values: the images and options that the result depends on."""

    def to_json(self) -> dict[str, Any]:
        """Return the part of a record that is not its content."""
        digests = {"weights_sha256": self.weights_sha256, "manifest_sha256": self.manifest_sha256}
        return {"format": _FORMAT, **digests, **self.options}


def write_record(path: Path, key: CacheKey, **content: Any) -> None:
    """Write the JSON record `path`, after the files that it vouches for; ResourceMissing from the disk."""
    write_json(path, {**key.to_json(), **content})


def read_record(path: Path) -> dict[str, Any]:
    """Return a record, whatever its key; empty where there is none or it is damaged."""
    try:
        return read_json(path, dict[str, Any])
    except (BadData, ResourceMissing):
        return {}


def has_key(record: dict[str, Any], key: CacheKey) -> bool:
    """Return whether the key of a record contains all of this one."""
    return key.to_json().items() <= record.items()


def write_csv(path: Path, text: str, key: CacheKey) -> None:
    """Write a CSV and, last, its record beside it as .json; ResourceMissing from the disk."""
    atomic_write_text(path, text)
    write_record(path.with_suffix(".json"), key, csv_sha256=sha256_of(path))


def is_valid(path: Path, key: CacheKey) -> bool:
    """Return whether the CSV `path` exists, is unchanged, and has this key."""
    record = read_record(path.with_suffix(".json"))
    try:
        return has_key(record, key) and path.is_file() and record.get("csv_sha256") == sha256_of(path)
    except OSError:
        return False
