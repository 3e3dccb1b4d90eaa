"""The protocol: thresholds from val, scores on the asked split, both from the shards of the run."""

from dataclasses import dataclass
from pathlib import Path

import torch

from eval.metrics import Scores, score
from eval.predict import predict
from eval.predictions import Predictions
from eval.thresholds import pick_thresholds
from shards.errors import BadData
from shards.findings import FINDINGS
from shards.folder import ShardFolder, open_shards
from trainer.model_file import load_model, save_thresholds
from trainer.run_directory import RunDirectory

FITTED_ON = "val"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One run scored on one split."""

    run: RunDirectory
    shards: ShardFolder
    split: str
    predictions: dict[str, Predictions]
    """Of the split and of val."""
    thresholds: dict[str, float]
    """Per finding, from val alone; NaN for a finding that val has no positive of."""
    scores: Scores
    trained_on: str
    """Manifest digest of the shards that the run was trained on."""

    @property
    def folder(self) -> Path:
        """Where its files go: eval/SPLIT, or eval/SPLIT-DIGEST for other shards than the run's own."""
        own = self.shards.digest == self.trained_on
        return self.run.evaluations / (self.split if own else f"{self.split}-{self.shards.digest[:12]}")


def evaluate(
    run: RunDirectory,
    split: str,
    device: torch.device,
    *,
    shards_path: Path | None = None,
    other_shards: bool = False,
    batch_size: int = 64,
) -> Evaluation:
    """Score a run's best weights on a split of the shards it was trained on.

    `shards_path` says where those are if not where they were. The thresholds are put into
    model.safetensors. Raises BadData for a run without finished weights, and for shards with
    another manifest than the run's, unless `other_shards` asks for that.
    """
    config = run.read_config()
    model, metadata = load_model(run.model)
    if metadata["arch"] != config["arch"]:
        raise BadData(f"{run.model} is a {metadata['arch']}, but {run.config} says {config['arch']}")
    shards = open_shards(shards_path or Path(config["shards"]))
    if shards.digest != metadata["manifest_sha256"] and not other_shards:
        raise BadData(
            f"{shards.path} is not what {run.name} was trained on (manifest {shards.digest[:12]}, trained on "
            f"{metadata['manifest_sha256'][:12]}): its val and test may hold patients of that train split. "
            "Give the right --shards, or --other-shards to score on it all the same"
        )
    if shards.manifest.size != metadata["size"]:
        raise BadData(
            f"{shards.path} holds images of {shards.manifest.size} px, {run.name} takes {metadata['size']} px"
        )
    predictions = {
        part: predict(model, shards, part, device, batch_size) for part in dict.fromkeys((FITTED_ON, split))
    }
    val, scored = predictions[FITTED_ON], predictions[split]
    fitted = pick_thresholds(val.labels, val.probabilities)
    thresholds = dict(zip(FINDINGS, fitted.tolist(), strict=True))
    if not other_shards:
        save_thresholds(run.model, thresholds)
    scores = score(scored.labels, scored.probabilities, fitted, FINDINGS)
    return Evaluation(run, shards, split, predictions, thresholds, scores, metadata["manifest_sha256"])
