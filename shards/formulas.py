"""Quote CSV cells that a spreadsheet would run as a formula: those that begin with `=`, `+`, `-` or `@`."""

import re
from collections.abc import Callable

import pandas as pd

# With any apostrophes before it, so that a text that has one of its own comes back with it.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")


def escape_formulas(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with an apostrophe before each text that a spreadsheet would calculate.

    That is what begins with `= + - @`, a tab or a carriage return; numbers stay as they are.
    """
    return _map_text(table, _escape)


def unescape_formulas(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table that `escape_formulas` was given."""
    return _map_text(table, _unescape)


def _map_text(table: pd.DataFrame, change: Callable[[object], object]) -> pd.DataFrame:
    texts = [
        str(name)
        for name, column in table.items()
        if column.dtype == object or isinstance(column.dtype, pd.StringDtype)
    ]
    return table.assign(**{name: table[name].map(change) for name in texts})


def _escape(cell: object) -> object:
    return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell


def _unescape(cell: object) -> object:
    marked = isinstance(cell, str) and cell.startswith("'") and _FORMULA.match(cell)
    return str(cell)[1:] if marked else cell
