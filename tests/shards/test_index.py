import io
import tarfile
from pathlib import Path

import pytest
from wds2idx import IndexCreator

from shards.errors import BadData
from shards.index import index_tar, read_index

MEMBERS = ("jpg", "labels", "row")


def write_tar(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_the_index_is_byte_for_byte_what_dali_s_own_tool_writes(shards: Path, tmp_path: Path) -> None:
    tars = sorted(shards.glob("*.tar"))
    assert len(tars) == 5
    for tar in tars:
        with IndexCreator(str(tar), str(tmp_path / "dali.idx"), verbose=False) as creator:
            creator.create_index()
        expected = (tmp_path / "dali.idx").read_text()
        assert index_tar(tar) == expected == tar.with_suffix(".idx").read_text()


def test_the_places_are_those_of_the_members_bytes(tmp_path: Path) -> None:
    contents = [(f"{row:08d}.{suffix}", f"{row} {suffix}".encode() * 300) for row in range(2) for suffix in MEMBERS]
    tar = write_tar(tmp_path / "a.tar", *contents)
    (tmp_path / "a.idx").write_text(index_tar(tar))
    places = read_index(tmp_path / "a.idx", MEMBERS)
    assert places.shape == (2, 3, 2)
    data = tar.read_bytes()
    assert [data[offset : offset + size] for offset, size in places.reshape(-1, 2)] == [data for _, data in contents]


def test_the_last_place_is_that_before_the_end_of_the_archive(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", ("0.row", bytes(4)))
    (tmp_path / "a.idx").write_text(GOOD.replace("2560", "9212"))
    assert read_index(tmp_path / "a.idx", MEMBERS)[0, 2].tolist() == [9212, 4]


def test_a_shard_without_samples_has_an_index_without_samples(tmp_path: Path) -> None:
    (tmp_path / "a.idx").write_text(index_tar(write_tar(tmp_path / "a.tar")))
    assert read_index(tmp_path / "a.idx", MEMBERS).shape == (0, 3, 2)


GOOD = "v1.2 1\njpg 512 9 0.jpg labels 1536 14 0.labels row 2560 4 0.row\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a v1.2 index of 0 samples"),
        ("{", "is not a v1.2 index"),
        (GOOD.replace("v1.2", "v1.1"), "is not a v1.2 index of 1 samples"),
        (GOOD.replace("v1.2 1", "v1.2 2"), "is not a v1.2 index of 1 samples"),
        (GOOD.replace("jpg", "png"), "line 2: expected the offset and size of jpg, labels, row"),
        (GOOD.replace(" row 2560 4 0.row", ""), "line 2: expected"),
        (GOOD.replace("512", "here"), "line 2: expected"),
        (GOOD.replace("512", "-512"), "line 2: expected"),
        (GOOD.replace("512", "9" * 20), "line 2: expected"),
        (GOOD.replace("512", "²"), "line 2: expected"),
        (GOOD.replace("512", "9" * 18), "line 2: a member does not lie within a.tar"),
        (GOOD.replace("512 9 ", f"512 {'9' * 18} "), "line 2: a member does not lie within a.tar"),
        (GOOD.replace("2560", "9213"), "line 2: a member does not lie within a.tar"),
        (GOOD.replace("0.row", "0" * 20_000), "has more than"),
    ],
)
def test_anything_else_is_refused_with_the_line(tmp_path: Path, text: str, message: str) -> None:
    write_tar(tmp_path / "a.tar", ("0.jpg", b"9 bytes.."), ("0.labels", bytes(14)), ("0.row", bytes(4)))
    (tmp_path / "a.idx").write_text(text, encoding="utf-8")
    with pytest.raises(BadData) as error:
        read_index(tmp_path / "a.idx", MEMBERS)
    assert error.value.message.startswith(str(tmp_path / "a.idx")) and message in error.value.message
