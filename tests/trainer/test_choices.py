"""The names of options are those of the registries, and are known without importing torch."""

import subprocess
import sys
from typing import get_args

import pytest

from eval.options import CALIBRATIONS
from eval.scores.calibration import METHODS
from loaders import LOADER_CHOICES, Augment, Flip
from models import FREEZES, list_models
from tests.trainer.running import ROOT
from trainer import options as choices
from trainer.optim.losses import LOSSES, POS_WEIGHTS
from trainer.optim.optimizers import OPTIMIZERS, SCHEDULES


@pytest.mark.parametrize(
    ("names", "registry"),
    [
        (choices.ARCHS, list_models()),
        (choices.FREEZES, FREEZES),
        (choices.LOADERS, LOADER_CHOICES),
        (choices.FLIPS, get_args(Flip)),
        (choices.AUGMENTS, get_args(Augment)),
        (choices.OPTIMIZERS, OPTIMIZERS),
        (choices.SCHEDULES, SCHEDULES),
        (choices.LOSSES, LOSSES),
        (choices.POS_WEIGHTS, POS_WEIGHTS),
        (CALIBRATIONS[:-1], METHODS),
    ],
    ids=lambda names: next(iter(names)),
)
def test_an_option_takes_the_names_of_its_registry(names: tuple[str, ...], registry: tuple[str, ...]) -> None:
    assert names == tuple(registry)


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (["-m", "trainer"], ["--shards", "nowhere"], "no shards in nowhere"),
        (["-m", "trainer"], ["--shards", "{shards}", "--weights", "nowhere.pth"], "no weights file"),
        (["-m", "trainer"], ["--lr", "nan"], "--lr"),
        (["-m", "eval"], ["nowhere", "--runs", "{shards}"], "no run 'nowhere'"),
        (["scripts/predict.py"], ["nowhere", "image.png", "--runs", "{shards}"], "no run 'nowhere'"),
        (["scripts/make_shards.py"], ["nowhere"], "nowhere is no folder"),
    ],
)
def test_what_is_wrong_with_a_name_is_told_before_torch_is_imported(
    command: list[str], arguments: list[str], message: str, phantom_shards: object
) -> None:
    path = str(getattr(phantom_shards, "path"))  # noqa: B009
    given = [argument.format(shards=path) for argument in arguments]
    # -X importtime writes a line to stderr for every module that is imported.
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command, *given], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode in (2, 3)
    assert message in done.stderr
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "click" in imported
    assert not imported & {"torch", "torchvision", "sklearn", "scipy", "matplotlib", "nvidia.dali"}
