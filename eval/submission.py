"""Read predictions of any model from CSV, check them, and join them with the labels."""

import csv
import gzip
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from eval.predict.selection import Selection
from eval.scores.thresholds import Floats
from shards.entries import COLUMNS, Entries, read_entries
from shards.errors import BadData
from shards.findings import ALIASES, check_findings
from shards.folder import ENTRIES, ShardFolder
from shards.manifest import NAME, read_manifest


def _read_csv(path: Path, *, typed: bool) -> pd.DataFrame:
    """Read a CSV with a header (or .gz): columns of what they look like if `typed`, else of text.

    Raises BadData naming the file and its fault: it is no CSV; two columns have one name; a row has more cells than the
    header, so that its values belong to no column. Empty cells beyond the header are ignored.
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

    Read without pandas, which renames a column that occurs twice, and cuts rows off at the header's width.
    """
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        header = next((row for row in reader if row), [])
        names = [name for name in header if name]
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise BadData(
                f"{path} has more than one column for {twice[0]}: {names.count(twice[0])} have this name; "
                "remove the others"
            )
        for row in reader:
            if any(cell.strip() for cell in row[len(header) :]):
                raise BadData(
                    f"{path}, line {reader.line_num} ({row[0]}) has {len(row)} cells, but the header has {len(header)}"
                )
    return len(header)


_NIH_IMAGE = next(nih for nih, ours in COLUMNS.items() if ours == "image")
IMAGE_COLUMNS = (_NIH_IMAGE, "image")
PREFIX = "prob_"
_SHOWN = 3  # names of an error message


@dataclass(frozen=True, eq=False)
class Submission:
    """A model's predictions on some images, and their labels, in the order of the entries."""

    entries: pd.DataFrame
    """[N] rows: image, patient, one column per finding, and whatever else the file of the labels has."""
    findings: tuple[str, ...]
    probabilities: Floats
    """[N, F], 0..1, in their order."""

    @property
    def labels(self) -> npt.NDArray[np.uint8]:
        """[N, F], in the order of `findings`."""
        return self.entries[list(self.findings)].to_numpy(dtype=np.uint8)

    @property
    def patients(self) -> npt.NDArray[np.int64]:
        """[N], of each image."""
        return self.entries["patient"].to_numpy(dtype=np.int64)

    def to_text(self) -> str:
        """Return `25,596 images of 2,797 patients`."""
        return f"{len(self.entries):,} images of {self.entries['patient'].nunique():,} patients"

    def to_json(self) -> dict[str, int]:
        """Return the numbers of images and patients."""
        return {"images": len(self.entries), "patients": int(self.entries["patient"].nunique())}

    def of(self, chosen: npt.NDArray[np.bool_]) -> "Submission":
        """Return the subset where `chosen`, [N], is true."""
        return Submission(self.entries[chosen], self.findings, self.probabilities[chosen])


def read_labels(path: Path) -> Entries:
    """Read a table of entries: an NIH Data_Entry CSV (or .gz), or a shard folder's entries.csv.

    Also takes a folder that holds one of these. Only an entries.csv has a column `split`; beside its manifest.json it
    must have the hash in there. Raises BadData naming the file and its fault.
    """
    if path.is_dir() and (path / ENTRIES).is_file():
        path = path / ENTRIES
    if path.is_dir() or _NIH_IMAGE in (table := _read_csv(path, typed=True)):
        return read_entries(path)
    if path.name == ENTRIES and (path.parent / NAME).is_file():
        manifest = read_manifest(path.parent)
        return Entries(ShardFolder(path.parent, manifest, "").entries, manifest.findings, path, ())
    # Its findings are the columns between these two.
    wanted = ("image", "patient", "split", "age")
    if missing := [name for name in wanted if name not in table.columns]:
        raise BadData(
            f"{path} is neither NIH's metadata (no column {_NIH_IMAGE!r}) nor the {ENTRIES} of a shard "
            f"folder (no column {missing[0]!r})"
        )
    columns = table.columns.tolist()
    findings = tuple(columns[columns.index("split") + 1 : columns.index("age")])
    try:
        check_findings(findings)
    except ValueError as error:
        raise BadData(f"{path} is no {ENTRIES} of a shard folder: {error}") from error
    sound = table[list(findings)].isin([0, 1]).all(axis=None) and table["patient"].dtype.kind == "i"
    if not sound or table.empty or table["image"].duplicated().any():
        raise BadData(
            f"{path} is damaged: it has no row, a label is neither 0 nor 1, a patient is no number, or an "
            "image occurs twice"
        )
    return Entries(table, findings, path, ())


def choose_entries(entries: Entries, selection: Selection | None) -> tuple[pd.DataFrame, str]:
    """Return the selected rows and the name of the selection.

    Without a selection these are `test`, or `all` where the entries have no split. Raises BadData for a split that they
    do not have, and naming images on a list that the entries lack.
    """
    table, csv = entries.table, entries.csv
    if selection is not None and selection.images is not None:
        if unknown := selection.images.difference(table["image"]):
            raise BadData(f"{len(unknown):,} images on the list {selection.name} are not in {csv}, {_first(unknown)}")
        return table[table["image"].isin(selection.images)], selection.name
    if "split" not in table:
        if selection is None:
            return table, "all"
        raise BadData(
            f"{csv} does not say which images are in {selection.name}; give a list of them, such as NIH's: "
            "--split test_list.txt"
        )
    name = "test" if selection is None else selection.name
    chosen = table[table["split"] == name]
    if chosen.empty:
        raise BadData(f"{csv} has no image in {name}; choose the images to score with --split")
    return chosen, name


def read_submission(path: Path, entries: Entries) -> Submission:
    """Read a CSV of predictions (or .gz): the image's name and one probability per finding.

    The image's column is `Image Index` or `image`, a finding's is named as the finding, with or without `prob_` before
    it; other columns are ignored, and the order of rows and columns is free. Raises BadData naming the file and: a
    column that is missing or occurs twice, a row that is wider than the header, an image that occurs twice or that
    `entries` lack, or the image and finding of a value that is no number from 0 to 1.
    """
    table = _read_csv(path, typed=False)
    named = [name for name in IMAGE_COLUMNS if name in table]
    images = table[_only(named, "the image's name", IMAGE_COLUMNS, path)]
    columns = _finding_columns(table, entries.findings, path)
    if table.empty:
        raise BadData(f"{path} has a header but no row")
    if twice := set(images[images.duplicated()]):
        raise BadData(f"{path} has more than one row for {len(twice):,} images, {_first(twice)}")
    if unknown := set(images).difference(entries.table["image"]):
        raise BadData(f"{path}: {len(unknown):,} of {len(images):,} images are not in {entries.csv}, {_first(unknown)}")
    probabilities = np.column_stack([_numbers(table[column], images, path) for column in columns])
    known = entries.table[entries.table["image"].isin(images)]
    place = pd.Series(np.arange(len(images)), index=images)
    return Submission(known, entries.findings, probabilities[place.loc[known["image"]].to_numpy()])


def require_all(given: Submission, wanted: pd.DataFrame, path: Path, name: str) -> Submission:
    """Return the predictions on the `wanted` entries; BadData naming those that are missing."""
    have = given.entries["image"]
    missing = wanted["image"][~wanted["image"].isin(have)]
    if len(missing):
        raise BadData(
            f"{path} has no prediction for {len(missing):,} of the {len(wanted):,} images to score "
            f"({name}), {_first(missing)}; predict them, or choose the images to score with --split"
        )
    return given.of(have.isin(wanted["image"]).to_numpy())


def require_apart(scored: Submission, val: Submission, path: Path) -> None:
    """Raise BadData naming images, or else patients, that are both scored and in val, read from `path`."""
    for column, what in (("image", "images"), ("patient", "patients")):
        if both := set(scored.entries[column]) & set(val.entries[column]):
            raise BadData(
                f"{path}: {len(both):,} {what} are among the scored ones, too, {_first(both)}; thresholds "
                "must come from other patients"
            )


def _finding_columns(table: pd.DataFrame, findings: Sequence[str], path: Path) -> list[str]:
    spellings = {finding: [finding] for finding in findings}
    for alias, finding in ALIASES.items():
        if finding in spellings and alias not in spellings:
            spellings[finding].append(alias)
    found = {
        finding: [name for one in names for name in (one, PREFIX + one) if name in table]
        for finding, names in spellings.items()
    }
    if missing := [finding for finding, names in found.items() if not names]:
        raise BadData(
            f"{path} has no column for {', '.join(missing)} (named like the finding, or with {PREFIX} before it); "
            "every finding must be predicted"
        )
    return [_only(names, finding, names, path) for finding, names in found.items()]


def _only(names: Sequence[str], what: str, wanted: Sequence[str], path: Path) -> str:
    if not names:
        raise BadData(f"{path} has no column with {what}; it is named {' or '.join(map(repr, wanted))}")
    if len(names) > 1:
        raise BadData(f"{path} has more than one column for {what}: {', '.join(names)}; remove the others")
    return names[0]


def _numbers(column: pd.Series, images: pd.Series, path: Path) -> Floats:
    texts = column.to_numpy(dtype=str)
    try:
        values = texts.astype(np.float64)  # to the last bit, which pandas does not promise
    except ValueError:
        values = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)
    bad = np.flatnonzero(~((values >= 0) & (values <= 1)))
    if len(bad):
        raise BadData(
            f"{path}: expected probabilities from 0 to 1, but {column.name} of {images.iloc[bad[0]]} is "
            f"{texts[bad[0]].strip() or 'empty'} ({len(bad):,} such in this column)"
        )
    return values


def _first(names: Iterable[object]) -> str:
    ordered = sorted(map(str, names))
    return f"the first {'is' if len(ordered) == 1 else 'are'} {', '.join(ordered[:_SHOWN])}"
