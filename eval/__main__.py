"""Command line of the evaluation: `python -m eval RUN`; `python -m eval` lists the runs."""

if __name__ == "__main__":
    import shards.startup  # noqa: F401  first: Ctrl-C ends in one line while the rest is imported

from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

import click

from eval.options import (
    CALIBRATIONS,
    EvaluationOptions,
    PredictOptions,
    Protocol,
    json_option,
    read_rule,
    resamples_option,
    rule_option,
    runs_option,
    seed_option,
)
from eval.predict.selection import Selection
from shards.boxes import read_box_list
from shards.console import PATH, Command, RenamedOption, echo
from shards.documents import read_json
from shards.errors import BadData, ResourceMissing
from shards.manifest import read_manifest
from shards.processes import graceful_exit
from trainer.devices import DEVICE_CHOICES
from trainer.run_directory import RunDirectory, find_run, list_runs

if TYPE_CHECKING:  # it takes a second to import
    from eval.scores.calibration import Method


class _Macro(TypedDict):
    auroc: float | None


class _Metrics(TypedDict):
    macro: _Macro


@click.command(
    cls=Command, context_settings={"auto_envvar_prefix": "CXRAPID", "show_default": True, "max_content_width": 110}
)
@click.argument("names", metavar="[RUN]...", nargs=-1)
@runs_option()
@click.option(
    "--split",
    default="test",
    metavar="val|test|FILE",
    help="Images to score; FILE lists names of val or test images, one per line.",
)
@click.option(
    "--shards",
    type=PATH,
    metavar="FOLDER",
    help="Where the runs' shards are now.  [default: where they were in training]",
)
@click.option(
    "--allow-other-shards",
    cls=RenamedOption,
    formerly="--other-shards",
    is_flag=True,
    help="Score on shards the run was not trained on.",
)
@rule_option()
@click.option(
    "--calibration",
    type=click.Choice(CALIBRATIONS),
    default="platt",
    help="Fitted per finding on val, for scripts/predict.py and calibrated Brier and ECE; decisions never use it.",
)
@resamples_option(besides=" Localization always uses 1,000.")
@seed_option("the resamples")
@click.option("--tta/--no-tta", default=False, help="Average the probabilities of each image and its mirror image.")
@click.option(
    "--set-decisions",
    is_flag=True,
    help="Make this rule, calibration and mirror what RUN decides by, as a plain evaluation does.",
)
@click.option("--average", is_flag=True, help="Also score the mean of the runs' probabilities.")
@click.option("--compare", is_flag=True, help="Compare each run with the first.")
@click.option(
    "--heatmaps",
    type=click.IntRange(0, 10_000),
    default=6,
    metavar="N",
    help="Heat maps each of true positives, false positives and false negatives; 0: no heat maps and no "
    "localization, so that scoring stored predictions needs no torch.",
)
@click.option(
    "--boxes",
    type=PATH,
    metavar="FILE",
    help="Boxes in the format of NIH's BBox_List_2017.csv, for localization.  [default: the shards' own]",
)
@click.option(
    "--force", cls=RenamedOption, formerly="--again", is_flag=True, help="Predict even where predictions are stored."
)
@click.option("--report/--no-report", default=True, help="Also draw the plots and write report.html.")
@click.option(
    "--batch-size",
    type=click.IntRange(1, 2**20),
    default=64,
    metavar="IMAGES",
    help="Images a step; affects speed and memory only.",
)
@click.option(
    "--device",
    default="auto",
    metavar=DEVICE_CHOICES,
    help="Where the model runs, if it has to; auto: the first GPU, else the CPU.",
)
@json_option()
def main(
    names: tuple[str, ...],
    runs: Path,
    split: str,
    shards: Path | None,
    allow_other_shards: bool,
    rule: str,
    calibration: 'Method | Literal["none"]',
    resamples: int,
    seed: int,
    tta: bool,
    set_decisions: bool,
    average: bool,
    compare: bool,
    heatmaps: int,
    boxes: Path | None,
    force: bool,
    report: bool,
    batch_size: int,
    device: str,
    json_file: Path | None,
) -> None:
    """Score each RUN, given by name or path: thresholds and calibration from val, all else on the split.

    Writes predictions, thresholds, scores, pictures and report.html to RUN/eval/SPLIT/. A plain evaluation sets what
    RUN decides by, in decisions.json; one by another --threshold-rule or --calibration or with --tta is a what-if: it
    writes to SPLIT-RULE/, and sets nothing without --set-decisions. Predictions are made once: scoring again needs
    neither torch nor a GPU, but heat maps of other decisions do; --heatmaps 0 leaves them out. --average writes to
    A+B/eval/SPLIT/ beside the first run, --compare to A-vs-B/eval/SPLIT/; the runs themselves are only read, and
    predicted where they were not yet. Without RUN, lists the runs.
    """
    if not names:
        _list(runs)
        return
    if len(names) == 1 and (average or compare):
        raise click.UsageError(f"--{'average' if average else 'compare'} needs two runs or more")
    if compare and not resamples:
        raise click.UsageError("--compare needs --resamples: its intervals and p-values come from them")
    if boxes is not None and not heatmaps:
        raise click.UsageError("--boxes needs heat maps, which --heatmaps 0 leaves out")
    of_one_run = {"--boxes": boxes is not None, "--force": force, "--set-decisions": set_decisions}
    option = next((option for option, is_given in of_one_run.items() if is_given), None)
    if (average or compare) and option is not None:
        raise click.UsageError(
            f"{option} is for a run of its own: --average and --compare only read the runs; leave it out, or "
            "leave them out"
        )
    if set_decisions and allow_other_shards:
        raise click.UsageError("--set-decisions needs the shards the run was trained on, not --allow-other-shards")
    chosen_rule, selection = read_rule(rule), Selection.parse(split)
    found = [find_run(name, runs) for name in names]
    if len({run.path.resolve() for run in found}) < len(found):
        raise click.UsageError("a run is given twice")
    options = EvaluationOptions(
        protocol=Protocol(selection, chosen_rule, None if calibration == "none" else calibration, resamples, seed),
        predict=PredictOptions(device, batch_size, tta=tta, force=force),
        set_decisions=set_decisions,
        average=average,
        compare=compare,
        heatmaps=heatmaps,
        boxes=None if boxes is None else read_box_list(boxes),
        report=report,
        shards=shards,
        allow_other_shards=allow_other_shards,
        json_file=json_file,
    )
    for run in found:
        if shards is not None or isinstance(run.read_config().get("shards"), str):
            read_manifest(shards or Path(run.read_config()["shards"]))
    with graceful_exit("finished results are saved; the same command continues from there"):
        # Imports scikit-learn and more, which takes seconds: a wrong name was reported before.
        from eval.launch import launch

        launch(found, options)


def _list(runs: Path) -> None:
    found = list_runs(runs)
    if not found:
        echo(f"no runs in {runs}; train one with: python -m trainer --arch custom_cnn")
        return
    echo(f"{'run':24} {'arch':12} {'state':13} macro AUROC on test")
    for run in found:
        echo(f"{run.name:24} {_arch(run):12} {run.state:13} {_macro_auroc(run)}")


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
    main(prog_name="python -m eval")
