import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shards.boxes import read_box_list
from shards.csv_tables import LARGEST
from shards.entries import Entries, find_images, image_folders, read_entries
from shards.errors import BadData
from shards.findings import FINDINGS

HEADER = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Sex,View Position,Rest"
ROW = "a.png,Mass|Edema,2,17,60,F,AP,0"

# ../shared/data/README.md, in FINDINGS order.
ALL_POSITIVES = [11559, 2776, 13317, 19894, 5782, 6331, 1431, 5302, 4667, 2303, 2516, 1686, 3385, 227]

WriteMetadata = Callable[..., Path]


def row(image: str = "a.png", labels: str = "Mass", patient: str = "17", age: str = "60") -> str:
    return f"{image},{labels},2,{patient},{age},F,AP,0"


@pytest.fixture
def read(tmp_path: Path, write_metadata: WriteMetadata) -> Callable[..., Entries]:
    """(rows, ...) -> the entries of a metadata CSV with these rows."""

    def written_and_read(*rows: str, **options: str) -> Entries:
        write_metadata(tmp_path, rows, **{"header": HEADER, **options})
        return read_entries(tmp_path)

    return written_and_read


@pytest.mark.parametrize(
    "spelling",
    [
        {},
        {"header": HEADER.replace("Sex", "Gender")},
        {"header": HEADER + ","},
        {"header": HEADER + ",", "comma": ","},
        {"comma": ","},
        {"start": "\ufeff"},
        {"end": "\r\n"},
        {"start": "\ufeff", "end": "\r\n", "header": HEADER.replace("Sex", "Gender") + ",", "comma": ","},
    ],
    ids=repr,
)
def test_every_release_s_spelling_reads_as_the_same_entries(
    read: Callable[..., Entries], spelling: dict[str, str]
) -> None:
    comma = spelling.pop("comma", "")
    entries = read(ROW + comma, row("b.png", "No Finding") + comma, **spelling)
    table = entries.table
    assert table["image"].tolist() == ["a.png", "b.png"]
    first = table.iloc[0]
    assert [first["patient"], first["follow_up"], first["age"]] == [17, 2, 60]
    assert [first["sex"], first["view"]] == ["F", "AP"]
    assert [finding for finding in FINDINGS if first[finding]] == ["Mass", "Edema"]
    assert not table.loc[1, list(FINDINGS)].any()
    assert entries.warnings == ()


@pytest.mark.parametrize(
    ("age", "years"), [("60", 60), ("060Y", 60), ("000Y", 0), ("013M", 1), ("011M", 0), ("052W", 0), ("366D", 1)]
)
def test_ages_come_out_in_whole_years(read: Callable[..., Entries], age: str, years: int) -> None:
    assert read(row(age=age)).table["age"].tolist() == [years]


def test_an_age_over_120_is_kept_and_remarked_on(read: Callable[..., Entries]) -> None:
    entries = read(row("a.png"), row("b.png", age="411"))
    assert entries.table["age"].tolist() == [60, 411]
    (warning,) = entries.warnings
    assert "1 ages over 120" in warning and "row 3: 411" in warning


def test_pleural_thickening_may_be_written_with_a_space(read: Callable[..., Entries]) -> None:
    assert read(row(labels="Pleural Thickening")).table["Pleural_Thickening"].tolist() == [1]


def test_the_columns_have_the_promised_types(read: Callable[..., Entries]) -> None:
    table = read(ROW).table
    assert {table[column].dtype for column in ("patient", "follow_up", "age")} == {np.dtype(np.int64)}
    assert {table[finding].dtype for finding in FINDINGS} == {np.dtype(np.uint8)}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([row(), row("b.png", "Mas")], {}, "row 3: unknown finding 'Mas'; the nearest valid name is 'Mass'"),
        ([row(labels="No Finding|Mass")], {}, "row 2: 'No Finding' beside a finding"),
        ([row(labels="")], {}, "row 2: unknown finding ''"),
        ([row(), row("b.png"), row()], {}, "row 4: image a.png occurs twice in the file"),
        ([row(patient="x7")], {}, "row 2: patient 'x7' is not a whole number"),
        ([row(patient="-7")], {}, "row 2: patient '-7' is not a whole number"),
        ([row(patient="9" * 30)], {}, "is not a whole number"),
        ([row(), row("b.png", age="old")], {}, "row 3: age 'old'"),
        (["a.png,Mass"], {}, "is not a whole number"),
        ([ROW], {"header": HEADER.replace("Patient ID", "ID")}, "no column 'Patient ID'; its columns are"),
        ([ROW], {"header": HEADER.replace("Sex", "Shoe")}, "has no column 'Patient Sex'"),
        ([], {}, "has a header but no row"),
        ([ROW, ROW + ",1,2,3,4"], {}, "cannot be read as CSV"),
        ([row(age="9" * 400)], {}, "row 2: age '999"),
        ([row(), row("b\0.png")], {}, "row 3: not text (a NUL byte)"),
        ([row(), row("b" * 60_000)], {}, "row 3: image has a line break or over 1000 characters"),
        ([row(), row('"b\nc.png"')], {}, "row 3: image has a line break or over 1000 characters"),
        ([ROW + ",18"], {"header": HEADER + ",Patient ID"}, "has more than one column 'Patient ID'"),
    ],
)
def test_bad_metadata_is_named_with_file_row_and_cause(
    read: Callable[..., Entries], rows: list[str], options: dict[str, str], message: str
) -> None:
    with pytest.raises(BadData) as error:
        read(*rows, **options)
    assert "Data_Entry_2017_v2020.csv" in error.value.message and message in error.value.message


def test_blank_lines_are_skipped_and_rows_are_counted_as_an_editor_counts_lines(read: Callable[..., Entries]) -> None:
    assert read("", row("a.png"), "", "  ", row("b.png"), "").table["image"].tolist() == ["a.png", "b.png"]
    with pytest.raises(BadData, match="row 5: unknown finding 'Mas'"):
        read("", row("a.png"), "", row("b.png", "Mas"))
    assert "row 4: 411" in read("", row("a.png"), row("b.png", age="411")).warnings[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("Data_Entry_2017.csv", b"", "cannot be read as CSV"),
        ("Data_Entry_2017.csv", HEADER.encode() + b"\na\xff.png,Mass\n", "row 2: not UTF-8 text"),
        (
            "Data_Entry_2017.csv.gz",
            gzip.compress(f"{HEADER}\n{ROW}\n\n".encode() + b"b\xff.png,Mass\n"),
            "row 4: not UTF-8 text",
        ),
        ("Data_Entry_2017.csv.gz", b"not gzip", "cannot be read as CSV"),
        ("Data_Entry_2017.csv.gz", gzip.compress(HEADER.encode() * 9)[:-12], "cannot be read as CSV"),
        ("Data_Entry_2017.csv.gz", gzip.compress(b"x" * 99)[:10] + b"\xff" * 30, "cannot be read as CSV"),
    ],
    ids=["empty", "not UTF-8", "not UTF-8 in gzip", "not gzip", "gzip cut off", "gzip damaged"],
)
def test_a_file_that_is_no_csv_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadData) as error:
        read_entries(tmp_path)
    assert name in error.value.message and message in error.value.message


def test_a_file_that_unpacks_to_more_than_the_largest_size_is_refused(tmp_path: Path) -> None:
    csv = tmp_path / "Data_Entry_2017.csv.gz"
    csv.write_bytes(gzip.compress(b"x" * (LARGEST + 1)))
    with pytest.raises(BadData, match=r"csv\.gz has more than 67,108,864 bytes"):
        read_entries(csv)
    with pytest.raises(BadData, match=r"csv\.gz has more than 67,108,864 bytes"):
        read_box_list(csv)


def test_compressed_metadata_reads_as_the_plain_file_does(tmp_path: Path, read: Callable[..., Entries]) -> None:
    plain = read(ROW)
    compressed = tmp_path / "Data_Entry_2017_v2020.csv.gz"
    compressed.write_bytes(gzip.compress(plain.csv.read_bytes()))
    assert read_entries(compressed).table.equals(plain.table)


def test_a_folder_must_hold_exactly_one_metadata_file(tmp_path: Path, read: Callable[..., Entries]) -> None:
    with pytest.raises(BadData, match="found none"):
        read_entries(tmp_path)
    shutil.copy(read(ROW).csv, tmp_path / "Data_Entry_2017.csv")
    with pytest.raises(BadData, match=r"found Data_Entry_2017\.csv, Data_Entry_2017_v2020\.csv"):
        read_entries(tmp_path)


def test_a_folder_that_is_not_there_is_an_error_that_offers_the_phantoms(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"is no folder.*make_phantoms"):
        read_entries(tmp_path / "nowhere")


def test_images_are_found_wherever_archives_and_mirrors_unpack_them(tmp_path: Path) -> None:
    places = {"a.png": "images_001/images", "b.png": "images_002", "c.png": "images", "d.png": "."}
    for name, folder in places.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / name).write_bytes(b"")
    assert find_images(tmp_path) == places
    assert image_folders(tmp_path) == ["images", "images_001", "images_002"]
    assert find_images(tmp_path, ["images_002", "images"]) == {"b.png": "images_002", "c.png": "images"}


def test_the_same_name_twice_counts_once_if_the_bytes_agree_and_is_an_error_if_not(tmp_path: Path) -> None:
    for folder in ("images_001", "images_002"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(b"same")
    assert find_images(tmp_path) == {"a.png": "images_001"}
    (tmp_path / "images_002" / "a.png").write_bytes(b"other")
    with pytest.raises(BadData, match=r"images_001/a\.png and .*images_002/a\.png have one name"):
        find_images(tmp_path)


@pytest.fixture(scope="module")
def whole(nih_data: Path) -> Entries:
    return read_entries(nih_data / "nih_metadata")


def test_the_whole_metadata_has_nih_s_counts(whole: Entries) -> None:
    table = whole.table
    assert (len(table), table["patient"].nunique()) == (112_120, 30_805)
    assert table[list(FINDINGS)].to_numpy().sum(axis=0).tolist() == ALL_POSITIVES
    assert int((~table[list(FINDINGS)].any(axis=1)).sum()) == 60_361


def test_the_release_s_own_rows_about_patient_100_come_out_as_they_stand(nih_data: Path) -> None:
    first = read_entries(nih_data / "nih_sample").table.iloc[0]
    assert first["image"] == "00000100_000.png" and first["patient"] == 100
    assert [finding for finding in FINDINGS if first[finding]] == ["Atelectasis", "Effusion", "Infiltration"]
    assert (first["age"], first["sex"], first["view"]) == (60, "M", "PA")


def test_every_sample_image_is_found(nih_data: Path) -> None:
    sample = nih_data / "nih_sample"
    found = find_images(sample)
    assert set(found) == set(read_entries(sample).table["image"]) and len(found) == 120
