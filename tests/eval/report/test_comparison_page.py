"""The page that sets runs side by side names each, its cost, and every paired difference."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from eval.compare import RunComparison, compare_runs, write_comparison
from eval.scores.metrics import MEASURES
from shards.findings import FINDINGS
from shards.folder import ShardFolder
from tests.eval.report.reporting import PLAIN, Page, a_run, evaluation


@pytest.fixture(scope="module")
def comparison(phantom_shards: ShardFolder, tmp_path_factory: pytest.TempPathFactory) -> RunComparison:
    runs = tmp_path_factory.mktemp("runs")
    parts = {name: part for name, part in PLAIN.items() if name not in ("resampled", "intervals")}
    first = evaluation(phantom_shards, a_run(runs / "first"), absent=["Hernia"], **parts)
    other = evaluation(phantom_shards, a_run(runs / "<other>"), absent=["Hernia"], **parts)
    header = dataclasses.replace(other.headers[0], parameters=23_536_718)
    return compare_runs([first, dataclasses.replace(other, headers=(header,))])


@pytest.fixture(scope="module")
def page(comparison: RunComparison) -> Page:
    return Page((write_comparison(comparison) / "comparison.html").read_text(encoding="utf-8"))


def test_the_files_are_written_and_the_picture_stands_in_the_page(page: Page, comparison: RunComparison) -> None:
    names = {path.name for path in comparison.folder.iterdir()}
    assert names == {f"comparison.{end}" for end in ("csv", "json", "png", "html")}
    with Image.open(comparison.folder / "comparison.png") as image:
        image.load()
    (source,) = page.attributes("img", "src")
    assert source.startswith("data:image/png;base64,")
    assert {link[1:] for link in page.attributes("a", "href")} <= set(page.ids())


def test_every_run_stands_with_what_it_cost(page: Page) -> None:
    _, first, other = page.tables["costs-table"]
    assert [first[0][1].strip(), other[0][1].strip()] == ["first", "<other>"]
    assert other[3][1].strip() == "23,536,718"
    assert first[5][0]["data-value"] == "60.0"


@pytest.mark.parametrize("measure", MEASURES)
def test_every_measure_has_values_difference_and_p_per_finding(
    page: Page, comparison: RunComparison, measure: str
) -> None:
    table = comparison.table[comparison.table["measure"] == measure]
    titles, *rows = page.tables[f"compared-{measure}"]
    assert [text.strip() for _, text in titles] == ["Finding", "first", "<other>", "<other> minus first", "p"]
    assert len(rows) == len(FINDINGS) + 2
    other = table[table["run"] == "<other>"]
    for row, (_, expected) in zip(rows, other.iterrows(), strict=True):
        assert row[0][1].strip() == str(expected["finding"]).replace("_", " ")
        for cell, key in ((row[2], "value"), (row[3], "difference"), (row[4], "p")):
            shown = cell[0].get("data-value")
            assert np.isnan(expected[key]) if shown is None else float(shown) == expected[key]


def test_what_is_left_out_is_said_of_each_run(page: Page, comparison: RunComparison) -> None:
    for each in comparison.evaluations:
        for warning in each.warnings:
            assert f"{each.name}: {warning}" in page.words()
