"""Predict the findings of image files with a run: `python scripts/predict.py RUN IMAGE...`."""

if __name__ == "__main__":
    import shards.startup  # noqa: F401  first: Ctrl-C ends in one line while the rest is imported

import json
from pathlib import Path
from typing import Any

import click
import numpy as np

from eval.options import json_option, runs_option
from shards.console import PATH, Command, echo
from shards.errors import BadData
from shards.files import atomic_write, atomic_write_text
from shards.processes import graceful_exit
from trainer.devices import DEVICE_CHOICES, use_device
from trainer.run_directory import RunDirectory, find_run


@click.command(cls=Command, context_settings={"show_default": True, "auto_envvar_prefix": "CXRAPID"})
@click.argument("run")
@click.argument("images", type=PATH, nargs=-1, required=True, metavar="IMAGE...")
@runs_option()
@click.option(
    "--heatmaps", "folder", type=PATH, metavar="FOLDER", help="Draw a heat map of every positive finding into FOLDER."
)
@click.option("--device", default="auto", metavar=DEVICE_CHOICES, help="Where the model runs.")
@json_option()
def main(
    run: str, images: tuple[Path, ...], runs: Path, folder: Path | None, device: str, json_file: Path | None
) -> None:
    """Predict the findings of each PNG or JPEG file IMAGE with RUN, trained and scored.

    Probabilities are calibrated, and thresholds are on the same scale, as `python -m eval` fitted
    both on val. For research only: not a medical device.
    """
    with graceful_exit("the same command starts anew"):
        found = find_run(run, runs)
        for path in images:
            if not path.exists():
                raise BadData(f"{path} is missing")
        record = _predict(found, images, folder, device)
    if json_file is not None:
        atomic_write_text(json_file, json.dumps(record, indent=1) + "\n")


def _predict(run: RunDirectory, images: tuple[Path, ...], folder: Path | None, device: str) -> dict[str, Any]:
    """Print the decisions on each image, draw its heat maps, and return the decisions as a record."""
    # Importing torch takes seconds: a wrong name was reported before.
    import torch

    from eval.heatmaps.drawing import draw_heat_map
    from eval.heatmaps.gradients import heatmaps
    from eval.operating_point import decide, read_operating_point
    from eval.predict.images import read_image
    from eval.predict.inference import full_precision, probabilities_of
    from trainer.model_file import load_model, read_header

    header = read_header(run.model)
    point = read_operating_point(run, header)
    if point is None:
        raise BadData(f"{run.path} has no decisions yet; score it first with: python -m eval {run.path}")
    pixels = np.stack([read_image(path, header.metadata["size"]) for path in images])[:, None]
    model, _ = load_model(run.model)
    model.to(chosen := use_device(device))
    given = torch.from_numpy(pixels).to(chosen)
    with full_precision():
        # One at a time: any number of images fits.
        raw = torch.cat([probabilities_of(model, one[None], tta=point.tta) for one in given]).cpu().numpy()
    if not np.isfinite(raw).all():
        raise BadData(f"{run.model} gives outputs that are not all numbers; train the run anew")
    decisions = decide(point, raw)
    echo(f"{run.name} decides by {point}")
    record: dict[str, Any] = {"decisions": point.summary()}
    for number, path in enumerate(images):
        echo(f"{path}\n  {'finding':20} probability  threshold")
        rows = zip(
            point.findings, decisions.shown[number], decisions.thresholds, decisions.positive[number], strict=True
        )
        decided = record[str(path)] = {}
        for finding, probability, threshold, positive in rows:
            echo(f"  {finding:20} {probability:11.3f}  {threshold:9.3f}{'  positive' if positive else ''}")
            decided[finding] = {"probability": float(probability), "positive": bool(positive)}
        columns = np.flatnonzero(decisions.positive[number]).tolist()
        if folder is not None and columns:
            maps = heatmaps(model, given[number : number + 1], columns)[0].cpu().numpy()
            for column, heat in zip(columns, maps, strict=True):
                drawn = draw_heat_map(
                    pixels[number, 0],
                    heat,
                    finding=point.findings[column],
                    probability=float(decisions.shown[number, column]),
                    threshold=float(decisions.thresholds[column]),
                    note=path.name,
                )
                finding = point.findings[column].replace("/", "-")
                picture = folder / f"{path.stem}-{finding}.png"
                with atomic_write(picture) as partial:
                    partial.write_bytes(drawn)
                echo(picture)
    return record


if __name__ == "__main__":
    main()
