"""A finished run with the shards it is scored on, verified to match; its predictions, computed once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.operating_point import read_operating_point
from eval.options import PredictOptions
from eval.predict.predictions import Predictions, find_stored, forget_stored
from eval.predict.selection import SCORED, Selection
from eval.result_files import CacheKey, write_csv
from shards.errors import BadData, ResourceMissing
from shards.files import atomic_write_text
from shards.folder import ShardFolder, open_shards
from trainer.devices import use_device
from trainer.model_file import ModelHeader, read_header
from trainer.run_directory import RunDirectory

if TYPE_CHECKING:  # stored predictions are scored without it
    import torch

    from models import Classifier


@dataclass(frozen=True)
class ScoredRun:
    """A run and shards that match it."""

    run: RunDirectory
    shards: ShardFolder
    header: ModelHeader
    options: PredictOptions
    read_only: bool = False
    """Whether nothing of the run may change, except that missing predictions are stored."""
    _predictions: dict[str, tuple[Path, Predictions]] = field(default_factory=dict, compare=False, repr=False)
    """By split, those that this process has read or made, and the CSV that holds them."""

    @property
    def on_training_shards(self) -> bool:
        """Whether these are the shards that the run was trained on."""
        return bool(self.shards.digest == self.header.metadata["manifest_sha256"])

    @cached_property
    def model(self) -> "Classifier":
        """The best weights on the device, in evaluation mode; BadData where they do not fit their arch."""
        from trainer.model_file import load_model

        return load_model(self.run.model)[0].to(self.device)

    @cached_property
    def device(self) -> "torch.device":
        """Where the model runs; imports torch."""
        return use_device(self.options.device)

    def release(self) -> None:
        """Release the model and its memory."""
        self.__dict__.pop("model", None)

    def folder(self, name: str) -> Path:
        """Return where predictions on a selection go: eval/ and `folder_name`."""
        return self.run.evaluations / folder_name(name, [self])

    def predict(self, split: str, path: Path) -> Predictions:
        """Return the predictions on a whole split, and ensure that the CSV `path` holds them.

        Reuses predictions of these weights on this split of these shards; a read-only run gets no copy of them. Else
        the model runs, which imports torch. Errors are those of `eval.predict.inference.predict`, and ResourceMissing
        where torch is not installed.
        """
        key = self.key(split=split, tta=self.options.tta)
        found = self._predictions.get(split)
        if found is None and not self.options.force:
            found = find_stored(self.run.evaluations, key, self.shards, path)
        is_new = found is None
        if found is None:
            found = path, self._run_model(split)
            forget_stored(self.run.evaluations, key)
        stored_at, predictions = found
        # What was found elsewhere is not in `path`, whatever its record says: that was tried first.
        if is_new or (stored_at != path and not self.read_only):
            write_csv(path, predictions.to_csv(self.shards), key)
            stored_at = path
        self._predictions[split] = stored_at, predictions
        return predictions

    def key(self, **options: Any) -> CacheKey:
        """Return the key of a result of these weights and shards that also depends on `options`."""
        return CacheKey(self.header.weights_sha256, self.shards.digest, options)

    def predict_selected(self, selection: Selection) -> Predictions:
        """Return the predictions on a selection, in row order; predicts whole splits for it.

        Those on a whole split are stored in `folder(split)`, those on a list in a predictions.csv of its own.
        """
        if selection.images is None:
            return self.predict(selection.name, self.folder(selection.name) / "predictions.csv")
        rows = selection.rows(self.shards)
        splits = [split for split in SCORED if (self.shards.entries.loc[rows]["split"] == split).any()]
        chosen = [self.predict(split, self.folder(split) / "predictions.csv").select(rows) for split in splits]
        order = np.argsort(np.concatenate([each.rows for each in chosen]), kind="stable")
        arrays = {name: np.concatenate([getattr(each, name) for each in chosen])[order] for name in vars(chosen[0])}
        joined = Predictions(**arrays)
        if not self.read_only:
            atomic_write_text(self.folder(selection.name) / "predictions.csv", joined.to_csv(self.shards))
        return joined

    def _run_model(self, split: str) -> Predictions:
        require_torch("predicting", f"predict {self.run.name} where it is, and its scores need it no more")
        from eval.predict.inference import predict

        options = self.options
        return predict(self.model, self.shards, split, self.device, options.batch_size, tta=options.tta)


def folder_name(name: str, scored_runs: Sequence[ScoredRun]) -> str:
    """Return NAME, with -tta and, where one of them is scored on other shards than its own, -DIGEST."""
    tta = "-tta" if scored_runs[0].options.tta else ""
    foreign = [each.shards.digest[:12] for each in scored_runs if not each.on_training_shards]
    return f"{name}{tta}{f'-{foreign[0]}' if foreign else ''}"


def require_torch(what: str, instead: str) -> None:
    """Raise ResourceMissing where torch is not installed: `what` needs it, `instead` says what to do."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ResourceMissing(f"{what} needs torch, which is not installed here; {instead}") from error


def _some(findings: Sequence[str]) -> str:
    shown = ", ".join(findings[:3])
    return shown if len(findings) <= 3 else f"{shown} and {len(findings) - 3} more"


def open_run(
    run: RunDirectory,
    options: PredictOptions,
    shards_path: Path | None = None,
    *,
    allow_other_shards: bool = False,
    read_only: bool = False,
) -> ScoredRun:
    """Open a run and its shards, or those in `shards_path`, and verify that they match.

    Raises BadData for a run without finished weights, for weights other than the run decides by, and for shards with
    other findings, of another image size or, unless `allow_other_shards`, with another manifest than the run's.
    """
    config = run.read_config()
    header = read_header(run.model)
    arch, size, trained_on = (header.metadata[key] for key in ("arch", "size", "manifest_sha256"))
    if arch != config.get("arch"):
        raise BadData(f"{run.model} is a {arch}, but {run.config} says {config.get('arch')}")
    if shards_path is None and "shards" not in config:
        raise BadData(f"{run.config} does not say where its shards are; give --shards")
    shards = open_shards(shards_path or Path(config["shards"]))
    if shards.digest != trained_on and not allow_other_shards:
        raise BadData(
            f"{shards.path} is not what {run.name} was trained on (manifest {shards.digest[:12]}, trained on "
            f"{trained_on[:12]}): its val and test may hold patients of that train split. "
            "Give the right --shards, or --allow-other-shards to score on it all the same"
        )
    if list(shards.manifest.findings) != header.metadata["findings"]:
        raise BadData(
            f"{shards.path} is labelled with {_some(shards.manifest.findings)}, {run.name} predicts "
            f"{_some(header.metadata['findings'])}"
        )
    if shards.manifest.size != size:
        raise BadData(f"{shards.path} holds images of {shards.manifest.size} px, {run.name} takes {size} px")
    read_operating_point(run, header)
    return ScoredRun(run, shards, header, options, read_only)
