"""The report is one page that needs nothing else, says what every number is of, and hides nothing."""

import base64
import dataclasses
import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from eval.evaluation import Evaluation, Explanation
from eval.heatmaps.gallery import HeatMap
from eval.heatmaps.localization import CUT, PointingGame, summarize
from eval.report import render, write_report, write_scores
from eval.report.html import read_picture
from eval.report.published import OFFICIAL, OWN_SPLIT, why_not_comparable
from eval.scores.metrics import score
from eval.training_log import read_training_log
from shards.errors import BadData, ResourceMissing
from shards.findings import FINDINGS
from shards.folder import ShardFolder
from tests.eval.report.reporting import PLAIN, Page, a_run, evaluation

PICTURES = {"roc", "precision_recall", "confusion", "reliability", "subgroups", "prevalence", "training-1"}


@pytest.fixture(scope="module")
def folder(phantom_shards: ShardFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What write_report wrote of a whole evaluation; nothing changes it."""
    run = a_run(tmp_path_factory.mktemp("runs") / "demo")
    return write_report(evaluation(phantom_shards, run, absent=["Hernia"]))


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def shown(folder: Path) -> Callable[[Evaluation], Page]:
    """Render other evaluations without drawing anew: with the pictures of the first."""
    names = [*PICTURES, "training-2", "training-3"]
    files = {name: folder / f"{name.replace('-2', '-1').replace('-3', '-1')}.png" for name in names}
    pictures = {name: read_picture(path) for name, path in files.items()}

    def show(evaluation: Evaluation) -> Page:
        return Page(render(evaluation, tuple(read_training_log(run) for run in evaluation.runs), pictures))

    return show


Shown = Callable[[Evaluation], Page]


def test_the_files_beside_the_page_are_written(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    tables = {"metrics", "intervals", "calibration", "subgroups", "gaps", "floor"}
    assert names == {
        *(f"{name}.png" for name in PICTURES),
        *(f"{name}.csv" for name in tables),
        *("metrics.json", "thresholds.json", "calibration.json", "report.html"),
    }


def test_the_page_asks_nothing_of_the_network(page: Page, folder: Path) -> None:
    for attribute in ("src", "href", "srcset", "data", "action", "poster"):
        links = [each[attribute] or "" for _, each in page.elements if attribute in each]
        assert all(link.startswith(("data:", "#")) for link in links), links
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", text)
    assert page.attributes("meta", "content")[0].startswith("default-src 'none'")


def test_every_picture_of_the_page_is_whole_and_is_the_file_beside_it(page: Page, folder: Path) -> None:
    sources = page.attributes("img", "src")
    assert len(sources) == len(PICTURES)
    embedded = {base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources}
    assert embedded == {(folder / f"{name}.png").read_bytes() for name in PICTURES}
    for png, width in zip(sources, page.attributes("img", "width"), strict=True):
        with Image.open(BytesIO(base64.b64decode(png.partition(",")[2]))) as image:
            image.load()
            assert image.width == int(width)
    assert all(page.attributes("img", "alt"))


def test_ids_are_unique_and_every_link_leads_somewhere(page: Page) -> None:
    ids = page.ids()
    assert len(set(ids)) == len(ids)
    assert {link[1:] for link in page.attributes("a", "href")} <= set(ids)


def test_the_headline_names_mean_interval_split_and_size(page: Page, folder: Path) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    row = metrics["intervals"]["values"]["macro"]
    scored, patients = metrics["macro"]["scored"], metrics["patients"]
    assert (
        f"Macro AUROC, {scored} of 14 findings {metrics['macro']['auroc']:.3f} 95 % confidence interval "
        f"{row['auroc_low']:.3f} to {row['auroc_high']:.3f} test, {metrics['macro']['images']} images of "
        f"{patients} patients" in page.words()
    )


def test_what_is_left_out_is_said(page: Page, phantom_shards: ShardFolder, tmp_path: Path) -> None:
    whole = evaluation(phantom_shards, a_run(tmp_path / "demo"), absent=["Hernia"])
    assert whole.scores.skipped == ("Hernia",)
    assert whole.subgroups is not None
    for warning in (*whole.warnings, *whole.subgroups.warnings):
        assert warning in page.words()
    assert "over 13 of 14 findings; left out, wholly or partly: Hernia" in page.words()


def test_every_table_is_rectangular_and_sorts_by_each_column(page: Page) -> None:
    assert {"scores", "at-half", "calibration-table", "groups-table", "prevalence-table", "epochs-1"} <= set(
        page.tables
    )
    assert [tag for tag, _ in page.elements].count("button") == sum(len(rows[0]) for rows in page.tables.values())
    for rows in page.tables.values():
        titles = rows[0]
        assert all(len(row) == len(titles) for row in rows)
        assert all(row[0][0]["scope"] == "row" for row in rows[1:])
        for row in rows[1:]:
            for (title, _), (cell, text) in zip(titles, row, strict=True):
                if title.get("class") == "number":
                    assert ("data-value" in cell) == bool(re.search(r"\d", text)), text
                    assert cell.get("data-value") is None or np.isfinite(float(str(cell["data-value"])))


def test_the_table_shows_the_scores_of_the_file(page: Page, folder: Path) -> None:
    stored = json.loads((folder / "metrics.json").read_text())["per_finding"]
    titles = [text.strip() for _, text in page.tables["scores"][0]]
    assert titles.index("AUPRC") == titles.index("Prevalence") + 1
    for row in page.tables["scores"][1:15]:
        values = stored[row[0][1].strip().replace(" ", "_")]
        for title, key in (("AUROC", "auroc"), ("AUPRC", "average_precision"), ("NPV", "npv"), ("TN", "tn")):
            shown = row[titles.index(title)][0].get("data-value")
            assert (None if shown is None else float(shown)) == values[key]


def test_decisions_at_one_half_stand_for_comparison(page: Page, phantom_shards: ShardFolder, tmp_path: Path) -> None:
    whole = evaluation(phantom_shards, a_run(tmp_path / "demo"), absent=["Hernia"])
    scored = whole.predictions["test"]
    half = score(scored.labels, scored.probabilities, np.full(14, 0.5), FINDINGS)
    shown = [row[2][0].get("data-value") for row in page.tables["at-half"][1:15]]
    expected = half.per_finding["precision"]
    assert [value and float(value) for value in shown] == [None if np.isnan(value) else value for value in expected]


def test_decisions_at_one_half_and_calibrated_errors_stand_with_intervals(page: Page, folder: Path) -> None:
    stored = json.loads((folder / "metrics.json").read_text())["intervals"]["values"]
    written = pd.read_csv(folder / "intervals.csv", index_col="finding")
    assert set(written) == set(stored["macro"])
    for table, place, measure, digits in (
        ("at-half", 3, "at_half_recall", 3),
        ("calibration-table", 2, "calibrated_brier", 4),
        ("calibration-table", 4, "calibrated_ece", 4),
    ):
        rows = {row[0][1].strip(): row[place][1] for row in page.tables[table][1:]}
        for name in ("Mass", "macro", "micro"):
            low, high = (stored[name][f"{measure}_{end}"] for end in ("low", "high"))
            assert f"{low:.{digits}f} to {high:.{digits}f}" in rows[name]
            assert written.at[name, f"{measure}_low"] == low <= high
        assert "to" not in rows["Hernia"]  # which no image shows


def test_files_hold_no_number_that_json_does_not_know(folder: Path) -> None:
    unknown: list[str] = []
    for path in folder.glob("*.json"):
        json.loads(path.read_text(), parse_constant=unknown.append)
    assert unknown == []


def test_time_and_machine_of_the_run_are_told(page: Page) -> None:
    words = page.words()
    assert "3, the best on val was 2" in words
    # Of 10, 20 and 30 s with 10, 5 and 3.33 % waiting: 3 of 60 s.
    assert "20.0 s on average, 10.0 s to 30.0 s; 60.0 s in total" in words
    assert "5.0 % of the training time" in words
    assert "python -m trainer --arch custom_cnn --name 'a <b>'" in words
    assert "torch 2.15.0" in words


def test_parts_that_were_not_asked_for_leave_no_trace(phantom_shards: ShardFolder, tmp_path: Path) -> None:
    run = a_run(tmp_path / "demo")
    for path in run.path.iterdir():
        path.unlink()
    plain = Page((write_report(evaluation(phantom_shards, run, **PLAIN)) / "report.html").read_text())
    whole = {"subgroups", "gaps-table", "view-baseline-table", "heat-maps", "localization", "epochs-1"}
    assert not whole & set(plain.ids())
    assert not re.search(r"\bNone\b|\bnan\b|<NA>|95 % confidence interval", plain.text)
    assert {link[1:] for link in plain.attributes("a", "href")} <= set(plain.ids())
    assert not (run.path / "eval" / "test" / "intervals.csv").exists()


def test_every_averaged_run_is_named(shown: Shown, phantom_shards: ShardFolder, tmp_path: Path) -> None:
    runs = a_run(tmp_path / "x" / "one"), a_run(tmp_path / "y" / "one", epochs=1), a_run(tmp_path / "two")
    joint = shown(evaluation(phantom_shards, *runs, **PLAIN))
    assert "The mean of the probabilities of 3 runs: one, one, two." in joint.words()
    assert {"figure-training-1", "figure-training-2", "figure-training-3"} <= set(joint.ids())
    assert len(set(joint.ids())) == len(joint.ids())


def test_text_from_files_stays_text(shown: Shown, folder: Path, phantom_shards: ShardFolder, tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    run = a_run(tmp_path / "a&b<i>")
    (run.path / "environment.json").write_text(json.dumps({"command": evil, "versions": {evil: "1"}}))
    gallery = (HeatMap(evil, "Mass", "true positive", 0.75, 0.5, (folder / "roc.png").read_bytes()),)
    page = shown(evaluation(phantom_shards, run, **PLAIN, explanation=Explanation(gallery)))
    assert not [source for source in page.attributes("img", "src") if not source.startswith("data:")]
    assert page.words().count(evil) == 3
    assert page.words().startswith("a&b<i> on test a&b<i> on test")


def test_heat_maps_stand_by_kind_with_probability_and_threshold(
    shown: Shown, folder: Path, phantom_shards: ShardFolder, tmp_path: Path
) -> None:
    png = (folder / "roc.png").read_bytes()
    gallery = tuple(
        HeatMap("00000001_000.png", finding, kind, 0.75, 0.5, png)
        for finding in ("Mass", "Pleural_Thickening")
        for kind in ("true positive", "false positive")
    )
    page = shown(evaluation(phantom_shards, a_run(tmp_path / "demo"), explanation=Explanation(gallery)))
    entry = "0.750 at threshold 0.500 00000001_000.png"
    both = f"Mass {entry} Pleural Thickening {entry}"
    assert f"True positives {both} False positives {both}" in page.words()


def test_localization_stands_beside_chance_and_says_how_it_was_measured(
    shown: Shown, phantom_shards: ShardFolder, tmp_path: Path
) -> None:
    found = [("Mass", 1, 1, PointingGame(True, 0.25, 0.6, 0.8)), ("Mass", 2, 1, PointingGame(False, 0.15, 0.2, 0.3))]
    localization = summarize(found, np.array([1, 2]), FINDINGS, resamples=20)
    page = shown(evaluation(phantom_shards, a_run(tmp_path / "demo"), explanation=Explanation((), localization)))
    titles, mass, macro, micro = page.tables["localization-table"]
    cells = dict(zip((text.strip() for _, text in titles), mass, strict=True))
    for title, value in (("Hit rate", 0.5), ("Chance", 0.2), ("Ratio", 2.5), ("IoU > 0.5", 0.5), ("IoBB > 0.75", 0.5)):
        assert float(str(cells[title][0]["data-value"])) == pytest.approx(value)
    assert [macro[0][1].strip(), micro[0][1].strip()] == ["macro", "micro"]
    assert "pointing game, Zhang et al. 2016). Chance: mean share of the image inside boxes." in page.words()
    assert f"the map is cut at {CUT} of its maximum" in page.words()
    assert localization.warnings[0] in page.words()


@pytest.mark.parametrize(
    ("name", "text", "cause"),
    [
        ("metrics.jsonl", '{"kind": "epoch", "step": 4}\n', "line 1 is damaged"),
        ("metrics.jsonl", "[]\n{\n", "line 1 is damaged"),
        ("config.json", "{", "config.json is damaged"),
        ("environment.json", "[1]", "environment.json is damaged"),
    ],
)
def test_a_damaged_record_of_the_run_is_named(
    phantom_shards: ShardFolder, tmp_path: Path, name: str, text: str, cause: str
) -> None:
    run = a_run(tmp_path / "demo")
    (run.path / name).write_text(text)
    with pytest.raises(BadData, match=cause):
        write_report(evaluation(phantom_shards, run, **PLAIN))


def test_scoring_on_val_and_on_other_shards_is_said(shown: Shown, phantom_shards: ShardFolder, tmp_path: Path) -> None:
    whole = evaluation(phantom_shards, a_run(tmp_path / "demo"), split="val", **PLAIN)
    other = dataclasses.replace(whole.headers[0], metadata={"manifest_sha256": "1" * 64})
    words = shown(dataclasses.replace(whole, headers=(other,))).words()
    assert "fitted on these very images, which are of val" in words
    assert "Trained on other shards than these: demo." in words


def test_where_scores_cannot_be_written_no_older_ones_are_left_for_them(
    phantom_shards: ShardFolder, tmp_path: Path, no_room: AbstractContextManager[None]
) -> None:
    whole = evaluation(phantom_shards, a_run(tmp_path / "demo"), **PLAIN)
    folder = write_scores(whole)
    assert {path.name for path in folder.iterdir()} == {"metrics.json", "metrics.csv", "thresholds.json"}
    with no_room, pytest.raises(ResourceMissing, match=r"metrics\.json"):
        write_scores(whole)
    assert [path for path in folder.iterdir() if path.is_file()] == []


def test_published_results_are_not_shown_beside_a_run_of_other_shards(
    shown: Shown, phantom_shards: ShardFolder, tmp_path: Path
) -> None:
    runs = a_run(tmp_path / "one"), a_run(tmp_path / "two")
    joint = evaluation(as_nih(phantom_shards), *runs, **PLAIN)
    other = dataclasses.replace(joint.headers[1], metadata={"manifest_sha256": "1" * 64})
    joint = dataclasses.replace(joint, headers=(joint.headers[0], other))
    assert "Trained on other shards than these: two." in joint.warnings[0]
    page = shown(joint)
    assert "published" not in page.ids()
    assert "the model was trained on other shards" in page.words()


def as_nih(shards: ShardFolder, *, rule: str = "official", images: int = 25_596) -> ShardFolder:
    """The shards with a manifest that counts as NIH's official test list does."""
    manifest = shards.manifest
    test = dataclasses.replace(manifest.splits["test"], images=images, patients=2_797)
    changed = dataclasses.replace(
        manifest, recipe={**manifest.recipe, "split": rule}, splits={**manifest.splits, "test": test}
    )
    return dataclasses.replace(shards, manifest=changed)


@pytest.mark.parametrize(
    ("rule", "packed", "split", "scored", "why"),
    [
        ("random", 25_596, "test", 25_596, "by the rule random"),
        ("file", 25_596, "test", 25_596, "by the rule file"),
        ("official", 25_595, "test", 25_595, "holds 25,595 images of 2,797 patients"),
        ("official", 25_596, "val", 11_212, "val was scored"),
        ("official", 25_596, "list", 25_596, "list was scored"),
        ("official", 25_596, "test", 20_000, "20,000 of the 25,596 images"),
    ],
)
def test_published_results_are_not_shown_beside_another_split(
    phantom_shards: ShardFolder, rule: str, packed: int, split: str, scored: int, why: str
) -> None:
    shards = as_nih(phantom_shards, rule=rule, images=packed)
    assert why in (why_not_comparable(shards, split, scored, on_training_shards=True) or "")
    assert "other shards" in (why_not_comparable(shards, split, scored, on_training_shards=False) or "")


def test_phantoms_never_stand_beside_published_results(page: Page) -> None:
    assert "published" not in page.ids()
    assert "Not compared with published results: the test split holds" in page.words()


def test_published_results_are_shown_on_the_whole_official_test_split(
    shown: Shown, phantom_shards: ShardFolder, tmp_path: Path
) -> None:
    small = evaluation(phantom_shards, a_run(tmp_path / "demo"), **PLAIN)
    test = small.predictions["test"]
    copies = np.resize(np.arange(len(test.rows)), 25_596)
    many = dataclasses.replace(
        test, **{field.name: getattr(test, field.name)[copies] for field in dataclasses.fields(test)}
    )
    official = dataclasses.replace(
        small, shards=as_nih(phantom_shards), predictions={**small.predictions, "test": many}
    )
    page = shown(official)
    rows = page.tables["published-table"][1:]
    assert len(rows) == len(OFFICIAL) + len(OWN_SPLIT) + 1
    aurocs = [float(str(row[1][0]["data-value"])) for row in rows]
    assert aurocs == sorted(aurocs, reverse=True)
    assert {0.745, 0.803, 0.814, 0.822, 0.830, 0.795, 0.580, 0.663} < set(aurocs)
    assert [row[4][1].strip() for row in rows].count("own random split") == len(OWN_SPLIT)
    assert "No published results" not in page.words()
