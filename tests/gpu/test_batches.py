"""Batches from a GPU's memory, made on a stream of their own while steps run, are those of the CPU."""

import pytest
import torch

from shards.folder import ShardFolder
from tests.gpu.training import Training, fingerprint, resident

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("default")]
EPOCHS = 3


def test_three_resident_epochs_beside_running_steps_are_those_of_the_cpu_to_the_bit(
    phantom_shards: ShardFolder, device: torch.device
) -> None:
    training = Training(phantom_shards, device, "fp32" if device.type == "cpu" else "fp16")
    before, after, expected = [], [], []
    with resident(phantom_shards, device, 8) as loader:
        for _ in range(EPOCHS):
            for batch in loader:
                before.append(fingerprint(batch))
                training.take(batch)
                after.append(fingerprint(batch))  # nothing writes to a batch that a step reads
    with resident(phantom_shards, torch.device("cpu"), 8) as loader:
        expected = [fingerprint(batch) for _ in range(EPOCHS) for batch in loader]
    for one, other, right in zip(before, after, expected, strict=True):
        assert torch.equal(one.cpu(), right)
        assert torch.equal(other.cpu(), right)
