"""Write result files: JSON without NaN, CSV tables, and no leftovers of earlier results."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from shards.csv_tables import escape_formulas
from shards.errors import ResourceMissing
from shards.files import atomic_write_text


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
    """Remove the files of `folder` whose names fit one of the patterns; ResourceMissing from the disk."""
    try:
        for path in [path for pattern in patterns for path in folder.glob(pattern)]:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise ResourceMissing(f"cannot write to {folder}: {error.strerror}") from error
