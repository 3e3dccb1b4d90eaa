"""A CSV as a table, where each cell stands under one column that has its own name."""

import csv
import gzip
import zlib
from pathlib import Path

import pandas as pd

from shards.errors import BadData


def read_csv(path: Path, *, typed: bool) -> pd.DataFrame:
    """Read a CSV with a header (or .gz): columns of what they look like if `typed`, else of text.

    Raises BadData naming the file and what is wrong with it: it is no CSV; two columns have one name;
    a row has more cells than the header, so that nobody can tell under which column its values
    belong. Such cells at the end of a row that are empty are passed over.
    """
    try:
        width = _check_shape(path)
        return pd.read_csv(
            path,
            dtype=None if typed else str,
            encoding="utf-8-sig",
            index_col=False,
            usecols=range(width),  # or pandas refuses or warns of empty cells beyond them
            low_memory=False,
            na_filter=False,
        )
    except (
        pd.errors.ParserError,
        pd.errors.EmptyDataError,
        csv.Error,
        UnicodeDecodeError,
        OSError,
        EOFError,
        zlib.error,
    ) as error:
        raise BadData(f"{path} cannot be read as CSV: {str(error).strip()}") from error


def _check_shape(path: Path) -> int:
    """Return the number of columns.

    Read by itself, because pandas renames a column that is there twice, and cuts rows off at the
    header's width.
    """
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        header = next((row for row in reader if row), [])
        names = [name for name in header if name]
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise BadData(
                f"{path} has more than one column for {twice[0]}: {names.count(twice[0])} are called so; "
                "remove the others"
            )
        for row in reader:
            if any(cell.strip() for cell in row[len(header) :]):
                raise BadData(
                    f"{path}, line {reader.line_num} ({row[0]}) has {len(row)} cells, but the header "
                    f"has {len(header)}"
                )
    return len(header)
