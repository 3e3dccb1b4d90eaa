"""decisions.json: the thresholds, rule, calibration and mirror a run decides by, bound to its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from eval.result_files import json_text
from eval.scores.calibration import Calibration
from eval.scores.thresholds import Floats, apply_thresholds, parse_rule
from shards.documents import convert, read_json
from shards.errors import BadData
from shards.files import atomic_write_text
from trainer.model_file import ModelHeader
from trainer.run_directory import RunDirectory

FITTED_ON = "val"


class _Record(TypedDict, total=False):
    weights_sha256: str
    fitted_on: Literal["val"]
    rule: str
    tta: bool
    thresholds: dict[str, Annotated[float, Meta(ge=0, le=1)] | None]
    calibration: dict[str, Any] | None


@dataclass(frozen=True, eq=False)
class OperatingPoint:
    """Thresholds and calibration fitted on val: how a run decides."""

    findings: tuple[str, ...]
    rule: str
    """Name of the rule that picked the thresholds."""
    thresholds: Floats
    """[F], of raw probabilities; NaN for a finding for which the rule is undefined on val."""
    calibration: Calibration | None
    """For the probabilities shown; None shows raw ones."""
    tta: bool
    """Whether each image is averaged with its mirror image."""

    def to_json(self, weights_sha256: str) -> dict[str, Any]:
        """Return decisions.json for the weights of this digest."""
        return {
            "weights_sha256": weights_sha256,
            "fitted_on": FITTED_ON,
            "rule": self.rule,
            "tta": self.tta,
            "thresholds": self.by_finding(),
            "calibration": None if self.calibration is None else self.calibration.to_json(),
        }

    def by_finding(self) -> dict[str, float | None]:
        """Return the thresholds as JSON values: None for a finding without one."""
        cuts = zip(self.findings, self.thresholds.tolist(), strict=True)
        return {finding: None if np.isnan(cut) else cut for finding, cut in cuts}

    def summary(self) -> dict[str, Any]:
        """Return rule, mirror and calibration as JSON values, by these names."""
        method = None if self.calibration is None else self.calibration.method
        return {"rule": self.rule, "mirror": self.tta, "calibration": method}

    def __str__(self) -> str:
        method = "none" if self.calibration is None else self.calibration.method
        return f"rule {self.rule}, mirror {'on' if self.tta else 'off'}, calibration {method}"


@dataclass(frozen=True, eq=False)
class Decisions:
    """The decisions of a scored run on N images."""

    shown: Floats
    """[N, F], 0..1: the probabilities, calibrated where the run has a calibration."""
    thresholds: Floats
    """[F], on the same scale; NaN for a finding without one."""
    positive: npt.NDArray[np.bool_]
    """[N, F]: raw probability >= raw threshold, as in the evaluation; False without a threshold."""


def decide(point: OperatingPoint, probabilities: npt.NDArray[np.float32]) -> Decisions:
    """Turn raw probabilities [N, F], 0..1, into decisions by the thresholds and calibration fitted on val."""
    thresholds, calibration = point.thresholds, point.calibration
    positive = apply_thresholds(probabilities, thresholds)
    if calibration is None:
        return Decisions(probabilities.astype(np.float64), thresholds, positive)
    known = np.where(np.isnan(thresholds), 0, thresholds)[None]
    on_scale = np.where(np.isnan(thresholds), np.nan, calibration.apply(known)[0])
    return Decisions(calibration.apply(probabilities), on_scale, positive)


def read_operating_point(run: RunDirectory, header: ModelHeader) -> OperatingPoint | None:
    """Return what the run decides by; None before its first plain evaluation.

    Reads decisions.json; for runs older than that file, the header of the weights. Raises BadData where it is damaged
    or was fitted for other weights, ResourceMissing where it cannot be read.
    """
    if run.decisions.exists():
        record = read_json(run.decisions, _Record)
        if record.get("weights_sha256") != header.weights_sha256:
            raise BadData(
                f"{run.decisions} was fitted for other weights than those of {run.model.name}; remove it and "
                f"fit it anew with: python -m eval {run.path}"
            )
        return _parse(record, header, run.decisions)
    if "thresholds" not in header.metadata:
        return None
    return _parse(convert(header.metadata, _Record, run.model), header, run.model)


def write_operating_point(run: RunDirectory, header: ModelHeader, point: OperatingPoint) -> None:
    """Make `point` what the run decides by; the caller holds the run's lock.

    Leaves an identical file as it is. Raises ResourceMissing from the disk.
    """
    text = json_text(point.to_json(header.weights_sha256))
    if not run.decisions.is_file() or run.decisions.read_bytes() != text.encode():
        atomic_write_text(run.decisions, text)


def _parse(record: _Record, header: ModelHeader, path: Path) -> OperatingPoint:
    findings = tuple(header.metadata["findings"])
    thresholds = record.get("thresholds", {})
    if thresholds.keys() != set(findings):
        raise BadData(f"{path} is damaged: thresholds: they are not those of the {len(findings)} findings")
    try:
        rule = parse_rule(record.get("rule", "f1"))
    except ValueError as error:
        raise BadData(f"{path} is damaged: rule: {error}") from error
    plain = record.get("calibration")
    calibration = None if plain is None else Calibration.from_json(plain, str(path))
    if calibration is not None and calibration.findings != findings:
        raise BadData(f"{path} is damaged: calibration: it is not of the {len(findings)} findings, in order")
    cuts = [thresholds[finding] for finding in findings]
    return OperatingPoint(
        findings=findings,
        rule=rule.name,
        thresholds=np.array([np.nan if cut is None else cut for cut in cuts]),
        calibration=calibration,
        tta=record.get("tta", False),
    )
