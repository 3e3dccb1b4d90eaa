"""Command line of the scorer: `python -m eval.score`, for predictions of any model; needs no torch."""

if __name__ == "__main__":
    import shards.startup  # noqa: F401  first: Ctrl-C ends in one line while the rest is imported

from pathlib import Path
from typing import Any

import click

from eval.options import json_option, read_rule, resamples_option, rule_option, seed_option
from eval.predict.selection import Selection
from eval.result_files import write_json, write_table
from eval.submission.reading import choose_entries, read_labels, read_submission, require_all, require_apart
from eval.submission.scoring import SubmissionScores, score_submission
from shards.console import PATH, Command, echo
from shards.files import sha256_of
from shards.processes import graceful_exit


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

    It names the image in a column `Image Index` or `image`, and has a probability for each of the 14
    findings, in a column named as the finding, or with prob_ before it. Every image of --split must be
    there once; predictions on other images are ignored.

    AUROC, AUPRC, Brier and ECE are over all images. Thresholds are picked on --val, of which no patient
    may be among the scored ones; without it on one half of the patients, and precision, recall,
    specificity, NPV, F1 and the counts are then of the other half.
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
        scored = score_submission(given, others, chosen_rule, resamples=resamples, seed=seed)
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
        echo(f"passed over: predictions on {rest:,} images that are not in {name}")
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


def _write(folder: Path, record: dict[str, Any], scored: SubmissionScores) -> None:
    thresholds = {name: row["threshold"] for name, row in record["per_finding"].items()}
    about = {name: record[name] for name in ("threshold_rule", "thresholds_fitted_on", "fitted")}
    write_json(folder / "metrics.json", record)
    write_table(folder / "metrics.csv", scored.scores.to_frame())
    write_json(folder / "thresholds.json", {**about, "thresholds": thresholds})
    if scored.intervals is not None:
        write_table(folder / "intervals.csv", scored.intervals)


if __name__ == "__main__":
    main(prog_name="python -m eval.score")
