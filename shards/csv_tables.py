"""Read CSV tables within bounds, check each cell, and quote what a spreadsheet would run as a formula."""

import gzip
import io
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from shards.errors import BadData, ResourceMissing

_ROW, _WHOLE, _TEXT, _NAME = r"[0-9]{1,9}", r"[0-9]{1,18}", r"[^\0\r\n]{0,1000}", r"[^\0\r\n/]{1,255}"
_AGE, _CRC32, _SHA256 = f"-1|{_WHOLE}", r"[0-9]{1,10}", r"[0-9a-f]{64}"
_BEFORE = {"row": _ROW, "image": _NAME, "patient": _WHOLE, "split": "train|val|test"}
_BEHIND = {"age": _AGE, "sex": _TEXT, "view": _TEXT, "follow_up": _WHOLE, "folder": _TEXT, "source_sha256": _SHA256}
PACKED_CRC32 = "packed_crc32"
"""The last column: CRC-32 of the packed image member; folders packed before lack it."""
_REJECT_COLUMNS = {"image": _NAME, "reason": _TEXT, "folder": _TEXT, "source_sha256": f"({_SHA256})?"}
LARGEST = 64 * 2**20
"""Bytes of a CSV from outside, once decompressed. NIH's metadata has 7.6 MB."""
_SHOWN = 40  # characters of a wrong cell
# With any apostrophes before it, so that a text that has one of its own comes back with it.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")


def read_csv_text(path: Path) -> str:
    """Return the text of a CSV from outside (or .csv.gz), at most LARGEST bytes, without its byte order mark.

    Raises BadData naming the file and the row of what is not UTF-8 text; ResourceMissing where it may not be read.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except (FileNotFoundError, IsADirectoryError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadData(f"{path} cannot be read as CSV: {getattr(error, 'strerror', None) or error}") from error
    except OSError as error:
        raise ResourceMissing(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > LARGEST:
        raise BadData(f"{path} has more than {LARGEST:,} bytes, which is too many for what it holds")
    if (nul := data.find(b"\0")) >= 0:
        raise BadData(f"{path}, row {_line(data, nul)}: not text (a NUL byte)")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadData(f"{path}, row {_line(data, error.start)}: not UTF-8 text ({error.reason})") from error


def _line(data: bytes, position: int) -> int:
    return data.count(b"\n", 0, position) + 1


def largest_table(rows: int) -> int:
    """Return the most bytes that a table of so many rows may have: 1 KiB a row, of which NIH's need 155."""
    return 1024 * (rows + 1)


def parse_table(data: bytes, columns: Mapping[str, str], name: Path | str) -> pd.DataFrame:
    """Return a CSV of exactly these columns as text; `columns` gives the pattern that cells match.

    Raises BadData naming the file, the line and the column of the first cell that does not.
    """
    try:
        if b"\0" in data:
            raise ValueError("there is a NUL byte in it")
        table = pd.read_csv(io.BytesIO(data), dtype=str, na_filter=False, skip_blank_lines=False)
    except (ValueError, OverflowError) as error:  # pandas' own and a wrong encoding are ValueErrors
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadData(f"{name} cannot be read: {cause}") from error
    if table.columns.tolist() != list(columns) or not isinstance(table.index, pd.RangeIndex):
        found = ", ".join(map(str, table.columns))[:300]
        raise BadData(f"{name} cannot be read: its columns are {found}, not {', '.join(columns)}")
    for column, pattern in columns.items():
        wrong = np.flatnonzero(~table[column].str.fullmatch(pattern).to_numpy(dtype=bool))
        if len(wrong):
            cell = str(table[column].iloc[wrong[0]])[:_SHOWN]
            raise BadData(f"{name}, line {wrong[0] + 2}: {cell!r} is no {column}")
    return table


def entry_columns(findings: Sequence[str]) -> dict[str, str]:
    """Return column of entries.csv -> what a cell of it matches. An age of -1 is unknown.

    Raises ValueError for a finding that has the name of another column.
    """
    for finding in findings:
        if finding in (*_BEFORE, *_BEHIND, PACKED_CRC32):
            raise ValueError(f"{finding!r} is no name of a finding: another column of entries.csv has it")
    return {**_BEFORE, **dict.fromkeys(findings, "0|1"), **_BEHIND}


def parse_entries(data: bytes, findings: Sequence[str], name: Path | str) -> pd.DataFrame:
    """Return an entries.csv of these findings with `row` as the index: int64 numbers, uint8 findings, the rest text.

    Raises BadData as parse_table does, and where rows are not in ascending order or an image is there twice.
    """
    has_sums = PACKED_CRC32.encode() in data.partition(b"\n")[0]
    columns = {**entry_columns(findings), **({PACKED_CRC32: _CRC32} if has_sums else {})}
    table = parse_table(data, columns, name)
    whole = [column for column, pattern in columns.items() if pattern in (_ROW, _WHOLE, _AGE, _CRC32)]
    table = table.astype(dict.fromkeys(whole, "int64") | dict.fromkeys(findings, "uint8")).set_index("row")
    table = unescape_formulas(table)
    if not (table.index.is_monotonic_increasing and table.index.is_unique):
        raise BadData(f"{name}: its rows are not in order")
    twice = table["image"].duplicated()
    if twice.any():
        raise BadData(f"{name}: the image {table['image'][twice].iloc[0]} is there twice")
    return table


def parse_rejects(data: bytes, name: Path | str) -> pd.DataFrame:
    """Return a rejects.csv as text; raise BadData as parse_table does."""
    return unescape_formulas(parse_table(data, _REJECT_COLUMNS, name))


def escape_formulas(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with an apostrophe before each text that begins with `= + - @`, a tab or a carriage return."""

    def escape(cell: object) -> object:
        return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell

    return _map_text(table, escape)


def unescape_formulas(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table that `escape_formulas` was given."""

    def unescape(cell: object) -> object:
        return cell[1:] if isinstance(cell, str) and cell.startswith("'") and _FORMULA.match(cell) else cell

    return _map_text(table, unescape)


def _map_text(table: pd.DataFrame, change: Callable[[object], object]) -> pd.DataFrame:
    # Not by table.replace(regex=True), which takes five times as long.
    texts = [str(name) for name, column in table.items() if not pd.api.types.is_numeric_dtype(column)]
    return table.assign(**{name: table[name].map(change) for name in texts})
