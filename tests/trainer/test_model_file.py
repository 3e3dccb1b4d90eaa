"""model.safetensors and what is refused of it."""

import contextlib
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import create_model, parameter_counts
from shards.errors import BadData
from shards.files import hash_file, sha256_of
from shards.findings import FINDINGS
from trainer.model_file import load_model, read_header, save_model

ROOT = Path(__file__).parents[2]
METADATA = {"arch": "custom_cnn", "size": 64, "findings": list(FINDINGS), "manifest_sha256": "0"}


def test_a_saved_model_gives_the_same_logits(tmp_path: Path) -> None:
    model = create_model("custom_cnn", size=64).eval()
    save_model(tmp_path / "model.safetensors", model.state_dict(), METADATA)
    loaded, metadata = load_model(tmp_path / "model.safetensors")
    images = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)
    assert metadata == METADATA
    assert not loaded.training
    assert torch.equal(model(images), loaded(images))


def test_equal_weights_give_equal_files(tmp_path: Path) -> None:
    state = create_model("custom_cnn", size=64).state_dict()
    for name in ("one", "other"):
        save_model(tmp_path / name, state, METADATA)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_other_weights_have_another_digest(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    state = create_model("custom_cnn", size=64).state_dict()
    save_model(path, state, METADATA)
    before = read_header(path).weights_sha256
    next(iter(state.values())).mul_(1.001)
    save_model(path, state, METADATA)
    assert read_header(path).weights_sha256 != before


@pytest.mark.parametrize("arch", ["custom_cnn", "resnet50"])
def test_the_header_counts_the_parameters_as_the_model_does(tmp_path: Path, arch: str) -> None:
    path = tmp_path / "model.safetensors"
    model = create_model(arch, size=64)
    save_model(path, model.state_dict(), METADATA)
    assert read_header(path).parameters == parameter_counts(model)[1]


@pytest.mark.parametrize("content", [b"", b"{", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadData, match=r"model\.safetensors is (damaged|no model of this trainer)"):
        load_model(path)


def test_other_findings_and_other_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    state = create_model("custom_cnn", size=64).state_dict()
    save_model(path, state, {**METADATA, "findings": [*FINDINGS[:-1], "Mass"]})
    with pytest.raises(BadData, match="the finding 'Mass' is named twice"):
        load_model(path)
    save_model(path, state, {**METADATA, "findings": FINDINGS[:-1]})
    with pytest.raises(BadData, match=r"output\.bias is not that of the arch"):
        load_model(path)
    save_model(path, state, {**METADATA, "arch": "resnet50"})
    with pytest.raises(BadData, match="cannot be loaded"):
        load_model(path)


def test_a_kill_at_any_moment_of_writing_leaves_a_model_that_its_hash_fits(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    code = (
        "import sys\n"
        "from itertools import count\n"
        "from pathlib import Path\n"
        "from models import create_model\n"
        "from tests.trainer.test_model_file import METADATA\n"
        "from trainer.model_file import save_model\n"
        "state = create_model('custom_cnn', size=64).state_dict()\n"
        "for epoch in count():\n"
        "    save_model(Path(sys.argv[1]), state, {**METADATA, 'epoch': epoch})\n"
        "    print(flush=True)\n"
    )
    lot = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(2):
            process.stdout.readline()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(lot.uniform(0, 0.1))
        process.kill()
        process.communicate()
        assert read_header(path).metadata["arch"] == "custom_cnn"


def test_other_bytes_than_those_of_the_hash_are_refused_and_old_models_have_none(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, create_model("custom_cnn", size=64).state_dict(), METADATA)
    assert hash_file(path).read_text() == f"{sha256_of(path)}\n"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadData, match=r"its SHA-256 is not in model\.safetensors\.sha256"):
        load_model(path)
    hash_file(path).unlink()
    assert load_model(path)[1] == METADATA
