"""The figures in the README are those that were measured."""

from pathlib import Path

from benchmarks.readme import README, with_tables


def test_the_tables_in_the_readme_are_those_of_the_newest_results() -> None:
    text = Path(README).read_text(encoding="utf-8")
    assert "<!-- loader -->" in text and "<!-- packing -->" in text
    assert with_tables(text) == text
