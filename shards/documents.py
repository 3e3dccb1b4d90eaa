"""Read untrusted JSON and TOML within bounds of size and depth and validate them against a schema."""

import re
import sys
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from shards.errors import BadData, ResourceMissing

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
Scalar = str | int | float | bool | None
Value = Scalar | list[Scalar]
"""What a field may hold that nobody reads: nothing nested."""

LARGEST = 64 * 2**20
"""Bytes of a JSON file. All of NIH's manifest has 32 KB, a safetensors header of ViT-B/16 20 KB."""
# Tomllib's time and memory grow with the square of a key's dots: 50,000 of them took 7 GB. All options
# of a run are 2 KB.
_LARGEST_TOML = 16 * 2**10
_LONGEST_CAUSE = 300  # characters; a value that is quoted in it may be as long as the file
_FIELD = re.compile(r" - at `\$\.?(.*)`$")


def read_bytes(path: Path, largest: int = LARGEST) -> bytes:
    """Return the bytes of a file that has at most `largest`.

    Raises BadData where it is missing, no file, or larger; ResourceMissing where it may not be read.
    """
    try:
        if path.exists() and not path.is_file():
            raise BadData(f"{path} is not a file")
        with path.open("rb") as file:
            data = file.read(largest + 1)
    except FileNotFoundError as error:
        raise BadData(f"{path} is missing") from error
    except OSError as error:
        raise ResourceMissing(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > largest:
        raise BadData(f"{path} has more than {largest:,} bytes, which is too many for what it holds")
    return data


def read_json(path: Path, schema: type[T], *, largest: int = LARGEST) -> T:
    """Return a JSON file as `schema`: a dataclass, a TypedDict, or any type that msgspec converts to.

    Types are strict, and fields that the schema does not name are passed over. Raises BadData naming the file and the
    field; ResourceMissing where the file may not be read.
    """
    return parse_json(read_bytes(path, largest), schema, path)


def parse_json(data: bytes | str, schema: type[T], name: Path | str) -> T:
    """Return JSON text as `schema`; as `read_json`, for text that is called `name` in messages."""
    try:
        return msgspec.json.decode(data, type=schema)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadData(f"{name} is damaged: {_cause(error)}") from error


def convert(values: Any, schema: type[T], name: Path | str) -> T:
    """Return plain values, a dict for example, as `schema`; as `parse_json`."""
    try:
        return msgspec.convert(values, schema)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise BadData(f"{name} is damaged: {_cause(error)}") from error


def read_toml(path: Path) -> dict[str, Any]:
    """Return a TOML file of at most 16 KiB; errors are those of `read_json`."""
    data = read_bytes(path, _LARGEST_TOML)
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # tomllib's own error and a wrong encoding are ValueErrors
        raise BadData(f"{path} is no TOML: {_cause(error)}") from error


def _cause(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = (str(error).splitlines() or [type(error).__name__])[0]
    if field := _FIELD.search(text):
        text = f"{field[1] or 'it'}: {text[: field.start()]}"
    return text if len(text) <= _LONGEST_CAUSE else f"{text[:_LONGEST_CAUSE]} ..."
