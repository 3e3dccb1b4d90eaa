import os
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models import ResNet50_Weights

import models
from models import Classifier

State = dict[str, Tensor]


def plain(model: Classifier) -> State:
    """The network's state in torchvision's names, each tensor a contiguous copy."""
    return {
        name.removeprefix("network."): tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }


def head_of(model: Classifier) -> State:
    return {name: tensor for name, tensor in plain(model).items() if name.startswith(model.arch_spec.head)}


def assert_same(got: State, wanted: State, *, but: str = "-") -> None:
    assert got.keys() == wanted.keys()
    different = [name for name in got if not torch.equal(got[name], wanted[name])]
    assert [name for name in different if not name.startswith(but)] == []


@pytest.fixture(scope="module")
def published() -> State:
    """A made-up file of torchvision's ResNet-50: its names, its shapes, its 1,000 classes."""
    state: State = torchvision.models.resnet50().state_dict()
    return state


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch.hub, and a network that refuses at once, wherever this runs."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "hub" / "checkpoints"


def test_imagenet_weights_exist_for_the_two_torchvision_archs() -> None:
    assert [arch for arch in models.ARCHS if models.has_imagenet_weights(arch)] == ["resnet50", "vit_b_16"]


def test_none_loads_nothing(custom_cnn: Classifier) -> None:
    before = plain(custom_cnn)
    assert models.load_weights(custom_cnn, "none") == "no weights loaded, all newly initialised"
    assert_same(plain(custom_cnn), before)


def test_a_torchvision_file_fills_everything_but_the_head(
    resnet50: Classifier, published: State, tmp_path: Path
) -> None:
    file = tmp_path / "resnet50.pth"
    torch.save(published, file)
    head = head_of(resnet50)
    assert models.load_weights(resnet50, file) == f"weights of {file}, head newly initialised"
    assert_same(plain(resnet50), published | head)


def test_imagenet_comes_from_the_cache_of_torch_hub(resnet50: Classifier, published: State, hub: Path) -> None:
    hub.mkdir(parents=True)
    torch.save(published, hub / Path(ResNet50_Weights.IMAGENET1K_V2.url).name)
    assert models.load_weights(resnet50, "imagenet") == "ImageNet weights, head newly initialised"
    assert_same(plain(resnet50), published | {n: t for n, t in plain(resnet50).items() if n.startswith("fc.")})


@pytest.mark.parametrize("damaged", [False, True])
def test_without_network_or_cache_the_error_names_the_url_and_the_way_out(
    resnet50: Classifier, hub: Path, damaged: bool
) -> None:
    url = ResNet50_Weights.IMAGENET1K_V2.url
    if damaged:
        hub.mkdir(parents=True)
        (hub / Path(url).name).write_bytes(b"half a file")
    with pytest.raises(models.WeightsUnavailable) as caught:
        models.load_weights(resnet50, "imagenet")
    message = str(caught.value)
    assert url in message
    assert "--weights FILE" in message
    assert str(hub / Path(url).name) in message
    assert "\n" not in message


def test_the_custom_cnn_has_no_imagenet_weights(custom_cnn: Classifier) -> None:
    with pytest.raises(ValueError, match="custom_cnn has no ImageNet weights"):
        models.load_weights(custom_cnn, "imagenet")


@pytest.mark.parametrize("prefix", ["", "network."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_of_our_own_is_loaded_whole(custom_cnn: Classifier, tmp_path: Path, prefix: str, suffix: str) -> None:
    file = tmp_path / f"model{suffix}"
    wanted = plain(custom_cnn)
    named = {prefix + name: tensor for name, tensor in wanted.items()}
    save_file(named, file) if suffix == ".safetensors" else torch.save(named, file)
    other = models.create_model("custom_cnn", size=64)
    assert models.load_weights(other, str(file)) == f"weights of {file}, head included"
    assert_same(plain(other), wanted)


def test_a_vit_file_of_older_names_and_another_size_is_brought_to_the_models(
    vit_b_16: Classifier, tmp_path: Path
) -> None:
    wanted = plain(vit_b_16)
    old = {
        name.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): tensor
        for name, tensor in wanted.items()
    }
    old |= {"heads.head.weight": torch.zeros(1000, 768), "heads.head.bias": torch.zeros(1000)}
    old["encoder.pos_embedding"] = torch.full((1, 14 * 14 + 1, 768), 0.25)
    file = tmp_path / "vit.pth"
    torch.save(old, file)
    assert models.load_weights(vit_b_16, file).endswith("head newly initialised")
    loaded = plain(vit_b_16)
    torch.testing.assert_close(loaded["encoder.pos_embedding"], torch.full((1, 5, 768), 0.25))
    assert_same(loaded, wanted, but="encoder.pos_embedding")


def test_counters_of_batch_norm_may_be_missing(custom_cnn: Classifier, tmp_path: Path) -> None:
    old = {name: t for name, t in plain(custom_cnn).items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pt")
    assert models.load_weights(custom_cnn, tmp_path / "old.pt")


def test_a_file_of_another_arch_is_refused_by_its_first_differences(
    resnet50: Classifier, custom_cnn: Classifier, tmp_path: Path
) -> None:
    file = tmp_path / "cnn.safetensors"
    save_file(plain(custom_cnn), file)
    before = plain(resnet50)
    with pytest.raises(ValueError, match=r"cnn\.safetensors do not fit resnet50") as caught:
        models.load_weights(resnet50, file)
    assert "267 missing, first conv1.weight" in str(caught.value)
    assert "22 unexpected, first head.hidden.bias" in str(caught.value)
    assert_same(plain(resnet50), before)


@pytest.mark.parametrize("findings", [13, 1000])
def test_a_head_of_another_number_of_findings_is_refused(custom_cnn: Classifier, tmp_path: Path, findings: int) -> None:
    file = tmp_path / "other.pt"
    torch.save(plain(models.create_model("custom_cnn", findings=findings)), file)
    with pytest.raises(ValueError, match=rf"head.output.weight is \[{findings}, 512\] instead of \[14, 512\]"):
        models.load_weights(custom_cnn, file)


def test_a_missing_file_is_named(custom_cnn: Classifier, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        models.load_weights(custom_cnn, tmp_path / "nowhere.pt")


@pytest.mark.parametrize("name", ["bad.pt", "bad.pth", "bad.safetensors", "bad.bin"])
def test_a_file_that_holds_no_weights_is_named(custom_cnn: Classifier, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not weights at all")
    with pytest.raises(ValueError, match=name):
        models.load_weights(custom_cnn, tmp_path / name)


def test_a_checkpoint_that_is_no_state_dict_is_refused(custom_cnn: Classifier, tmp_path: Path) -> None:
    torch.save({"model": plain(custom_cnn), "epoch": 3}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"last\.pt: not a state dict"):
        models.load_weights(custom_cnn, tmp_path / "last.pt")


class Trap:
    """Unpickling this makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_nothing_in_a_file_is_executed(custom_cnn: Classifier, tmp_path: Path) -> None:
    torch.save({"stage1.conv.weight": Trap(tmp_path / "sprung")}, tmp_path / "trap.pt")
    with pytest.raises(ValueError, match=r"trap\.pt: not readable as weights"):
        models.load_weights(custom_cnn, tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()
