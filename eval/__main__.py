"""The evaluation's command line: `python -m eval RUN`, or `python -m eval` for the list of runs."""

import atexit
import contextlib
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

import click
import numpy as np

from eval.evaluation import (
    FITTED_ON,
    Evaluation,
    Protocol,
    evaluate,
    evaluate_average,
    joint_folder,
)
from eval.explanation import Explaining, explain
from eval.options import (
    json_option,
    read_rule,
    resamples_option,
    rule_option,
    runs_option,
    seed_option,
)
from eval.predicting.candidate import Candidate, Predicting, open_candidate
from eval.predicting.selection import Selection
from eval.report import metrics_record, write_report, write_scores
from eval.report.comparison_page import write_comparison
from eval.result_files import write_json
from eval.scores.calibration import METHODS
from eval.several.comparison import RunComparison, compare_runs
from eval.several.same_images import Images, require_same_images
from shards.boxes import read_box_list
from shards.documents import read_json
from shards.errors import BadData, ResourceMissing
from shards.locking import only_one
from shards.publishing import remove_partials
from shards.signals import stoppable
from trainer.devices import DEVICE_CHOICES
from trainer.run_directory import RunDirectory, find_run, list_runs

WAIT = 60
"""Seconds that another evaluation of a run is waited for. One of stored predictions takes some seconds."""


class _Macro(TypedDict):
    auroc: float | None


class _Metrics(TypedDict):
    macro: _Macro


@click.command(
    context_settings={"auto_envvar_prefix": "CXRAPID", "show_default": True, "max_content_width": 110}
)
@click.argument("names", metavar="[RUN]...", nargs=-1)
@runs_option()
@click.option(
    "--split",
    default="test",
    metavar="val|test|FILE",
    help="Images to score; FILE lists names of val or test images, one a line.",
)
@click.option(
    "--shards",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Where the runs' shards are now.  [default: where they were]",
)
@click.option("--other-shards", is_flag=True, help="Score on shards the run was not trained on.")
@rule_option()
@click.option(
    "--calibration",
    type=click.Choice([*METHODS, "none"]),
    default="platt",
    help="Fitted on val per finding, for the probabilities that are shown; decisions and ranks never use it.",
)
@resamples_option(besides=" Those of localization are always of 1,000.")
@seed_option("the resamples")
@click.option("--tta/--no-tta", default=False, help="Average each image with its mirror.")
@click.option(
    "--set-decisions",
    is_flag=True,
    help="Have RUN decide by this rule, calibration and mirror from now on, as it does after a plain evaluation.",
)
@click.option("--average", is_flag=True, help="Score the mean of the runs' probabilities as well.")
@click.option("--compare", is_flag=True, help="Set the runs side by side, each against the first.")
@click.option(
    "--heatmaps",
    type=click.IntRange(0),
    default=6,
    metavar="N",
    help="Pictures each of true positives, false positives, false negatives; 0: no heat map, no localization, "
    "so that scoring stored predictions by another rule needs no torch.",
)
@click.option(
    "--boxes",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A list of boxes as NIH's BBox_List_2017.csv, for localization.  [default: the shards' own]",
)
@click.option("--again", is_flag=True, help="Predict anew, where stored predictions would do.")
@click.option("--report/--no-report", default=True, help="Draw the pictures and report.html, too.")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=64,
    metavar="IMAGES",
    help="Images a step; changes speed and memory only.",
)
@click.option(
    "--device",
    default="auto",
    metavar=DEVICE_CHOICES,
    help="Where the model runs, if it must; auto: the first GPU if there is one.",
)
@json_option()
def main(
    names: tuple[str, ...],
    runs: Path,
    split: str,
    shards: Path | None,
    other_shards: bool,
    rule: str,
    calibration: str,
    resamples: int,
    seed: int,
    tta: bool,
    set_decisions: bool,
    average: bool,
    compare: bool,
    heatmaps: int,
    boxes: Path | None,
    again: bool,
    report: bool,
    batch_size: int,
    device: str,
    json_file: Path | None,
) -> None:
    """Score each RUN, given by name or path: thresholds and calibration from val, all else on the split.

    Writes predictions, thresholds, scores, pictures and report.html to RUN/eval/SPLIT/. A plain evaluation
    sets what RUN decides by, in decisions.json; one by another --rule or --calibration or with --tta is a
    what-if: it writes to SPLIT-RULE/, and sets nothing without --set-decisions. Predictions are made once:
    scoring again needs neither torch nor a GPU, but heat maps of other decisions do; --heatmaps 0 leaves
    them out. --average writes to A+B/eval/SPLIT/ beside the first run, --compare to A-vs-B/eval/SPLIT/; the
    runs themselves are only read, and predicted where they were not yet. Without RUN, lists the runs.
    """  # fmt: skip
    if not names:
        _list(runs)
        return
    if len(names) == 1 and (average or compare):
        raise click.UsageError(f"--{'average' if average else 'compare'} needs two runs or more")
    if compare and not resamples:
        raise click.UsageError("--compare needs --resamples: its intervals and p-values come from them")
    if boxes is not None and not heatmaps:
        raise click.UsageError("--boxes needs heat maps, which --heatmaps 0 leaves out")
    together = average or compare
    if together and (option := _of_one_run(boxes, again=again, set_decisions=set_decisions)):
        raise click.UsageError(
            f"{option} is for a run of its own: --average and --compare only read the runs; leave it out, or "
            "leave them out"
        )
    if set_decisions and other_shards:
        raise click.UsageError("--set-decisions needs the shards the run was trained on, not --other-shards")
    protocol = Protocol(
        selection=Selection.parse(split),
        rule=read_rule(rule),
        calibration=next((method for method in METHODS if method == calibration), None),
        resamples=resamples,
        seed=seed,
    )
    found = [find_run(name, runs) for name in names]
    if len({run.path.resolve() for run in found}) < len(found):
        raise click.UsageError("a run is given twice")
    predicting = Predicting(device=device, batch_size=batch_size, tta=tta, again=again)
    with stoppable("what was finished is kept; the same command goes on from there"):
        # All are opened before the first is predicted: what is wrong shows at once.
        candidates = [
            open_candidate(run, predicting, shards, other_shards=other_shards, read_only=together)
            for run in found
        ]
        explaining = Explaining(heatmaps, None if boxes is None else read_box_list(boxes))
        _check(candidates, protocol.selection, explaining, together=together)
        with _locked(found):
            if together:
                evaluations = [_score_member(candidate, protocol) for candidate in candidates]
            else:
                evaluations = [
                    _score(candidate, protocol, explaining, report, set_decisions=set_decisions)
                    for candidate in candidates
                ]
            if average:
                joint = evaluate_average(candidates, protocol)
                _show(joint)
                _write(joint, report)
                evaluations.append(joint)
            comparison = compare_runs(evaluations) if compare else None
            if comparison is not None:
                click.echo(comparison.to_text())
                folder = write_comparison(comparison) if report else comparison.write()
                for path in sorted(folder.glob("comparison.*")):
                    click.echo(path)
        if json_file is not None:
            write_json(json_file, _record(evaluations, comparison))


def _of_one_run(boxes: Path | None, *, again: bool, set_decisions: bool) -> str | None:
    """Return an option that was given and changes what a run holds, or shows what only its report does."""
    given = {"--boxes": boxes is not None, "--again": again, "--set-decisions": set_decisions}
    return next((option for option, is_given in given.items() if is_given), None)


@contextlib.contextmanager
def _locked(runs: Sequence[RunDirectory]) -> Iterator[None]:
    """Keep other commands out of the runs, and remove what killed ones left there and in the joint folders."""
    with contextlib.ExitStack() as held:
        for path in sorted(run.path.resolve() for run in runs):
            held.enter_context(only_one(path, wait=WAIT))
        joint = [joint_folder(runs, sign) for sign in ("+", "-vs-")]
        inner = [folder for top in (*(run.evaluations for run in runs), *joint) for folder in top.glob("**/")]
        for folder in (*(run.path for run in runs), *inner):
            remove_partials(folder)
        yield


def _check(
    candidates: list[Candidate], selection: Selection, explaining: Explaining, *, together: bool
) -> None:
    """Raise BadData for what can be known to be wrong before hours of prediction."""
    parts: dict[str, list[Images]] = {FITTED_ON: [], selection.name: []}
    for each in candidates:
        rows = np.sort(np.concatenate(list(selection.rows(each.shards).values())))
        explaining.require_boxes(each.shards, rows)
        if together:
            for part, its_rows in {FITTED_ON: each.shards.rows(FITTED_ON), selection.name: rows}.items():
                parts[part].append(Images.of_rows(each.run.name, each.shards, its_rows))
    for part, images in parts.items():
        require_same_images(images, part)


def _score_member(candidate: Candidate, protocol: Protocol) -> Evaluation:
    """Score a run of an average or a comparison; only predictions that it lacks are written into it."""
    evaluation = evaluate(candidate, protocol)
    candidate.release()
    _show(evaluation)
    return evaluation


def _score(
    candidate: Candidate, protocol: Protocol, explaining: Explaining, report: bool, *, set_decisions: bool
) -> Evaluation:
    """Score a run; whatever fails after its scores are known leaves them shown and written."""
    evaluation = evaluate(candidate, protocol, set_decisions=set_decisions)
    _show(evaluation)
    _show_decisions(evaluation)
    if explaining.per_kind:  # which may take long; else all is written in a moment
        write_scores(evaluation)
    try:
        evaluation = explain(evaluation, candidate, explaining)
    except click.ClickException:
        _write(evaluation, report)
        raise
    finally:
        candidate.release()
    _write(evaluation, report)
    return evaluation


def _show(evaluation: Evaluation) -> None:
    images = len(evaluation.predictions[evaluation.split].rows)
    click.echo(
        f"{evaluation.name} on {evaluation.split}: {images} images of {evaluation.patients} patients, "
        f"thresholds ({evaluation.rule}) from val"
    )
    click.echo(evaluation.scores.to_text())
    for warning in evaluation.warnings:
        if warning not in evaluation.scores.warnings:  # which stand under the table
            click.echo(warning)


def _show_decisions(evaluation: Evaluation) -> None:
    """Say what prediction decides by from now on, unless it is what this evaluation was made with anyway."""
    name, point, before = evaluation.name, evaluation.operating_point, evaluation.decided_before
    if before is not None and point is not None and before.to_json("") == point.to_json(""):
        return
    if evaluation.decides:
        click.echo(f"{name} now decides by {point}{'' if before is None else f'; before by {before}'}")
    else:
        still = "has no decisions yet" if before is None else f"still decides by {before}"
        ask = "a plain evaluation sets them" if before is None else "this was a what-if"
        own = not evaluation.on_other_shards
        click.echo(f"{name} {still}; {ask}{', and --set-decisions makes this one count' if own else ''}")


def _write(evaluation: Evaluation, report: bool) -> None:
    if evaluation.localization is not None:
        click.echo(evaluation.localization.to_text())
    folder = write_report(evaluation) if report else write_scores(evaluation)
    written = sorted(path for path in folder.iterdir() if path.is_file())
    # The page is last, where the eye is when a command has ended.
    for path in sorted(written, key=lambda path: path.suffix == ".html"):
        click.echo(path)


def _record(evaluations: list[Evaluation], comparison: RunComparison | None) -> dict[str, Any]:
    if len(evaluations) == 1:
        return metrics_record(evaluations[0])
    return {
        "evaluations": [metrics_record(evaluation) for evaluation in evaluations],
        "comparison": None if comparison is None else comparison.to_json(),
    }


def _list(runs: Path) -> None:
    found = list_runs(runs)
    if not found:
        click.echo(f"no runs in {runs}; train one with: python -m trainer --arch custom_cnn")
        return
    click.echo(f"{'run':24} {'arch':12} {'state':13} macro AUROC on test")
    for run in found:
        click.echo(f"{run.name:24} {_arch(run):12} {run.state:13} {_macro_auroc(run)}")


def _arch(run: RunDirectory) -> str:
    try:
        return str(run.read_config()["arch"])
    except (BadData, KeyError, TypeError):
        return "damaged"


def _macro_auroc(run: RunDirectory) -> str:
    metrics = run.evaluations / "test" / "metrics.json"
    if not metrics.is_file():
        return f"not scored; python -m eval {run.name}" if run.model.is_file() else "-"
    try:
        auroc = read_json(metrics, _Metrics)["macro"]["auroc"]
    except (BadData, ResourceMissing):
        return f"damaged; python -m eval {run.name}"
    return "-" if auroc is None else f"{auroc:.3f}"


if __name__ == "__main__":
    gc.freeze()  # what is imported stays, so looking through it for garbage would only take time
    atexit.register(gc.unfreeze)  # else libraries that look for leaks as Python ends report what it kept
    main(prog_name="python -m eval")
