"""JSON and TOML from outside end as one line that names file and field, whatever is in them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shards.documents import parse_json, read_json, read_toml
from shards.errors import BadData

DEEP = 1_000_000


@dataclass(frozen=True)
class Record:
    size: int
    share: float
    rest: dict[str, Any]


def test_a_file_is_read_as_its_schema(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text('{"size": 3, "share": 0.5, "rest": {"a": [1]}, "more": 1}')
    assert read_json(path, Record) == Record(3, 0.5, {"a": [1]})


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ('{"size": 1e999, "share": 1, "rest": {}}', "size"),
        ('{"size": "3", "share": 1, "rest": {}}', "size"),
        ('{"size": 3, "share": 1e999, "rest": {}}', "share"),
        ('{"size": 3, "share": NaN, "rest": {}}', "malformed"),
        ('{"size": 3, "share": 1}', "rest"),
        ("[]", "object"),
        ("", "truncated"),
        ("[" * DEEP, "object"),
        ('{"size": 3, "share": 1, "rest": {"a": ' + "[" * DEEP + "]" * DEEP + "}}", "nested too deeply"),
        ('{"size": 3, "share": 1, "rest": {"a": ' + '{"a":' * DEEP, "nested too deeply"),
    ],
    ids=range(10),
)
def test_what_does_not_fit_is_named_with_its_field(text: str, cause: str) -> None:
    with pytest.raises(BadData, match=r"^record\.json is damaged: ") as refused:
        parse_json(text, Record, "record.json")
    assert cause in refused.value.message
    assert "\n" not in refused.value.message


def test_bytes_that_are_no_text_are_named() -> None:
    with pytest.raises(BadData, match=r"record\.json is damaged: .*utf-8"):
        parse_json(b'{"size": 3, "share": 1, "rest": {"\xff": 1}}', Record, "record.json")


def test_more_than_the_largest_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text('{"size": 3, "share": 0.5, "rest": {}}')
    with pytest.raises(BadData, match="has more than 8 bytes"):
        read_json(path, Record, largest=8)


@pytest.mark.parametrize(
    "text", ["a" + ".a" * 50_000 + " = 1", "a = " + "[" * 5_000, "a = 1\na = 2", "\xff"], ids=range(4)
)
def test_toml_that_is_none_or_too_large_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "options.toml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(BadData, match=r"options\.toml"):
        read_toml(path)


@pytest.mark.parametrize("name", ["missing.json", "folder"])
def test_a_file_that_is_none_is_bad_data(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(BadData, match=name):
        read_json(tmp_path / name, Record)
