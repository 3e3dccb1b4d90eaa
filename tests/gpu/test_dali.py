"""DALI beside training: on the GPU, and on the CPU with its images copied to the GPU."""

import pytest
import torch

from loaders import LoaderSpec, make_loader
from shards.folder import ShardFolder
from tests.gpu.training import Training, resident

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("default")]
EPOCHS, LEVELS = 3, 2


@pytest.mark.parametrize(("decode_on", "hardware_share"), [("mixed", 0.0), ("mixed", 0.65), ("cpu", 0.0)])
def test_three_epochs_are_those_of_resident_within_two_gray_levels_and_the_same_in_each(
    phantom_shards: ShardFolder,
    device: torch.device,
    decode_on: str,
    hardware_share: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("nvidia.dali", exc_type=ImportError)
    from loaders.decoder import Decoder

    if device.type == "cpu" and decode_on == "mixed":
        pytest.skip("the decoder mixed needs a GPU")
    monkeypatch.setattr("loaders.dali.choose_decoder", lambda *_: Decoder(decode_on, 3, hardware_share))
    training = Training(phantom_shards, device, "fp32" if device.type == "cpu" else "fp16")
    spec = LoaderSpec(phantom_shards, "train", 8, device, training=True, flip="random")
    heights = torch.arange(1, phantom_shards.manifest.size + 1, device=device)[:, None]  # the same for a mirror image
    sums = torch.zeros(EPOCHS, len(phantom_shards.entries), dtype=torch.int64, device=device)
    worst, differ = [], []  # looked at in the end: the host must not wait for the GPU meanwhile
    with make_loader("dali", spec) as dali, resident(phantom_shards, device, 8) as exact:
        for epoch in range(EPOCHS):
            for own, right in zip(dali, exact, strict=True):
                training.take(own)
                differ += [(own.rows != right.rows).any(), (own.labels != right.labels).any()]
                worst.append((own.images.int() - right.images.int()).abs().max())
                sums[epoch, own.rows.long()] = (own.images.long() ** 2 * heights).sum((1, 2, 3))
    assert not torch.stack(differ).any()
    assert int(torch.stack(worst).max()) <= LEVELS
    assert int((sums[0] > 0).sum()) == phantom_shards.manifest.splits["train"].images
    assert torch.equal(sums, sums[:1].expand(EPOCHS, -1))
