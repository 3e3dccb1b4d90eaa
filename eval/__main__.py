"""The evaluation's command line: `python -m eval RUN`, or `python -m eval` for the list of runs."""

import json
from pathlib import Path

import click
import torch

from eval.evaluation import evaluate
from eval.report import json_text, metrics_record, write_report
from shards.errors import BadData, ResourceMissing
from shards.publishing import publish_text
from shards.signals import stoppable
from shards.splits import SPLITS
from trainer.devices import DEVICE_CHOICES, choose_device
from trainer.run_directory import RunDirectory, find_run, list_runs


@click.command(
    context_settings={"auto_envvar_prefix": "CXRAPID", "show_default": True, "max_content_width": 110}
)
@click.argument("run", required=False)
@click.option(
    "--runs",
    type=click.Path(path_type=Path),
    default="runs",
    metavar="FOLDER",
    help="Folder that holds the runs.",
)
@click.option(
    "--split",
    type=click.Choice(SPLITS),
    default="test",
    help="Split to score; thresholds always come from val.",
)
@click.option(
    "--shards",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Where the run's shards are now.  [default: where they were]",
)
@click.option("--other-shards", is_flag=True, help="Score on shards the run was not trained on.")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=64,
    metavar="IMAGES",
    help="Images a step; changes speed and memory only.",
)
@click.option("--device", default="auto", metavar=DEVICE_CHOICES, help="auto: the first GPU if there is one.")
@click.option(
    "--json",
    "json_file",
    envvar="CXRAPID_JSON",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the scores there, too.",
)
def main(
    run: str | None,
    runs: Path,
    split: str,
    shards: Path | None,
    other_shards: bool,
    batch_size: int,
    device: str,
    json_file: Path | None,
) -> None:
    """Score RUN, given by name or path: thresholds from val, everything else on the split.

    Writes predictions, thresholds, metrics and curves to RUN/eval/SPLIT/. Without RUN, lists the runs.
    """  # fmt: skip
    if run is None:
        _list(runs)
        return
    found = find_run(run, runs)
    with stoppable("nothing was written; the same command starts anew"):
        try:
            evaluation = evaluate(
                found,
                split,
                choose_device(device),
                shards_path=shards,
                other_shards=other_shards,
                batch_size=batch_size,
            )
        except torch.OutOfMemoryError as error:
            raise ResourceMissing(
                f"the device is out of memory; try --batch-size {max(batch_size // 2, 1)}"
            ) from error
    folder = write_report(evaluation)
    if json_file is not None:
        publish_text(json_file, json_text(metrics_record(evaluation)))
    scored = evaluation.shards.manifest.splits[split]
    click.echo(
        f"{found.name} on {split}: {scored.images} images of {scored.patients} patients, thresholds from val"
    )
    click.echo(evaluation.scores.to_text())
    for name in sorted(path.name for path in folder.iterdir()):
        click.echo(folder / name)


def _list(runs: Path) -> None:
    found = list_runs(runs)
    if not found:
        click.echo(f"no runs in {runs}; train one with: python -m trainer --arch custom_cnn")
        return
    click.echo(f"{'run':24} {'arch':12} {'state':10} macro AUROC on test")
    for run in found:
        state = "finished" if run.model.is_file() else "unfinished"
        click.echo(f"{run.name:24} {run.read_config()['arch']:12} {state:10} {_macro_auroc(run)}")


def _macro_auroc(run: RunDirectory) -> str:
    metrics = run.evaluations / "test" / "metrics.json"
    if not metrics.is_file():
        return f"not scored; python -m eval {run.name}" if run.model.is_file() else "-"
    try:
        auroc = json.loads(metrics.read_text(encoding="utf-8"))["macro"]["auroc"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadData(f"{metrics} is damaged; score the run again with: python -m eval {run.name}") from error
    return "-" if auroc is None else f"{auroc:.3f}"


if __name__ == "__main__":
    main(prog_name="python -m eval")
