import hashlib
import io
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.errors import BadData, ResourceMissing
from shards.findings import FINDINGS
from shards.folder import SplitReader, open_shards
from shards.splits import SPLITS


def test_an_opened_folder_tells_its_digest_entries_and_rows(shards: Path) -> None:
    folder = open_shards(shards)
    assert folder.digest == hashlib.sha256((shards / "manifest.json").read_bytes()).hexdigest()
    assert folder.entries.index.tolist() == list(range(18))
    rows = [folder.rows(split) for split in SPLITS]
    assert [len(found) for found in rows] == [8, 4, 6] and rows[0].dtype == np.int32
    assert np.concatenate(rows).tolist() == list(range(18))


@pytest.mark.parametrize("split", SPLITS)
def test_every_sample_of_a_split_is_read_as_entries_csv_describes_it(shards: Path, split: str) -> None:
    folder = open_shards(shards)
    reader = SplitReader(folder, split)
    backwards = np.arange(len(reader))[::-1]
    samples = reader.read(backwards)
    assert np.array_equal(samples.rows, folder.rows(split)[::-1])
    assert np.array_equal(samples.labels, folder.entries.loc[samples.rows, list(FINDINGS)].to_numpy())
    for data in samples.images:
        with Image.open(io.BytesIO(data.tobytes())) as image:
            assert (image.mode, image.size) == ("L", (16, 16))


def test_a_sample_is_named_by_its_shard_and_key(shards: Path) -> None:
    reader = SplitReader(open_shards(shards), "train")
    assert reader.name(5) == f"{shards / 'train-00001.tar'}, sample 00000005"


def test_a_missing_index_is_built_again_byte_for_byte(shards: Path) -> None:
    idx = shards / "train-00001.idx"
    before = idx.read_bytes()
    idx.unlink()
    open_shards(shards)
    assert idx.read_bytes() == before


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 512)


def cut_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def swap(path: Path) -> None:
    path.write_bytes(path.with_name(path.name.replace("00000", "00001")).read_bytes())


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-00000.tar", cut, "the manifest says"),
        ("train-00000.tar", cut_to_nothing, "has 0 bytes, the manifest says"),
        ("train-00000.tar", Path.unlink, "is missing, the manifest says"),
        ("train-00000.idx", swap, "is not the index that was packed"),
        ("train-00000.idx", flip, "is not the index that was packed"),
        ("train-00000.idx", cut_to_nothing, "is not the index that was packed"),
        ("entries.csv", flip, "is missing or not the file that was packed"),
        ("entries.csv", Path.unlink, "is missing or not the file that was packed"),
    ],
)
def test_a_damaged_file_is_named(shards: Path, name: str, damage: Callable[[Path], None], message: str) -> None:
    damage(shards / name)
    with pytest.raises(BadData) as error:
        open_shards(shards).rows("train")
    assert error.value.message.startswith(str(shards / name)) and message in error.value.message


@pytest.mark.parametrize("header", [b"00000000.jpg", b"00000001.labels"], ids=["first", "fifth"])
def test_a_missing_index_is_not_built_from_a_shard_with_a_damaged_header(shards: Path, header: bytes) -> None:
    tar, idx = shards / "train-00000.tar", shards / "train-00000.idx"
    idx.unlink()
    tar.write_bytes(tar.read_bytes().replace(header, b"x" * len(header)))
    with pytest.raises(BadData, match=r"train-00000\.tar is damaged"):
        open_shards(shards)
    assert not idx.exists()


def test_a_shard_that_holds_other_rows_is_noticed_when_it_is_read(shards: Path) -> None:
    tars = [shards / f"train-0000{n}.tar" for n in (0, 1)]
    folder = open_shards(shards)
    tars[0].write_bytes(tars[1].read_bytes())
    (shards / "train-00000.idx").write_bytes((shards / "train-00001.idx").read_bytes())
    with pytest.raises(BadData, match=r"train-00000\.tar, sample 00000002: the shard holds row 6 there"):
        SplitReader(folder, "train").read([2])


def test_an_index_with_fewer_samples_than_the_entries_is_noticed(shards: Path) -> None:
    folder = open_shards(shards)
    idx = shards / "test-00001.idx"
    idx.write_text("v1.2 1\n" + idx.read_text().splitlines()[1] + "\n")
    with pytest.raises(BadData, match=r"the indexes of test hold 5 samples, entries\.csv 6"):
        SplitReader(folder, "test")


def test_a_missing_index_that_is_built_again_is_said(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_shards(shards)
    assert capsys.readouterr() == ("", "")
    idx = shards / "train-00001.idx"
    idx.unlink()
    open_shards(shards)
    assert capsys.readouterr() == ("", f"note: {idx} was missing and is built again\n")


def test_an_index_that_cannot_be_built_again_says_what_to_do(
    shards: Path, no_room: AbstractContextManager[None]
) -> None:
    (shards / "train-00001.idx").unlink()
    with no_room, pytest.raises(ResourceMissing, match=r"train-00001\.idx is missing and cannot be built .* copy"):
        open_shards(shards)
