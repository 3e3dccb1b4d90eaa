"""Run `python -m eval`: lock the runs, predict, score, average, compare, print and write."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import click

from eval.compare import RunComparison, compare_runs, write_comparison
from eval.ensemble import Images, joint_folder, require_same_images
from eval.evaluation import FITTED_ON, Evaluation, evaluate, evaluate_average, is_plain
from eval.explanation import HeatmapOptions, explain
from eval.operating_point import read_operating_point, write_operating_point
from eval.options import EvaluationOptions, Protocol
from eval.predict.scored_run import ScoredRun, open_run
from eval.predict.selection import Selection
from eval.report import metrics_record, write_report, write_scores
from eval.result_files import write_json
from shards.console import echo
from shards.files import exclusive_lock, remove_partials
from trainer.run_directory import RunDirectory

WAIT = 60
"""Seconds to wait for another evaluation of a run; one of stored predictions takes a few seconds."""


def launch(runs: Sequence[RunDirectory], options: EvaluationOptions) -> None:
    """Score the runs by the options, with their folders locked."""
    protocol, together = options.protocol, options.average or options.compare
    # Open all before predicting the first: errors show at once.
    scored_runs = [
        open_run(
            run, options.predict, options.shards, allow_other_shards=options.allow_other_shards, read_only=together
        )
        for run in runs
    ]
    heatmap_options = HeatmapOptions(options.heatmaps, options.boxes)
    _check(scored_runs, protocol.selection, heatmap_options, together=together)
    with _locked(runs):
        if together:
            evaluations = [_score_member(scored_run, protocol) for scored_run in scored_runs]
        else:
            evaluations = [_score(scored_run, protocol, heatmap_options, options) for scored_run in scored_runs]
        if options.average:
            joint = evaluate_average(scored_runs, protocol)
            _show(joint)
            _write(joint, options.report)
            evaluations.append(joint)
        comparison = compare_runs(evaluations) if options.compare else None
        if comparison is not None:
            echo(comparison.to_text())
            folder = write_comparison(comparison) if options.report else comparison.write()
            for path in sorted(folder.glob("comparison.*")):
                echo(path)
    if options.json_file is not None:
        write_json(options.json_file, _record(evaluations, comparison))


@contextlib.contextmanager
def _locked(runs: Sequence[RunDirectory]) -> Iterator[None]:
    """Lock the runs, and remove partial files that killed commands left in and beside them."""
    with contextlib.ExitStack() as held:
        for path in sorted(run.path.resolve() for run in runs):
            held.enter_context(exclusive_lock(path, wait=WAIT))
        joint = [joint_folder(runs, sign) for sign in ("+", "-vs-")]
        inner = [folder for top in (*(run.evaluations for run in runs), *joint) for folder in top.glob("**/")]
        for folder in (*(run.path for run in runs), *inner):
            remove_partials(folder)
        yield


def _check(
    scored_runs: list[ScoredRun], selection: Selection, heatmap_options: HeatmapOptions, *, together: bool
) -> None:
    """Raise BadData for faults that show before hours of prediction."""
    images: dict[str, list[Images]] = {FITTED_ON: [], selection.name: []}
    for each in scored_runs:
        rows = selection.rows(each.shards)
        heatmap_options.require_boxes(each.shards, rows)
        if together:
            for split, its_rows in {FITTED_ON: each.shards.rows(FITTED_ON), selection.name: rows}.items():
                images[split].append(Images.of_rows(each.run.name, each.shards, its_rows))
    for split, of_runs in images.items():
        require_same_images(of_runs, split)


def _score_member(scored_run: ScoredRun, protocol: Protocol) -> Evaluation:
    """Score a run of an average or a comparison; writes only missing predictions into it."""
    evaluation = evaluate(scored_run, protocol)
    scored_run.release()
    _show(evaluation)
    return evaluation


def _score(
    scored_run: ScoredRun, protocol: Protocol, heatmap_options: HeatmapOptions, options: EvaluationOptions
) -> Evaluation:
    """Score a run; prints and writes its scores even if heat maps fail."""
    evaluation = evaluate(scored_run, protocol)
    _show(evaluation)
    _decide(scored_run, evaluation, sets=options.set_decisions or is_plain(scored_run, protocol))
    if heatmap_options.per_kind:  # heat maps may take long
        write_scores(evaluation)
    try:
        explanation = explain(evaluation, scored_run, heatmap_options)
        evaluation = dataclasses.replace(evaluation, explanation=explanation)
    except click.ClickException:
        _write(evaluation, options.report)
        raise
    finally:
        scored_run.release()
    _write(evaluation, options.report)
    return evaluation


def _show(evaluation: Evaluation) -> None:
    images = len(evaluation.predictions[evaluation.split].rows)
    echo(
        f"{evaluation.name} on {evaluation.split}: {images} images of {evaluation.patients} patients, "
        f"thresholds ({evaluation.operating_point.rule}) from val"
    )
    echo(evaluation.scores.to_text())
    for warning in evaluation.warnings:
        if warning not in evaluation.scores.warnings:  # they are printed under the table
            echo(warning)


def _decide(scored_run: ScoredRun, evaluation: Evaluation, *, sets: bool) -> None:
    """Make this evaluation what the run decides by if it `sets` that; print any difference to before."""
    name, point = evaluation.name, evaluation.operating_point
    before = read_operating_point(scored_run.run, scored_run.header)
    if sets:
        write_operating_point(scored_run.run, scored_run.header, point)
    if before is not None and before.to_json("") == point.to_json(""):
        return
    if sets:
        echo(f"{name} now decides by {point}{'' if before is None else f'; before by {before}'}")
    else:
        still = "has no decisions yet" if before is None else f"still decides by {before}"
        reason = "a plain evaluation sets them" if before is None else "this was a what-if"
        own = not evaluation.on_other_shards
        echo(f"{name} {still}; {reason}{', and --set-decisions makes this one count' if own else ''}")


def _write(evaluation: Evaluation, report: bool) -> None:
    if evaluation.explanation.localization is not None:
        echo(evaluation.explanation.localization.to_text())
    folder = write_report(evaluation) if report else write_scores(evaluation)
    written = sorted(path for path in folder.iterdir() if path.is_file())
    # The page last: the end of the output is what a user sees.
    for path in sorted(written, key=lambda path: path.suffix == ".html"):
        echo(path)


def _record(evaluations: list[Evaluation], comparison: RunComparison | None) -> dict[str, Any]:
    if len(evaluations) == 1:
        return metrics_record(evaluations[0])
    return {
        "evaluations": [metrics_record(evaluation) for evaluation in evaluations],
        "comparison": None if comparison is None else comparison.to_json(),
    }
