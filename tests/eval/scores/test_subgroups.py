"""Scores of groups of patients are those of their images alone, and thin groups have none."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from sklearn.metrics import recall_score, roc_auc_score

from eval.scores.bootstrap import bootstrap
from eval.scores.subgroups import FEWEST, Subgroups, group_images, subgroups
from eval.scores.thresholds import pick_thresholds
from shards.entries import read_entries
from shards.findings import FINDINGS

NAMES = ("Mass", "Edema", "Hernia")


class Split:
    """Entries, labels and probabilities of some patients; the last finding is rare."""

    def __init__(self, patients: int = 240, **columns: Any) -> None:
        random = np.random.default_rng(11)
        images = random.integers(1, 5, patients)
        patient = np.repeat(np.arange(patients) * 7 + 3, images)
        n = len(patient)
        self.entries = pd.DataFrame(
            {
                "patient": patient,
                "follow_up": np.concatenate([np.arange(count) for count in images]),
                "age": np.repeat(random.integers(18, 60, patients), images),
                "sex": np.repeat(random.choice(["F", "M"], patients), images),
                "view": random.choice(["AP", "PA"], n),
            }
        ).assign(**columns)
        chance = np.array([0.4, 0.25, 0.02]) + 0.2 * (self.entries["view"] == "AP").to_numpy()[:, None]
        chance[:, 2] = 0.02
        self.labels: npt.NDArray[np.uint8] = (random.random((n, 3)) < chance).astype(np.uint8)
        self.probabilities = (0.7 * random.random((n, 3)) + 0.3 * self.labels).round(2)
        self.thresholds = pick_thresholds(self.labels, self.probabilities)

    def score(self, **options: Any) -> Subgroups:
        options = {"resamples": 0, "thresholds": self.thresholds} | options
        thresholds = options.pop("thresholds")
        return subgroups(self.labels, self.probabilities, self.entries, NAMES, thresholds, **options)


def cell(table: pd.DataFrame, **where: str) -> pd.Series:
    for column, value in where.items():
        table = table[table[column] == value]
    assert len(table) == 1
    return table.iloc[0]


@pytest.fixture(scope="module")
def official(nih_data: Path) -> pd.DataFrame:
    """The entries of the official test list."""
    folder = nih_data / "nih_metadata"
    table = read_entries(folder / "Data_Entry_2017_v2020.csv.gz").table
    return table[table["image"].isin((folder / "test_list.txt").read_text().split())]


def test_every_image_is_in_one_group_of_each_attribute(official: pd.DataFrame) -> None:
    groups = group_images(official)
    for attribute in ("sex", "age", "view", "visit"):
        together = np.sum([group.images for group in groups if group.attribute == attribute], axis=0)
        assert (together == 1).all()
    sizes = {f"{group.attribute} {group.name}": int(group.images.sum()) for group in groups}
    assert (sizes["sex F"], sizes["sex M"]) == (10714, 14882)
    assert (sizes["view AP"], sizes["view PA"]) == (14500, 11096)
    assert sizes["visit first"] == official["patient"].nunique() == 2797
    assert [name for name in sizes if name.startswith("age")] == [
        *(f"age {decade}-{decade + 9}" for decade in range(0, 90, 10)),
        "age 90+",
    ]
    assert sizes["age 50-59"] == official["age"].between(50, 59).sum()


def test_odd_ages_and_empty_fields_are_groups_of_their_own() -> None:
    entries = pd.DataFrame(
        {
            "age": [0, 9, 10, 90, 120, 121, -1],
            "sex": ["", "F", "F", "F", "F", "F", "M"],
            "view": ["AP", "", "", "AP", "AP", "AP", "AP"],
            "follow_up": [0, 1, 0, 2, 0, 0, 0],
        }
    )
    found = {f"{each.attribute} {each.name}": each.images.nonzero()[0].tolist() for each in group_images(entries)}
    assert found["age 0-9"] == [0, 1]
    assert found["age 90+"] == [3, 4]
    assert found["age unknown"] == [5, 6]
    assert found["sex unknown"] == [0]
    assert found["view unknown"] == [1, 2]
    assert found["visit follow-up"] == [1, 3]


def test_a_group_s_scores_are_those_of_its_images_alone() -> None:
    split = Split()
    table = split.score().table
    for group in group_images(split.entries):
        of_group = table[(table["attribute"] == group.attribute) & (table["group"] == group.name)]
        assert of_group["finding"].tolist() == [*NAMES, "macro"]
        for column, finding in enumerate(NAMES[:2]):
            row = cell(of_group, finding=finding)
            truth, said = split.labels[group.images, column], split.probabilities[group.images, column]
            assert row["images"] == group.images.sum()
            assert row["patients"] == split.entries["patient"][group.images].nunique()
            assert row["positives"] == truth.sum()
            if row["findings"]:
                assert row["auroc"] == pytest.approx(roc_auc_score(truth, said), abs=1e-12)
                alarms = said >= split.thresholds[column]
                assert row["recall"] == pytest.approx(recall_score(truth, alarms), abs=1e-12)


def test_a_group_with_too_few_patients_has_no_number_and_that_is_said() -> None:
    split = Split()
    found = split.score()
    for group in group_images(split.entries):
        for column, finding in enumerate(NAMES):
            ill = split.labels[:, column] == 1
            counts = [split.entries["patient"][group.images & chosen].nunique() for chosen in (ill, ~ill)]
            row = cell(found.table, attribute=group.attribute, group=group.name, finding=finding)
            assert row["findings"] == (min(counts) >= FEWEST)
            assert np.isnan(row["auroc"]) == np.isnan(row["recall"]) == (min(counts) < FEWEST)
    thin = found.table[(found.table["finding"] != "macro") & (found.table["findings"] == 0)]
    assert {row.attribute for row in thin.itertuples()} == {line.split(":")[0] for line in found.warnings}
    age = sum(thin["attribute"] == "age")
    assert any(line.startswith(f"age: {age} of 15 scores") for line in found.warnings)


def test_the_macro_of_an_attribute_is_over_the_same_findings_in_each_group() -> None:
    found = Split().score()
    age = found.table[found.table["attribute"] == "age"]
    for group in ("30-39", "40-49", "50-59"):
        of_group = age[age["group"] == group].set_index("finding")
        assert of_group.at["macro", "findings"] == 2  # Hernia is too rare in some decade
        for measure in ("auroc", "recall"):
            assert of_group.at["macro", measure] == pytest.approx(of_group.loc[["Mass", "Edema"], measure].mean())


def test_a_gap_is_the_greatest_recall_less_the_least() -> None:
    found = Split().score(resamples=50, thresholds=np.full(3, 0.55))
    for row in found.gaps[found.gaps["finding"] != "macro"].itertuples():
        here = found.table["attribute"].eq(row.attribute) & found.table["finding"].eq(row.finding)
        recalls = found.table[here].set_index("group")["recall"].dropna()
        if len(recalls) < 2:
            assert (row.lowest, row.highest) == ("", "") and np.isnan(row.tpr_gap)
            continue
        assert (row.lowest, row.highest) == (recalls.idxmin(), recalls.idxmax())
        assert row.tpr_gap == pytest.approx(recalls.max() - recalls.min())
        assert row.tpr_gap_low < row.tpr_gap < row.tpr_gap_high
    sex = found.gaps[found.gaps["attribute"] == "sex"].set_index("finding")
    assert sex.at["macro", "tpr_gap"] == pytest.approx(sex["tpr_gap"].drop("macro").mean())


def test_groups_of_equal_recall_are_named_first_and_last() -> None:
    gap = cell(Split().score(thresholds=np.zeros(3)).gaps, attribute="sex", finding="Mass")
    assert (gap["lowest"], gap["highest"], gap["tpr_gap"]) == ("F", "M", 0)


def test_the_floor_is_what_the_share_of_positives_of_the_view_scores() -> None:
    split = Split()
    baseline = split.score().view_baseline.set_index("finding")
    for column, finding in enumerate(NAMES):
        truth = split.labels[:, column]
        share = pd.Series(truth).groupby(split.entries["view"]).mean()
        expected = roc_auc_score(truth, split.entries["view"].map(share))
        assert baseline.at[finding, "auroc"] == pytest.approx(expected, abs=1e-12)
        assert baseline.at[finding, "view"] == share.idxmax()
        assert expected >= 0.5
    assert baseline.at["macro", "auroc"] == pytest.approx(baseline["auroc"].drop("macro").mean())


def test_the_view_alone_scores_what_nih_s_labels_say(official: pd.DataFrame) -> None:
    labels = official[list(FINDINGS)].to_numpy()
    half = np.full(labels.shape, 0.5)
    baseline = subgroups(labels, half, official, FINDINGS, np.full(14, 0.5), resamples=0).view_baseline
    baseline = baseline.set_index("finding")
    assert baseline.at["Edema", "auroc"] == pytest.approx(0.681, abs=5e-4)
    assert baseline.at["Edema", "view"] == "AP"
    assert baseline.at["Hernia", "view"] == "PA"
    assert baseline.at["macro", "auroc"] == pytest.approx(0.588, abs=5e-4)


def test_the_interval_of_a_group_of_everybody_is_that_of_the_bootstrap() -> None:
    split = Split(sex="F")
    found = split.score(resamples=100, seed=4).table
    expected = bootstrap(
        split.labels,
        split.probabilities,
        split.thresholds,
        split.entries["patient"].to_numpy(),
        NAMES,
        resamples=100,
        seed=4,
    ).intervals()
    for finding in (*NAMES[:2], "macro"):
        row = cell(found, attribute="sex", finding=finding)
        if row["findings"] == (3 if finding == "macro" else 1):
            for name in ("auroc_low", "auroc_high", "recall_low", "recall_high"):
                assert row[name] == pytest.approx(expected.at[finding, name], abs=1e-12)


def test_the_same_seed_gives_the_same_intervals_and_another_gives_others() -> None:
    split = Split()
    first, again, other = (split.score(resamples=40, seed=seed).table for seed in (1, 1, 2))
    pd.testing.assert_frame_equal(first, again)
    assert (first["auroc_low"] != other["auroc_low"]).any()
    known = first["auroc"].notna()
    assert (first["auroc_low"][known] < first["auroc"][known]).all()
    assert split.score().table["auroc_low"].isna().all()


def test_a_finding_without_a_threshold_is_ranked_but_has_no_recall() -> None:
    split = Split()
    thresholds = np.array([np.nan, *split.thresholds[1:]])
    found = split.score(thresholds=thresholds)
    row = cell(found.table, attribute="sex", group="F", finding="Mass")
    assert row["auroc"] > 0.5
    assert np.isnan(row["recall"])
    assert np.isnan(cell(found.gaps, attribute="sex", finding="Mass")["tpr_gap"])
    macro = cell(found.table, attribute="view", group="AP", finding="macro")
    assert not np.isnan(macro["recall"])


def test_everything_is_json_without_nan() -> None:
    found = Split().score()
    record = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert list(record) == ["table", "gaps", "floor", "warnings"]
    assert len(record["table"]) == len(found.table)
    assert record["table"][0]["finding"] == "Mass"
    assert record["table"][0]["auroc_low"] is None


def test_entries_of_another_length_and_other_findings_are_refused() -> None:
    split = Split()
    arrays = split.labels, split.probabilities
    with pytest.raises(ValueError, match=r"an entry for each of \d+ images, got 5"):
        subgroups(*arrays, split.entries[:5], NAMES, split.thresholds)
    with pytest.raises(ValueError, match="each of 2 findings, got 3"):
        subgroups(*arrays, split.entries, NAMES[:2], split.thresholds)
