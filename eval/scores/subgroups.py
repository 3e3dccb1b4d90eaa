"""Subgroup analysis: metrics by sex, age, view and visit, and the view-only baseline."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.sparse import csr_array

from eval.scores.bootstrap import percentiles, resample
from eval.scores.thresholds import Floats, apply_thresholds, paired
from eval.scores.weighted import Ranking, count_images, rank

MACRO = "macro"
FEWEST = 10
"""Patients with a finding, and patients without it, that a group needs to be scored on it: a resample of the patients
then lacks one of the two with a probability of at most 2 exp(-10)."""
_OLDEST = 120  # years, as in shards.entries; the 2017 metadata has ages of up to 414
_LAST_DECADE = 90
_UNKNOWN = "unknown"

Bools = npt.NDArray[np.bool_]


class Group(NamedTuple):
    """Some of the images of a split."""

    attribute: str
    """sex, age, view or visit."""
    name: str
    images: Bools
    """[N], true for its images."""


def group_images(entries: pd.DataFrame) -> list[Group]:
    """Divide the images by each attribute; every image is in one group of each.

    `entries` has a row for each image, with age (years), sex, view and follow_up. The groups: sex and view as spelt,
    decades of age from `0-9` to `80-89` and then `90+`, and `first` for NIH's follow-up number 0, which each patient
    has once, or `follow-up`. Groups without an image are left out. A sex or view that is empty, and an age under 0 or
    over 120, is `unknown`.
    """
    decades = entries["age"].to_numpy() // 10 * 10
    age = [
        _UNKNOWN if not 0 <= years <= _OLDEST else f"{decade}-{decade + 9}" if decade < _LAST_DECADE else f"{decade}+"
        for years, decade in zip(entries["age"], np.minimum(decades, _LAST_DECADE), strict=True)
    ]
    columns: dict[str, Any] = {
        "sex": entries["sex"].replace("", _UNKNOWN),
        "age": age,
        "view": entries["view"].replace("", _UNKNOWN),
        "visit": np.where(entries["follow_up"] == 0, "first", "follow-up"),
    }
    groups = []
    for attribute, column in columns.items():
        names = np.asarray(column, dtype=np.str_)
        groups += [Group(attribute, str(name), names == name) for name in np.unique(names)]
    return groups


@dataclass(frozen=True, eq=False)
class GroupStats:
    """A group of images, summed up per patient as far as weights of the patients allow."""

    images: int
    patients: int
    """Those that have an image here; weights are of all U patients of the split."""
    positives: npt.NDArray[np.int64]
    """[F], images."""
    enough: Bools
    """[F], true where FEWEST patients have the finding and FEWEST lack it."""
    rankings: tuple[Ranking, ...]
    recalled: csr_array
    """[F, U], true positives of each patient."""
    recallable: csr_array
    """[F, U], positives of each patient."""

    def measure(self, weights: Floats) -> tuple[Floats, Floats]:
        """Return AUROC and recall, both [F, R], where patients weigh `weights` [U, R]."""
        auroc = np.stack([ranking.measure(weights)[0] for ranking in self.rankings])
        with np.errstate(invalid="ignore"):  # no positive: NaN
            return auroc, np.asarray((self.recalled @ weights) / (self.recallable @ weights))


def group_stats(
    truth: Bools, probabilities: Floats, predicted: Bools, units: npt.NDArray[np.intp], patients: int
) -> GroupStats:
    """Sum up images: `units` is [N], below `patients`; the other arrays are [N, F]."""
    recallable, lacking = _per_patient(truth, units, patients), _per_patient(~truth, units, patients)
    return GroupStats(
        images=len(truth),
        patients=len(np.unique(units)),
        positives=truth.sum(axis=0),
        enough=(_patients_in(recallable) >= FEWEST) & (_patients_in(lacking) >= FEWEST),
        rankings=tuple(
            rank(positive, column, units, patients) for positive, column in zip(truth.T, probabilities.T, strict=True)
        ),
        recalled=_per_patient(truth & predicted, units, patients),
        recallable=recallable,
    )


def _per_patient(chosen: Bools, units: npt.NDArray[np.intp], patients: int) -> csr_array:
    images, columns = np.nonzero(chosen)
    return count_images(columns, units[images], (chosen.shape[1], patients))


def _patients_in(sums: csr_array) -> npt.NDArray[np.intp]:
    sums.sum_duplicates()
    return np.asarray(np.diff(sums.indptr), dtype=np.intp)


@dataclass(frozen=True, eq=False)
class Subgroups:
    """How a model scores in groups of images; NaN where a group has too few patients (FEWEST)."""

    table: pd.DataFrame
    """One row per attribute, group and finding, and then `macro`: attribute, group, finding, findings, images,
    patients, positives (images), auroc, auroc_low, auroc_high, recall, recall_low, recall_high. `findings` is 1 where
    the group is scored on the finding, else 0; for macro it is the number of findings averaged."""
    gaps: pd.DataFrame
    """One row per attribute and finding, and then `macro`: attribute, finding, lowest, highest (the groups of least and
    greatest recall), tpr_gap (the difference of their recalls), tpr_gap_low, tpr_gap_high. The interval is of the
    difference of these two groups and ignores that they were chosen for being the furthest apart. For macro the gap
    is the mean over the findings that have one."""
    view_baseline: pd.DataFrame
    """What the view position alone scores, one row per finding and then `macro`: finding, view (that of the greatest
    share of positives), auroc, auroc_low, auroc_high."""
    warnings: tuple[str, ...]
    """What is left out; to be printed, not dropped."""

    def to_json(self) -> dict[str, Any]:
        """Return the three tables as lists of plain dicts, with None for NaN, and the warnings."""
        tables = {"table": self.table, "gaps": self.gaps, "floor": self.view_baseline}
        plain = {name: table.astype(object).where(table.notna(), None) for name, table in tables.items()}
        return {name: table.to_dict("records") for name, table in plain.items()} | {"warnings": list(self.warnings)}


def subgroups(
    labels: npt.NDArray[Any],
    probabilities: npt.NDArray[Any],
    entries: pd.DataFrame,
    findings: Sequence[str],
    thresholds: npt.NDArray[Any],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Subgroups:
    """Score each group of images of `group_images`: AUROC and recall, with 95 % intervals over patients.

    `labels`, `probabilities` and `thresholds` are those of `metrics.score`, the same thresholds for all groups;
    `entries` has a row for each image, in the same order, with patient, age (years), sex, view and follow_up. The
    resamples are those that `bootstrap` draws of all patients with this seed; 0 leaves the intervals NaN.

    A group is scored on a finding that FEWEST of its patients have and FEWEST lack in some image. To compare like with
    like, the macro of an attribute is the mean over the findings on which all its groups are scored; groups scored on
    less than half of what any of them is scored on do not count there, and have no macro. That of recall also leaves
    out findings without a threshold.

    The view-only baseline ranks images by the share of positives among all images of their view in this very split: no
    model that sees the view and nothing else can score more. Raises ValueError as `score` does, or if `entries` has
    another length.
    """
    truth, probabilities = paired(labels, probabilities)
    if truth.shape[1] != len(findings):
        raise ValueError(f"expected one column for each of {len(findings)} findings, got {truth.shape[1]}")
    if len(entries) != len(truth):
        raise ValueError(f"expected an entry for each of {len(truth)} images, got {len(entries)}")
    predicted = apply_thresholds(probabilities, thresholds)
    groups = group_images(entries)
    names, units = np.unique(entries["patient"].to_numpy(), return_inverse=True)
    patients = len(names)
    stats = [
        group_stats(truth[here], probabilities[here], predicted[here], units[here], patients) for *_, here in groups
    ]
    views = {name: here for attribute, name, here in groups if attribute == "view"}
    shares = pd.DataFrame({name: truth[here].mean(axis=0) for name, here in views.items()}, list(findings))
    view_alone = np.empty(truth.shape)
    for name, here in views.items():
        view_alone[here] = shares[name]
    baseline = group_stats(truth, view_alone, predicted, units, patients)
    ranked = np.stack([group.enough for group in stats])
    decided = ranked & ~np.isnan(np.asarray(thresholds, dtype=np.float64))

    def measure(weights: Floats) -> tuple[Floats, Floats, Floats]:
        measured = [group.measure(weights) for group in stats]
        auroc, recall = (np.stack(values) for values in zip(*measured, strict=True))
        auroc[~ranked], recall[~decided] = np.nan, np.nan
        return auroc, recall, baseline.measure(weights)[0]

    # The last axis of each: the sample itself, then the resamples.
    auroc, recall, viewed = resample(measure, patients, resamples=resamples, seed=seed)
    return Subgroups(
        _table(groups, stats, findings, auroc, recall),
        _gaps(groups, findings, recall),
        _view_baseline(shares, findings, viewed),
        _warnings(groups, ranked),
    )


def _compared(scored: Bools) -> tuple[Bools, Bools]:
    """Return which groups of an attribute [G] have a macro, and over which findings [F] it is the mean."""
    groups = 2 * scored.sum(axis=1) >= scored.any(axis=0).sum()
    return groups, scored[groups].all(axis=0) & groups.any()


def _table(
    groups: Sequence[Group], stats: Sequence[GroupStats], findings: Sequence[str], auroc: Floats, recall: Floats
) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for attribute, members in _by_attribute(groups):
        compared, shared = _compared(~np.isnan(auroc[members, :, 0]))
        peers = [member for member, counts in zip(members, compared, strict=True) if counts]
        decided = shared & ~np.isnan(recall[peers, :, 0]).any(axis=0)
        for member in members:
            group = stats[member]
            start = {"attribute": attribute, "group": groups[member].name}
            sizes = {"images": group.images, "patients": group.patients}
            has_macro = member in peers
            for column, finding in enumerate(findings):
                rows.append(
                    {**start, "finding": finding, "findings": int(group.enough[column]), **sizes}
                    | {"positives": int(group.positives[column])}
                    | _interval("auroc", auroc[member, column])
                    | _interval("recall", recall[member, column])
                )
            rows.append(
                {**start, "finding": MACRO, "findings": int(shared.sum()) * has_macro, **sizes, "positives": None}
                | _interval("auroc", _mean(auroc[member, shared & has_macro]))
                | _interval("recall", _mean(recall[member, decided & has_macro]))
            )
    return pd.DataFrame(rows).astype({"positives": "Int64"})


def _gaps(groups: Sequence[Group], findings: Sequence[str], recall: Floats) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for attribute, members in _by_attribute(groups):
        gaps = []
        for column, finding in enumerate(findings):
            known = [member for member in members if not np.isnan(recall[member, column, 0])]
            lowest, highest, gap = "", "", np.full(recall.shape[-1], np.nan)
            if len(known) > 1:
                low = min(known, key=lambda member: recall[member, column, 0])
                high = max(reversed(known), key=lambda member: recall[member, column, 0])
                lowest, highest = groups[low].name, groups[high].name
                gap = recall[high, column] - recall[low, column]
                gaps.append(gap)
            row = {"attribute": attribute, "finding": finding, "lowest": lowest, "highest": highest}
            rows.append(row | _interval("tpr_gap", gap))
        row = {"attribute": attribute, "finding": MACRO, "lowest": "", "highest": ""}
        rows.append(row | _interval("tpr_gap", _mean(np.array(gaps).reshape(-1, recall.shape[-1]))))
    return pd.DataFrame(rows)


def _view_baseline(shares: pd.DataFrame, findings: Sequence[str], viewed: Floats) -> pd.DataFrame:
    scored = ~np.isnan(viewed[:, 0])
    rows: list[dict[str, Any]] = [
        {"finding": finding, "view": str(shares.loc[finding].idxmax())} | _interval("auroc", viewed[column])
        for column, finding in enumerate(findings)
    ]
    rows.append({"finding": MACRO, "view": ""} | _interval("auroc", _mean(viewed[scored])))
    return pd.DataFrame(rows)


def _warnings(groups: Sequence[Group], ranked: Bools) -> tuple[str, ...]:
    """Return one sentence per attribute with groups that lack a number."""
    found = []
    for attribute, members in _by_attribute(groups):
        lacking = int((~ranked[members]).sum())
        if lacking:
            thin = [groups[member].name for member in members if not ranked[member].any()]
            found.append(
                f"{attribute}: {lacking} of {ranked[members].size} scores of a finding in a group are left "
                f"out: fewer than {FEWEST} patients have it, or lack it"
                + (f"; nothing is scored in {', '.join(thin)}." if thin else ".")
            )
    return tuple(found)


def _by_attribute(groups: Sequence[Group]) -> Iterator[tuple[str, list[int]]]:
    for attribute, members in groupby(range(len(groups)), key=lambda member: groups[member].attribute):
        yield attribute, list(members)


def _mean(values: Floats) -> Floats:
    """Average over findings [F, 1 + R]; NaN where one is, or where there is none."""
    return values.mean(axis=0) if len(values) else np.full(values.shape[-1], np.nan)


def _interval(measure: str, values: Floats) -> dict[str, float]:
    """Name a value and, of its resamples that have a number, the ends of the 95 % interval."""
    low, high = (np.nan, np.nan) if np.isnan(values[0]) else percentiles(values[1:])
    return {measure: float(values[0]), f"{measure}_low": low, f"{measure}_high": high}
