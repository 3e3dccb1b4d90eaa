"""What a run cost: its parameters, its speed and its training time, from its own records."""

from collections.abc import Sequence
from dataclasses import dataclass

from eval.history import read_history
from trainer.model_header import ModelHeader
from trainer.run_directory import RunDirectory


@dataclass(frozen=True)
class Cost:
    """The price of a run, or of several that are used as one; None is a number nobody recorded."""

    parameters: int
    """That an image goes through; of several runs the sum."""
    images_per_second: float | None
    """In training, over all epochs; None of several runs, which may have run on different machines."""
    training_seconds: float | None
    """Of all epochs, without validation; what a killed process did after its last checkpoint is not in it."""
    epochs: int
    device: str | None
    """What it was trained on; None where several runs say different things."""


def cost_of(runs: Sequence[RunDirectory], headers: Sequence[ModelHeader]) -> Cost:
    """Add up one run's cost, or that of several. Raises BadData where a record is damaged."""
    histories = [read_history(run) for run in runs]
    recorded = all(history.epochs for history in histories)
    devices = {history.device for history in histories}
    return Cost(
        parameters=sum(header.parameters for header in headers),
        images_per_second=histories[0].images_per_second if recorded and len(histories) == 1 else None,
        training_seconds=sum(history.seconds for history in histories) if recorded else None,
        epochs=sum(len(history.epochs) for history in histories),
        device=devices.pop() if len(devices) == 1 else None,
    )
