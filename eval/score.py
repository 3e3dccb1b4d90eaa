"""`python -m eval.score`: score predictions of any model by the protocol of `python -m eval`; needs no torch."""

if __name__ == "__main__":
    import shards.startup  # noqa: F401  first: Ctrl-C ends in one line while the rest is imported

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd

from eval.options import json_option, read_rule, resamples_option, rule_option, seed_option
from eval.predict.selection import Selection
from eval.result_files import write_json, write_table
from eval.scores.bootstrap import Resampled, all_intervals, bootstrap
from eval.scores.metrics import DECIDED, ERRORS, RANKED, Scores, plain_rows, score
from eval.scores.thresholds import Floats, Rule, pick_thresholds
from eval.submission import Submission, choose_entries, read_labels, read_submission, require_all, require_apart
from shards.console import PATH, Command, echo
from shards.errors import BadData
from shards.files import sha256_of
from shards.processes import graceful_exit

# The columns of scores that need a threshold.
_OF_DECISIONS = ("threshold", "tp", "fp", "fn", "tn", *DECIDED)


@dataclass(frozen=True, eq=False)
class _SubmissionScores:
    """The scores of a submission, and the images that thresholds were picked on and applied to."""

    scores: Scores
    """Columns that need a threshold are of the images of `decided`, all others of all images."""
    intervals: pd.DataFrame | None
    """Those of `all_intervals` without calibration, of the same images as the scores; None without resamples."""
    at_half: Scores
    """With the threshold 0.5 for every finding, each column of the same images as that of the scores."""
    fitted: Submission
    """The predictions that the thresholds were picked on."""
    decided: Submission
    """The predictions that they were applied to."""
    warnings: tuple[str, ...]
    """What is left out of a mean or an interval; to be printed, not dropped."""

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists and numbers, with None for NaN."""
        return {
            "fitted": self.fitted.to_json(),
            "decided": self.decided.to_json(),
            **self.scores.to_json(),
            "warnings": list(self.warnings),
            "intervals": None if self.intervals is None else plain_rows(self.intervals.to_dict("index")),
            "at_half": self.at_half.to_json(),
        }

    def to_text(self) -> str:
        """Return the table for a terminal, the headline's interval, and the warnings under it."""
        lines = self.scores.to_text().splitlines()[: len(self.scores.per_finding) + 3]
        if self.intervals is not None:
            low, high = self.intervals.loc["macro", ["auroc_low", "auroc_high"]]
            lines.append(
                f"macro AUROC {self.scores.macro['auroc']:.3f}, "
                f"95 % confidence interval over patients {low:.3f} to {high:.3f}"
            )
        return "\n".join([*lines, *self.warnings])


def _score_submission(
    given: Submission, val: Submission | None, rule: Rule, *, resamples: int, seed: int
) -> _SubmissionScores:
    """Score a submission with thresholds that `rule` picks on `val`.

    Without `val` it picks them on one half of the patients, drawn with `seed`, and the measures that need a threshold
    are of the other half alone. AUROC, average precision, Brier and ECE are of all images either way. Intervals are
    over patients, drawn with the same seed; 0 resamples: none. Raises BadData where there is only one patient to halve.
    """
    fitted, decided = _halve(given, seed) if val is None else (val, given)
    thresholds, half = pick_thresholds(fitted.labels, fitted.probabilities, rule), np.full(len(given.findings), 0.5)
    scores, at_half = _score(given, thresholds), _score(given, half)
    warnings = [*scores.warnings]
    if decided is not given:
        other = _score(decided, thresholds)
        warnings += [
            f"{finding} has one class only in the half that is decided on: its precision, recall, "
            "specificity, NPV and F1 are NaN and left out of the macro and micro means."
            for finding in other.skipped
            if finding not in scores.skipped
        ]
        scores = scores.with_columns(other, _OF_DECISIONS)
        at_half = at_half.with_columns(_score(decided, half), _OF_DECISIONS)
    intervals = None
    if resamples:
        drawn = [_bootstrap(each, thresholds, resamples, seed) for each in dict.fromkeys((given, decided))]
        intervals = all_intervals(drawn[-1], decided.labels, decided.probabilities, decided.patients)
        of_all = [f"{measure}_{end}" for measure in (*RANKED, *ERRORS) for end in ("low", "high")]
        intervals = intervals.assign(**drawn[0].intervals()[of_all])
        warnings += dict.fromkeys(warning for each in drawn for warning in each.warnings)
    return _SubmissionScores(scores, intervals, at_half, fitted, decided, tuple(warnings))


def _halve(given: Submission, seed: int) -> tuple[Submission, Submission]:
    patients = np.unique(given.patients)
    if len(patients) < 2:
        raise BadData("one patient cannot be halved to pick thresholds; give predictions on others with --val")
    first = np.random.default_rng(seed).permutation(patients)[: len(patients) // 2]
    chosen = np.isin(given.patients, first)
    return given.of(chosen), given.of(~chosen)


def _score(part: Submission, thresholds: Floats) -> Scores:
    return score(part.labels, part.probabilities, thresholds, part.findings)


def _bootstrap(part: Submission, thresholds: Floats, resamples: int, seed: int) -> Resampled:
    return bootstrap(
        part.labels, part.probabilities, thresholds, part.patients, part.findings, resamples=resamples, seed=seed
    )


@click.command(
    cls=Command, context_settings={"auto_envvar_prefix": "CXRAPID", "show_default": True, "max_content_width": 110}
)
@click.argument("predictions", type=PATH, metavar="PREDICTIONS.csv")
@click.option(
    "--entries",
    "entries_file",
    type=PATH,
    required=True,
    metavar="FILE",
    help="The labels: NIH's Data_Entry_2017*.csv (or .gz), or the entries.csv of a shard folder.",
)
@click.option(
    "--val",
    type=PATH,
    metavar="FILE",
    help="The model's predictions on other patients, to pick thresholds on.  [default: half of the patients]",
)
@click.option(
    "--split",
    metavar="val|test|FILE",
    help="Images to score; FILE lists their names, one a line, as NIH's test_list.txt.  "
    "[default: test of an entries.csv, every image of NIH's metadata]",
)
@rule_option()
@resamples_option()
@seed_option("the resamples and of the halves")
@json_option()
@click.option(
    "--out",
    type=PATH,
    metavar="FOLDER",
    help="Write metrics.json, metrics.csv, thresholds.json and intervals.csv into it.",
)
def main(
    predictions: Path,
    entries_file: Path,
    val: Path | None,
    split: str | None,
    rule: str,
    resamples: int,
    seed: int,
    json_file: Path | None,
    out: Path | None,
) -> None:
    """Score PREDICTIONS.csv of any model by the protocol of `python -m eval`.

    It names the image in a column `Image Index` or `image`, and has a probability for each finding, in a
    column named as the finding, or with prob_ before it. Every image of --split must occur once; predictions on
    other images are ignored.

    AUROC, AUPRC, Brier and ECE are over all images. Thresholds are picked on --val, of which no patient may be among
    the scored ones; without it on one half of the patients, and precision, recall, specificity, NPV, F1 and the counts
    are then of the other half.
    """
    chosen_rule = read_rule(rule)
    selection = None if split is None else Selection.parse(split)
    with graceful_exit("nothing was written; the same command starts anew"):
        entries = read_labels(entries_file)
        wanted, name = choose_entries(entries, selection)
        everything = read_submission(predictions, entries)
        given = require_all(everything, wanted, predictions, name)
        others = None if val is None else read_submission(val, entries)
        if val is not None and others is not None:
            require_apart(given, others, val)
        scored = _score_submission(given, others, chosen_rule, resamples=resamples, seed=seed)
        record = {
            "predictions_sha256": sha256_of(predictions),
            "val_sha256": None if val is None else sha256_of(val),
            "entries_sha256": sha256_of(entries.csv),
            "split": name,
            **given.to_json(),
            "threshold_rule": chosen_rule.name,
            "thresholds_fitted_on": "val" if val is not None else "half of the patients",
            "resamples": resamples,
            "seed": seed,
            **scored.to_json(),
        }
    echo(f"{predictions} on {name}: {given.to_text()}")
    if rest := len(everything.entries) - len(given.entries):
        echo(f"ignored: predictions on {rest:,} images that are not in {name}")
    where = f"one half of the patients, drawn with seed {seed}" if val is None else str(val)
    echo(f"thresholds ({chosen_rule.name}) from {where}: {scored.fitted.to_text()}")
    if val is None:
        echo(
            "precision, recall, specificity, NPV, F1 and the counts are of the other half: "
            f"{scored.decided.to_text()}; all else is of all images"
        )
    echo(scored.to_text())
    # After the scores are shown: a disk that cannot be written to takes nothing away.
    if json_file is not None:
        write_json(json_file, record)
    if out is not None:
        _write(out, record, scored)


def _write(folder: Path, record: dict[str, Any], scored: _SubmissionScores) -> None:
    thresholds = {name: row["threshold"] for name, row in record["per_finding"].items()}
    about = {name: record[name] for name in ("threshold_rule", "thresholds_fitted_on", "fitted")}
    write_json(folder / "metrics.json", record)
    write_table(folder / "metrics.csv", scored.scores.to_frame())
    write_json(folder / "thresholds.json", {**about, "thresholds": thresholds})
    if scored.intervals is not None:
        write_table(folder / "intervals.csv", scored.intervals)


if __name__ == "__main__":
    main(prog_name="python -m eval.score")
