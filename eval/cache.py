"""Cached results: beside each file a JSON record of the key it was computed from."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.result_files import remove, write_json
from shards.documents import read_json
from shards.errors import BadData, ResourceMissing
from shards.files import atomic_write_text, sha256_of

# Goes up when the same key gives other numbers, or the files get another form.
_FORMAT = 1


@dataclass(frozen=True)
class CacheKey:
    """Everything that determines a result: equal keys, equal results up to the rounding of another device."""

    weights_sha256: str
    """As `ModelHeader` has it."""
    manifest_sha256: str
    """Of the shards; it determines their pixels and labels."""
    options: dict[str, Any]
    """JSON values: the images and options that the result depends on."""
    nested: bool = False
    """Whether records hold the key under `proof`, as those of heat maps do, or beside their content."""

    def to_json(self) -> dict[str, Any]:
        """Return what a record holds beside its content."""
        digests = {"weights_sha256": self.weights_sha256, "manifest_sha256": self.manifest_sha256}
        key = {**digests, **self.options}
        return {"format": _FORMAT, **({"proof": key} if self.nested else key)}


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
    """Tell whether a record is of this very key."""
    return key.to_json().items() <= record.items()


def write_csv(path: Path, text: str, key: CacheKey) -> None:
    """Write a CSV and, last, its record beside it as .json; ResourceMissing from the disk."""
    atomic_write_text(path, text)
    write_record(path.with_suffix(".json"), key, csv_sha256=sha256_of(path))


def is_valid(path: Path, key: CacheKey) -> bool:
    """Tell whether the CSV `path` is there, unchanged, and of this key."""
    record = read_record(path.with_suffix(".json"))
    try:
        return has_key(record, key) and path.is_file() and record.get("csv_sha256") == sha256_of(path)
    except OSError:
        return False


def find_valid(folder: Path, pattern: str, key: CacheKey) -> Iterator[Path]:
    """Yield the CSVs under `folder` of this key whose records match the pattern, in the order of names."""
    for record in sorted(folder.glob(pattern)):
        if is_valid(record.with_suffix(".csv"), key):
            yield record.with_suffix(".csv")


def invalidate(record: Path, *files: str) -> None:
    """Remove a record, and files beside it that match these patterns; ResourceMissing from the disk."""
    remove(record.parent, [record.name, *files])
