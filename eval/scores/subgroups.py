"""Subgroup analysis: metrics by sex, age, view and visit, and the view-only baseline."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from eval.scores.bootstrap import percentiles, resample
from eval.scores.groups import FEWEST, Group, GroupStats, group_images, group_stats
from eval.scores.thresholds import Floats, apply_thresholds, paired

MACRO = "macro"

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Subgroups:
    """How a model scores in groups of images; NaN where a group has too few patients (FEWEST)."""

    table: pd.DataFrame
    """One row per attribute, group and finding, and then `macro`: attribute, group, finding, findings,
    images, patients, positives (images), auroc, auroc_low, auroc_high, recall, recall_low, recall_high.
    `findings` is 1 where the group is scored on the finding, else 0; for macro it is of how many findings
    this is the mean."""
    gaps: pd.DataFrame
    """One row per attribute and finding, and then `macro`: attribute, finding, lowest, highest (the
    groups of least and greatest recall), tpr_gap (the difference of their recalls), tpr_gap_low,
    tpr_gap_high. The interval is of the difference of these two groups: that they were chosen for
    being the furthest apart is not in it. For macro the gap is the mean over the findings that have one."""
    view_baseline: pd.DataFrame
    """What the view position alone scores, one row per finding and then `macro`: finding, view (that of
    the greatest share of positives), auroc, auroc_low, auroc_high."""
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

    `labels`, `probabilities` and `thresholds` are those of `metrics.score`, the same thresholds for
    all groups; `entries` has a row for each image, in the same order, with patient, age (years), sex,
    view and follow_up. The resamples are those that `bootstrap` draws of all patients with this
    seed; 0 leaves the intervals NaN.

    A group is scored on a finding that FEWEST of its patients have and FEWEST lack in some image. So
    that like is compared with like, the macro of an attribute is the mean over the findings on which
    all its groups are scored; groups scored on less than half of what any of them is scored on do
    not count there, and have no macro. That of recall also leaves out findings without a threshold.

    The view-only baseline ranks images by the share of positives among all images of their view in this very
    split: no model that sees the view and nothing else can score more. Raises ValueError as `score`
    does, or if `entries` has another length.
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
    """Tell which groups of an attribute [G] have a macro, and over which findings [F] it is the mean."""
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
        mean = _mean(np.array(gaps).reshape(-1, recall.shape[-1]))
        row = {"attribute": attribute, "finding": MACRO, "lowest": "", "highest": ""}
        rows.append(row | _interval("tpr_gap", mean))
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
    """Say of each attribute which groups lack a number, once for all findings."""
    said = []
    for attribute, members in _by_attribute(groups):
        lacking = int((~ranked[members]).sum())
        if lacking:
            thin = [groups[member].name for member in members if not ranked[member].any()]
            said.append(
                f"{attribute}: {lacking} of {ranked[members].size} scores of a finding in a group are left "
                f"out: fewer than {FEWEST} patients have it, or lack it"
                + (f"; nothing is scored in {', '.join(thin)}." if thin else ".")
            )
    return tuple(said)


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
