"""Shards that change while they are read: a cut one is named, a changed label never trains or scores."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loaders import LoaderSpec, make_loader
from shards.errors import BadData
from shards.files import sha256_of
from shards.folder import ShardFolder, SplitReader, open_shards

ROOT = Path(__file__).parents[2]
READING = ("dali", "resident", "dataloader", "webdataset")


@pytest.fixture
def copy(phantom_shards: ShardFolder, tmp_path: Path) -> Path:
    return Path(shutil.copytree(phantom_shards.path, tmp_path / "shards"))


@pytest.mark.parametrize("name", READING)
def test_a_shard_that_is_cut_while_it_is_read_is_named(name: str, copy: Path) -> None:
    code = (
        "import os, sys, torch\n"
        "from pathlib import Path\n"
        "from loaders import LoaderSpec, make_loader\n"
        "from shards.errors import BadData\n"
        "from shards.folder import open_shards\n"
        "def main():\n"
        "    shards = open_shards(Path(sys.argv[1]))\n"
        "    spec = LoaderSpec(shards, 'train', 4, torch.device('cpu'), training=True)\n"
        "    with make_loader(sys.argv[2], spec) as loader:\n"
        "        os.truncate(shards.path / 'train-00000.tar', 3000)\n"
        "        try:\n"
        "            list(loader)\n"
        "        except BadData as error:\n"
        "            print(error.message)\n"
        "            sys.exit(3)\n"
        "if __name__ == '__main__':\n"
        "    main()\n"
    )
    script = copy.parent / "reading.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script), str(copy), name],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=240,
    )
    assert done.returncode == 3, done.stderr
    assert "train-00000.tar" in done.stdout


@pytest.mark.parametrize("name", READING)
def test_a_label_that_is_not_that_of_entries_csv_is_named(name: str, copy: Path) -> None:
    tar = copy / "train-00001.tar"
    place, key = first_label(tar.with_suffix(".idx"))
    data = bytearray(tar.read_bytes())
    data[place] ^= 1
    tar.write_bytes(data)
    sign_again(copy, tar)
    spec = LoaderSpec(open_shards(copy), "train", 8, torch.device("cpu"), training=True)
    with make_loader(name, spec) as loader, pytest.raises(BadData) as caught:
        list(loader)
    assert caught.value.message.startswith(f"{tar}, sample {key}: Atelectasis is ")
    assert "in the shard and" in caught.value.message


@pytest.mark.parametrize("name", READING)
def test_an_image_that_is_not_the_packed_one_is_named_before_it_is_decoded(name: str, copy: Path) -> None:
    tar = copy / "train-00001.tar"
    _, place, _, member, *_ = tar.with_suffix(".idx").read_text().splitlines()[1].split()
    data = bytearray(tar.read_bytes())
    data[int(place) + 15] ^= 1  # the density that its header claims, which decides no pixel
    tar.write_bytes(data)
    sign_again(copy, tar)
    spec = LoaderSpec(open_shards(copy), "train", 8, torch.device("cpu"), training=True)
    with make_loader(name, spec) as loader, pytest.raises(BadData) as caught:
        list(loader)
    sample = member.removesuffix(".jpg")
    assert caught.value.message == f"{tar}, sample {sample} does not hold the image that was packed; pack again"


def first_label(idx: Path) -> tuple[int, str]:
    """Return where the first label of a shard's first sample lies, and the sample's key."""
    fields = idx.read_text().splitlines()[1].split()
    at = fields.index("labels")
    return int(fields[at + 1]), fields[at + 3].partition(".")[0]


def sign_again(folder: Path, tar: Path) -> None:
    """Make the manifest's hashes those of a forged shard, so that nothing but its labels can tell."""
    record = json.loads((folder / "manifest.json").read_text())
    del record["sha256"]
    for shard in record["shards"]:
        if shard["name"] == tar.name:
            shard["sha256"] = sha256_of(tar)
    signed = {**record, "sha256": hashlib.sha256(json.dumps(record, indent=1).encode()).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(signed, indent=1) + "\n")


def test_a_shard_that_is_gone_is_named(copy: Path) -> None:
    shards = open_shards(copy)
    (copy / "train-00000.tar").unlink()
    with pytest.raises(BadData, match=r"train-00000\.tar is missing"):
        SplitReader(shards, "train")
