"""`python scripts/verify_shards.py`, and the quick check of training, as a user runs them."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from scripts.verify_shards import main
from shards.folder import ShardFolder
from trainer.__main__ import main as train

ROOT = Path(__file__).parents[2]
TIMEOUT = 300
TAR = "train-00001.tar"


@pytest.fixture
def folder(phantom_shards: ShardFolder, tmp_path: Path) -> Path:
    """Packed phantoms that a test may damage."""
    return shutil.copytree(phantom_shards.path, tmp_path / "shards")


def verify(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments), "--jobs", "1"])


def start_training(folder: Path) -> Result:
    runs = folder.parent / "runs"
    options = ["--arch", "custom_cnn", "--shards", folder, "--runs", runs, "--name", "x", "--epochs", 1]
    return CliRunner().invoke(train, [str(option) for option in options])


def last_line(result: Result) -> str:
    """The error of a command that left with exit code 3."""
    assert result.exit_code == 3, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    return last


def members(folder: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(folder / TAR, "r:") as archive:
        return archive.getmembers()


def test_a_whole_folder_is_said_to_be_verified(phantom_shards: ShardFolder, tmp_path: Path) -> None:
    result = verify(phantom_shards.path, "--json", tmp_path / "proof.json")
    assert result.exit_code == 0, result.output
    first, second = result.stdout.splitlines()
    shards, splits = len(phantom_shards.manifest.shards), phantom_shards.manifest.splits
    assert first.startswith(f"{phantom_shards.path}: verified. {shards} shards, 96 samples, ")
    patients = {split: record.patients for split, record in splits.items()}
    counted = ", ".join(f"{split} {count}" for split, count in patients.items())
    assert second == f"patients: {counted}; in two splits: 0"
    proof = json.loads((tmp_path / "proof.json").read_text())
    assert (proof["samples"], proof["patients"], proof["faults"]) == (96, patients, [])


def test_a_missing_index_is_built_again_and_said_by_verification_and_by_training(folder: Path) -> None:
    idx = folder / TAR.replace(".tar", ".idx")
    before = idx.read_bytes()
    idx.unlink()
    result = verify(folder)
    assert result.exit_code == 0
    assert f"note: {idx} was missing and is built again" in result.stderr.splitlines()
    assert idx.read_bytes() == before
    idx.unlink()
    (folder / "entries.csv").unlink()  # so that training ends here
    assert f"note: {idx} was missing and is built again" in start_training(folder).stderr.splitlines()
    assert idx.read_bytes() == before


def at_a_member(folder: Path) -> int:
    return members(folder)[6].offset


def in_a_header(folder: Path) -> int:
    return members(folder)[6].offset + 200


def in_the_data(folder: Path) -> int:
    return members(folder)[6].offset_data + 50


def between_image_and_label(folder: Path) -> int:
    return members(folder)[7].offset


def to_nothing(folder: Path) -> int:
    return 0


@pytest.mark.parametrize(
    "place", [at_a_member, in_a_header, in_the_data, between_image_and_label, to_nothing], ids=lambda f: f.__name__
)
def test_a_cut_tar_is_named_by_verification_and_before_the_first_step_of_training(
    folder: Path, place: Callable[[Path], int]
) -> None:
    size = place(folder)
    os.truncate(folder / TAR, size)
    for command in (verify, start_training):
        message = f"Error: {folder / TAR} has {size} bytes, the manifest says "
        assert last_line(command(folder)).startswith(message)
    assert not (folder.parent / "runs").exists()


def swapped_index(folder: Path) -> str:
    one, other = folder / "train-00000.idx", folder / "train-00001.idx"
    texts = one.read_bytes(), other.read_bytes()
    one.write_bytes(texts[1])
    other.write_bytes(texts[0])
    return f"{one} is not the index that was packed"


def foreign_index(folder: Path) -> str:
    idx = folder / "val-00000.idx"
    idx.write_text("v1.2 1\njpg 512 9 0.jpg labels 1536 14 0.labels row 2560 4 0.row\n")
    return f"{idx} is not the index that was packed"


def manifest_of(text: str) -> Callable[[Path], str]:
    def damage(folder: Path) -> str:
        (folder / "manifest.json").write_text(text)
        return f"{folder / 'manifest.json'} is damaged"

    return damage


def lowered_count(folder: Path) -> str:
    path = folder / "manifest.json"
    record = json.loads(path.read_text())
    record["shards"][0]["samples"] -= 1
    path.write_text(json.dumps(record, indent=1) + "\n")
    return f"{path}: the shards of train hold "


def lowered_patients(folder: Path) -> str:
    path = folder / "manifest.json"
    record = json.loads(path.read_text())
    record["splits"]["train"]["patients"] -= 1
    path.write_text(json.dumps(record, indent=1) + "\n")
    return f"{path} is damaged: its text is not the one that its sha256 was made of"


def path_outside(folder: Path) -> str:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"train-00000.tar"', '"../x"'))
    return f"{path} names '../x', which is no shard"


@pytest.mark.parametrize(
    "damage",
    [swapped_index, foreign_index, manifest_of(""), manifest_of("{"), lowered_count, lowered_patients, path_outside],
    ids=["swapped index", "foreign index", "empty", "{", "lowered count", "lowered patients", "../x"],
)
def test_what_is_wrong_is_named_by_verification_and_before_the_first_step_of_training(
    folder: Path, damage: Callable[[Path], str]
) -> None:
    message = damage(folder)
    for command in (verify, start_training):
        assert last_line(command(folder)).startswith(f"Error: {message}")
    assert not (folder.parent / "runs").exists()


def test_a_flipped_label_byte_is_named_with_shard_and_sample(folder: Path, tmp_path: Path) -> None:
    label = next(member for member in members(folder) if member.name.endswith("labels"))
    data = bytearray((folder / TAR).read_bytes())
    data[label.offset_data + 4] ^= 1
    (folder / TAR).write_bytes(data)
    result = verify(folder, "--json", tmp_path / "proof.json")
    sample = f"{folder / TAR}, sample {label.name[:8]}"
    assert last_line(result).startswith(f"Error: {sample}: the label of Mass is ")
    assert last_line(result).endswith("; 1 more fault, listed above")
    found = json.loads((tmp_path / "proof.json").read_text())["faults"]
    assert len(found) == 2 and found[1].startswith(f"{folder / TAR} is not the tar that was packed")
    assert f"also: {found[1]}" in result.stderr.splitlines()


def test_no_shards_is_exit_3_and_a_wrong_option_exit_2(tmp_path: Path) -> None:
    assert "no shards in" in last_line(verify(tmp_path))
    assert CliRunner().invoke(main, [str(tmp_path), "--jobs", "0"]).exit_code == 2


def test_as_a_process_it_verifies_in_parallel_and_ends_with_one_line(folder: Path) -> None:
    (folder / "train-00099.tar").touch()
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "verify_shards.py", folder, "--jobs", "2"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "")
    last = done.stderr.splitlines()[-1]
    said = "is in the folder, but the manifest does not name it; remove it"
    assert last == f"Error: {folder / 'train-00099.tar'} {said}"
