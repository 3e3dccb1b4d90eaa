import hashlib
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
        (lambda m: m["findings"].reverse(), "the split train counts other findings"),
        (lambda m: m["findings"].pop(), "the split train counts other findings"),
        (lambda m: m["findings"].clear(), "0 findings, where 1 to 500 are possible"),
        (lambda m: m["findings"].append("Mass"), "the finding 'Mass' is named twice"),
        (lambda m: m["findings"].append("=1+1"), "'=1+1' is no name of a finding"),
        (lambda m: m["findings"].append("\x1b[2J"), "is no name of a finding"),
        (lambda m: m["findings"].append("patient"), "another column of entries.csv has it"),
        (lambda m: m["findings"].extend(map(str, range(500))), "is damaged: findings"),
        (lambda m: m["shards"][0].update(name="../x.tar"), "names '../x.tar', which is no shard"),
        (lambda m: m["shards"][0].update(name="/etc/train-00000.tar"), "which is no shard"),
        (lambda m: m["shards"][0].update(name="train-00000.tar\n"), "which is no shard"),
        (lambda m: m["shards"][0].update(name=5), "is damaged: shards[0].name: Expected `str`, got `int`"),
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


def signed(record: dict[str, Any]) -> str:
    del record["sha256"]
    sha256 = hashlib.sha256(json.dumps(record, indent=1).encode()).hexdigest()
    return (json.dumps({**record, "sha256": sha256}, indent=1) + "\n").replace("Infinity", "1e999")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["recipe"].update(size=1e999), "out of range"),
        (lambda m: m["recipe"].update(size="64"), "recipe is damaged: size: Expected `int`, got `str`"),
        (lambda m: m["recipe"].update(size=15), "recipe is damaged: size: Expected `int` >= 16"),
        (lambda m: m["recipe"].update(size=10**9), "recipe is damaged: size: Expected `int` <= 1024"),
        (lambda m: m["recipe"].update(split=7), "recipe is damaged: split: Expected `str`, got `int`"),
        (lambda m: m["recipe"].update(seed={"a": {}}), "recipe[...]: Expected "),
        (lambda m: m.update(recipe=[]), "recipe: Expected `object`, got `array`"),
        (lambda m: m.update(mean=float("nan")), "malformed"),
        (lambda m: m.update(mean="127"), "mean: Expected `float`, got `str`"),
        (lambda m: m.update(rejects=-1), "rejects: Expected `int` >= 0"),
        (lambda m: m.update(entries_sha256="0"), "entries_sha256: Expected `str` matching regex"),
        (lambda m: m.update(source_sha256=5), "source_sha256: Expected `str`, got `int`"),
        (lambda m: m["shards"][0].update(idx_sha256="x" * 64), "shards[0].idx_sha256: Expected `str`"),
        (lambda m: m["shards"][0].update(bytes=-1), "shards[0].bytes: Expected `int` >= 1"),
        (lambda m: m["shards"].append(m["shards"][0]), "it names a shard twice"),
        (lambda m: m["splits"]["val"].update(images=10**30), "images"),
        (lambda m: m["splits"]["val"]["positives"].update(Mass="1"), "positives[...]: Expected `int`"),
        (lambda m: m["splits"].update(other=m["splits"]["val"]), "its splits are not train, val, test"),
        (lambda m: m.update(findings=["x" * 100_000]), "is no name of a finding"),
        (lambda m: m.update(findings=[1]), "findings[0]: Expected `str`, got `int`"),
        (lambda m: m.update(format="1"), "format: Expected `int`, got `str`"),
    ],
)
def test_a_manifest_that_was_changed_and_signed_again_is_refused_with_its_field(
    shards: Path, change: Change, message: str
) -> None:
    path = shards / "manifest.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(signed(record))
    with pytest.raises(BadData) as refused:
        read_manifest(shards)
    assert refused.value.message.startswith(str(path)) and message in refused.value.message
    assert len(refused.value.message) < 1000


@pytest.mark.parametrize(
    "text", ["[" * 1_000_000, '{"format": ' + '{"a":' * 1_000_000, " " * (8 * 2**20 + 1)], ids=range(3)
)
def test_a_manifest_that_is_nested_too_deeply_or_too_large_is_refused(shards: Path, text: str) -> None:
    (shards / "manifest.json").write_text(text)
    with pytest.raises(BadData, match=r"manifest\.json (is damaged|has more than)"):
        read_manifest(shards)
