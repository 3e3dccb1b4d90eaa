"""An evaluation made without training: real shards and run files, invented probabilities."""

import dataclasses
import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from eval.evaluation import Evaluation
from eval.operating_point import OperatingPoint
from eval.predict.predictions import Predictions
from eval.scores.bootstrap import all_intervals, bootstrap
from eval.scores.calibration import fit_calibration
from eval.scores.metrics import score
from eval.scores.subgroups import subgroups
from eval.scores.thresholds import pick_thresholds
from shards.findings import FINDINGS
from shards.folder import ShardFolder
from trainer.model_file import ModelHeader
from trainer.run_directory import RunDirectory

PLAIN = {"calibration": None, "calibrated": None, "resampled": None, "intervals": None, "subgroups": None}
"""The parts that an evaluation may lack."""


def predictions(shards: ShardFolder, split: str, absent: Sequence[str] = ()) -> Predictions:
    entries = shards.entries[shards.entries["split"] == split]
    labels = entries[list(FINDINGS)].to_numpy(dtype=np.uint8)
    labels[:, [FINDINGS.index(finding) for finding in absent]] = 0
    noise = np.random.default_rng(len(split)).random(labels.shape)
    return Predictions(
        rows=entries.index.to_numpy(dtype=np.int32),
        labels=labels,
        probabilities=(0.6 * noise + 0.4 * labels).astype(np.float32),
        patients=entries["patient"].to_numpy(dtype=np.int64),
    )


def a_run(folder: Path, *, epochs: int = 3) -> RunDirectory:
    """A run's records as training writes them, without its weights."""
    folder.mkdir(parents=True)
    lines = [
        {"kind": "epoch", "epoch": 0, "step": 0, "lr": 0.1},  # of a sweep
        {"kind": "step", "epoch": 1, "step": 2, "train_loss": 0.5, "lr": 0.001},
    ]
    for epoch in range(1, epochs + 1):
        line = {"kind": "epoch", "epoch": epoch, "step": 4 * epoch, "train_loss": 1 / epoch}
        rates = {"seconds": 10.0 * epoch, "data_wait": 0.1 / epoch, "images_per_second": 80.0}
        lines.append({**line, "val_loss": 1.1 / epoch, "best": epoch < 3, "lr": 0.001, **rates})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.json").write_text(json.dumps({"arch": {"value": "custom_cnn", "from": "default"}}))
    environment = {"command": "python -m trainer --arch custom_cnn --name 'a <b>'", "device": "cpu", "cores": 2}
    (folder / "environment.json").write_text(json.dumps({**environment, "versions": {"torch": "2.15.0"}}))
    return RunDirectory(folder)


def evaluation(
    shards: ShardFolder, *runs: RunDirectory, split: str = "test", absent: Sequence[str] = (), **changes: Any
) -> Evaluation:
    """All that needs no model; no image shows what is `absent`; `changes` replaces fields."""
    parts = {name: predictions(shards, name, absent) for name in dict.fromkeys(("val", split))}
    val, scored = parts["val"], parts[split]
    cuts = pick_thresholds(val.labels, val.probabilities)
    calibration = fit_calibration(val.labels, val.probabilities, "temperature", FINDINGS)
    scores = score(scored.labels, scored.probabilities, cuts, FINDINGS)
    half = np.full(len(FINDINGS), 0.5)
    before = scores.to_frame()[["brier", "ece"]]
    after = score(scored.labels, calibration.apply(scored.probabilities), half, FINDINGS).to_frame()
    arrays = scored.labels, scored.probabilities
    header = ModelHeader({"manifest_sha256": shards.digest}, 3_312_430, "0" * 64)
    resampled = bootstrap(*arrays, cuts, scored.patients, FINDINGS, resamples=40)
    whole = Evaluation(
        name="+".join(run.name for run in runs),
        runs=runs,
        shards=shards,
        headers=(header,) * len(runs),
        scored_on=(shards.digest,) * len(runs),
        split=split,
        predictions=parts,
        operating_point=OperatingPoint(FINDINGS, "f1", cuts, changes.pop("calibration", calibration), tta=False),
        scores=scores,
        at_half=score(*arrays, half, FINDINGS),
        calibrated=before.join(after[["brier", "ece"]].add_prefix("calibrated_")),
        resampled=resampled,
        intervals=all_intervals(resampled, *arrays, scored.patients, calibration.apply(scored.probabilities)),
        subgroups=subgroups(*arrays, shards.entries.loc[scored.rows], FINDINGS, cuts, resamples=40),
        folder=runs[0].path / "eval" / split,
    )
    return dataclasses.replace(whole, **changes)


class Page(HTMLParser):
    """What a reader of an HTML page finds: text, elements, and the cells of its tables."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[tuple[dict[str, str | None], str]]]] = {}
        self.text = ""
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        self._open.append(tag)
        self.text += " "
        if tag == "table":
            self.tables[str(attributes["id"])] = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("th", "td"):
            self._rows[-1].append((attributes, ""))

    def handle_endtag(self, tag: str) -> None:
        self.text += " "
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "script" in self._open or "style" in self._open:
            return
        self.text += data
        if "th" in self._open or "td" in self._open:
            attributes, text = self._rows[-1][-1]
            self._rows[-1][-1] = (attributes, text + data)

    @property
    def _rows(self) -> list[list[tuple[dict[str, str | None], str]]]:
        return list(self.tables.values())[-1]

    def words(self) -> str:
        """The text with a space between elements, and every run of white space as one space."""
        return " ".join(self.text.split())

    def ids(self) -> list[str]:
        return [str(attributes["id"]) for _, attributes in self.elements if "id" in attributes]

    def attributes(self, tag: str, name: str) -> list[str]:
        return [str(each[name]) for found, each in self.elements if found == tag and name in each]
