"""Read NIH's metadata CSV and image folders into one table of entries, or name the step that is missing before."""

import io
import lzma
import re
import shlex
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from csv import Error as CsvError
from csv import reader
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from shards.csv_tables import read_csv_text
from shards.errors import BadData
from shards.findings import FINDINGS, to_multi_hot
from shards.manifest import NAME, NOT_READ

# NIH's column -> ours. The 2017 release says Gender, others say Sex.
COLUMNS = {
    "Image Index": "image",
    "Finding Labels": "labels",
    "Follow-up #": "follow_up",
    "Patient ID": "patient",
    "Patient Age": "age",
    "Patient Sex": "sex",
    "View Position": "view",
}
_AGE = r"(\d{1,9})\s*([YMWD]?)"
_DAYS = {"": 365.25, "Y": 365.25, "M": 30.4375, "W": 7.0, "D": 1.0}
_OLDEST = 120
UNKNOWN_AGE = -1
_LONGEST = 1000  # characters of a cell; all findings at once are 150
# Of a foreign file's header in a message: columns, and characters of each.
_SHOWN, _SHOWN_OF_NAME = 12, 40
_ARCHIVE = re.compile(r"\.(tar(\.(gz|bz2|xz))?|tgz|zip)\Z")
_UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, ValueError)


@dataclass(frozen=True)
class Entries:
    """A table of entries, the metadata file it came from, and what looked odd but was kept."""

    table: pd.DataFrame
    """One row per entry, in the file's order: image (str), patient (int64), follow_up (int64),
    age (years, int64; -1 where it is empty), sex, view (str), and one uint8 column per finding."""
    findings: tuple[str, ...]
    """Their names, in the order of the columns."""
    csv: Path
    warnings: tuple[str, ...]


def read_entries(source: Path) -> Entries:
    """Read `Data_Entry_2017*.csv` (or `.csv.gz`) under `source`, which may also be that file.

    Accepts every release's spelling: `Patient Sex` or `Patient Gender`, a trailing comma, a byte order mark, CRLF,
    ages such as `60`, `060Y` or `013M`. An age over 120 years is kept and remarked on. Raises BadData naming file,
    row and cause for a missing file or column, text that is not UTF-8, a duplicate image, a number that is none, or
    an unknown finding.
    """
    csv = _find_csv(source)
    raw = _read_columns(csv)
    duplicate = raw["image"].duplicated()
    if duplicate.any():
        row = int(np.flatnonzero(duplicate)[0])
        raise BadData(f"{csv}, row {raw['line'][row]}: image {raw['image'][row]} occurs twice in the file")
    table = raw[["image"]].copy()
    for column in ("patient", "follow_up"):
        _require_match(csv, raw, column, r"\s*\d{1,18}\s*", "{!r} is not a whole number")
        table[column] = raw[column].to_numpy(dtype=str).astype(np.int64)
    table["age"], notes = _ages(csv, raw)
    table[["sex", "view"]] = raw[["sex", "view"]]
    table[list(FINDINGS)] = _multi_hot(csv, raw)
    return Entries(table, FINDINGS, csv, notes)


def find_images(source: Path, folders: Sequence[str] | None = None) -> dict[str, str]:
    """Map every PNG's name to its folder relative to `source`, as `images_001/images`.

    Looks in `images*/images`, `images*` and `source` itself, as NIH's archives and their mirrors unpack; `folders`
    restricts that to the named top folders. Of the same file in two folders the first counts; raises BadData when
    their bytes differ.
    """
    tops = [source / name for name in (image_folders(source) if folders is None else folders)]
    found: dict[str, str] = {}
    for folder in [inner for top in tops for inner in (top / "images", top)] + ([] if folders else [source]):
        if not folder.is_dir():
            continue
        relative = folder.relative_to(source).as_posix()
        for path in sorted(folder.glob("*.png")):
            if found.setdefault(path.name, relative) == relative:
                continue
            first = source / found[path.name] / path.name
            if first.read_bytes() != path.read_bytes():
                raise BadData(f"{first} and {path} have one name but different bytes; remove one")
    return found


def image_folders(source: Path) -> list[str]:
    """Return the names of the image folders under `source`, in order."""
    return sorted(path.name for path in source.glob("images*") if path.is_dir())


def unpacking_hint(source: Path) -> str:
    """Return `; N archives are not unpacked, ...` with the first one's command, or nothing where all are."""
    files = [path for path in source.iterdir() if _ARCHIVE.search(path.name) and path.is_file()]
    packed = sorted(path for path in files if not _folder_of(path).is_dir())
    if not packed:
        return ""
    return f"; {len(packed)} archives are not unpacked, the first is: {_unpack_command(packed[0])}"


def _unpack_command(archive: Path) -> str:
    source, folder = shlex.quote(str(archive)), shlex.quote(str(_folder_of(archive)))
    if zipfile.is_zipfile(archive):
        return f"unzip {source} -d {folder}"
    return f"mkdir -p {folder} && tar -xf {source} -C {folder}"


def _folder_of(archive: Path) -> Path:
    # Beside it, under its name.
    name, known = _ARCHIVE.subn("", archive.name)
    return archive.with_name(name if known else f"{name}-unpacked")


def _is_archive(path: Path) -> bool:
    # Compressed or not, whatever it is called.
    try:
        return zipfile.is_zipfile(path) or tarfile.is_tarfile(path)
    except _UNREADABLE:
        return False


def _is_webdataset(path: Path) -> bool:
    # A tar whose first two members are of one sample, as `0.jpg` and `0.cls`.
    try:
        with tarfile.open(path, "r:") as archive:
            names = [Path(member.name) for member in (archive.next(), archive.next()) if member is not None]
    except _UNREADABLE:
        return False
    keys = [name.parent / name.name.partition(".")[0] for name in names]
    return len(set(names)) == 2 and len(set(keys)) == 1 and all("." in name.name for name in names)


def _find_csv(source: Path) -> Path:
    wanted = "a folder that holds Data_Entry_2017*.csv and the images"
    if source.is_file():
        if _is_webdataset(source):
            raise BadData(f"{source} is a WebDataset tar: {NOT_READ}, {wanted}")
        if _is_archive(source):
            raise BadData(f"{source} is an archive; unpack it, and give {wanted}: {_unpack_command(source)}")
        return source
    if not source.is_dir():
        raise BadData(
            f"{source} is no folder; give the folder of the NIH download, or make an imitation of it "
            f"with: python scripts/make_phantoms.py {source}"
        )
    found = sorted([*source.glob("Data_Entry_2017*.csv"), *source.glob("Data_Entry_2017*.csv.gz")])
    if not found and (source / NAME).is_file():
        raise BadData(f"{source} holds shards that are packed already: python -m trainer --shards {source}")
    tars = sorted(source.glob("*.tar"))
    if not found and tars and _is_webdataset(tars[0]):
        raise BadData(f"{source} holds WebDataset tars such as {tars[0].name}: {NOT_READ}, {wanted}")
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or f"none{unpacking_hint(source)}"
        raise BadData(f"{source} must hold one Data_Entry_2017*.csv; found {names}")
    return found[0]


def _read_columns(csv: Path) -> pd.DataFrame:
    # As text, with the line of each row in the file.
    text = read_csv_text(csv)
    try:
        # Pandas takes the first of two columns that have one name.
        names = next(reader(io.StringIO(text, newline="")), [])
        for name in (*COLUMNS, "Patient Gender"):
            if names.count(name) > 1:
                raise BadData(f"{csv} has more than one column {name!r}; remove the others")
        with warnings.catch_warnings():
            # Of the empty field behind a trailing comma that only the rows have, not the header.
            warnings.simplefilter("ignore", pd.errors.ParserWarning)
            frame = pd.read_csv(io.StringIO(text), dtype=str, index_col=False, na_filter=False, skip_blank_lines=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, CsvError) as error:
        raise BadData(f"{csv} cannot be read as CSV: {str(error).strip()}") from error
    if "Patient Sex" not in frame.columns:
        frame = frame.rename(columns={"Patient Gender": "Patient Sex"})
    missing = [name for name in COLUMNS if name not in frame.columns]
    if missing:
        others = f", and {len(frame.columns) - _SHOWN} more" if len(frame.columns) > _SHOWN else ""
        shown = ", ".join(str(name)[:_SHOWN_OF_NAME] for name in frame.columns[:_SHOWN])
        raise BadData(f"{csv} has no column {missing[0]!r}; its columns are {shown}{others}")
    frame = frame[list(COLUMNS)].rename(columns=COLUMNS)
    frame["line"] = frame.index + 2  # as an editor counts: line 1 is the header, blank lines count
    blank = (frame.drop(columns=["image", "line"]) == "").all(axis=1) & (frame["image"].str.strip() == "")
    frame = frame[~blank].reset_index(drop=True)
    if frame.empty:
        raise BadData(f"{csv} has a header but no row")
    for column in COLUMNS.values():
        pattern = rf"[^\r\n]{{0,{_LONGEST}}}"
        _require_match(csv, frame, column, pattern, f"has a line break or over {_LONGEST} characters")
    return frame


def _require_match(csv: Path, raw: pd.DataFrame, column: str, pattern: str, cause: str) -> None:
    # In the cause, {!r} is the first cell that does not match.
    wrong = np.flatnonzero(~raw[column].str.fullmatch(pattern).to_numpy(dtype=bool))
    if len(wrong):
        row = int(wrong[0])
        raise BadData(f"{csv}, row {raw['line'][row]}: {column} {cause.format(raw[column][row])}")


def _ages(csv: Path, raw: pd.DataFrame) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    _require_match(csv, raw, "age", rf"\s*({_AGE})?\s*", "{!r} is none of 60, 060Y, 013M")
    years_of = {}
    for text in raw["age"].unique():
        match = re.match(_AGE, text.strip())
        years_of[text] = UNKNOWN_AGE if match is None else int(int(match[1]) * _DAYS[match[2]] / _DAYS["Y"])
    years = np.asarray(raw["age"].map(years_of), dtype=np.int64)
    odd = np.flatnonzero(years > _OLDEST)
    if not len(odd):
        return years, ()
    shown = ", ".join(f"row {raw['line'][row]}: {years[row]}" for row in odd[:3])
    return years, (f"{csv}: {len(odd)} ages over {_OLDEST} years, kept as they are ({shown}, ...)",)


def _multi_hot(csv: Path, raw: pd.DataFrame) -> npt.NDArray[np.uint8]:
    codes, distinct = pd.factorize(raw["labels"])
    hot = np.zeros((len(distinct), len(FINDINGS)), dtype=np.uint8)
    for code, text in enumerate(distinct):
        try:
            hot[code] = to_multi_hot(text)
        except ValueError as error:
            row = int(np.flatnonzero(codes == code)[0])
            raise BadData(f"{csv}, row {raw['line'][row]}: {error}") from error
    return hot[codes]
