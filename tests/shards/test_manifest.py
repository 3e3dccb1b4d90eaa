import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shards.errors import BadData
from shards.findings import FINDINGS
from shards.manifest import read_manifest

Change = Callable[[dict[str, Any]], object]


def test_a_manifest_survives_the_way_through_its_file(shards: Path) -> None:
    manifest = read_manifest(shards)
    assert manifest.to_json() == (shards / "manifest.json").read_text()
    assert manifest.patients_in_two_splits == 0
    assert (manifest.size, manifest.extension) == (16, "jpg")
    assert [shard.name for shard in manifest.shards_of("train")] == ["train-00000.tar", "train-00001.tar"]
    assert json.loads(manifest.to_json())["findings"] == list(FINDINGS)


def test_a_folder_without_shards_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"no shards in .*make_shards\.py.*make_phantoms\.py"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"null", b"5", b"\xff"], ids=repr)
def test_a_file_that_is_no_manifest_is_named(shards: Path, content: bytes) -> None:
    (shards / "manifest.json").write_bytes(content)
    with pytest.raises(BadData, match=r"manifest\.json is damaged"):
        read_manifest(shards)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=2), "has another format than 1"),
        (lambda m: m["findings"].reverse(), "has other findings, or another order: Hernia, "),
        (lambda m: m["findings"].pop(), "has other findings"),
        (lambda m: m["shards"][0].update(name="../x.tar"), "names '../x.tar', which is no shard"),
        (lambda m: m["shards"][0].update(name="/etc/train-00000.tar"), "which is no shard"),
        (lambda m: m["shards"][0].update(name="train-00000.tar\n"), "which is no shard"),
        (lambda m: m["shards"][0].update(name=5), "names 5, which is no shard"),
        (lambda m: m["shards"][0].update(samples=3), "the shards of train hold 7 samples, the split 8"),
        (lambda m: m["shards"].pop(), "the shards of test hold 4 samples, the split 6"),
        (lambda m: m["splits"]["val"].update(images=1), "the shards of val hold 4 samples, the split 1"),
        (lambda m: m["shards"][0].update(samples="4"), "is damaged"),
        (lambda m: m["shards"][0].update(bytes=None), "is damaged"),
        (lambda m: m["shards"][0].update(colour="red"), "is damaged"),
        (lambda m: m["splits"].pop("val"), "is damaged"),
        (lambda m: m["recipe"].pop("size"), "is damaged"),
        (lambda m: m["recipe"].update(encoding="bmp"), "is damaged"),
        (lambda m: m.pop("mean"), "is damaged"),
        (lambda m: m.update(shards=5), "is damaged"),
    ],
)
def test_a_changed_manifest_is_refused_with_what_is_wrong(shards: Path, change: Change, message: str) -> None:
    path = shards / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(BadData) as error:
        read_manifest(shards)
    assert error.value.message.startswith(str(path)) and message in error.value.message
