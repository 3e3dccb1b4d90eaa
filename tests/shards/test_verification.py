import hashlib
import io
import json
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shards.errors import BadData
from shards.files import sha256_of
from shards.folder import open_shards
from shards.index import index_tar
from shards.manifest import read_manifest
from shards.packing import pack
from shards.packing.planning import SplitRecipe, make_plan
from shards.pixels import PixelRecipe
from shards.verification import verify_shards

Members = list[tuple[tarfile.TarInfo, bytes]]


def faults(folder: Path) -> list[str]:
    return list(verify_shards(folder).faults)


def rewrite(tar: Path, change: Callable[[Members], object]) -> None:
    """Rewrite a tar with changed members, and forge index and manifest so that every hash fits it."""
    with tarfile.open(tar, "r:") as archive:
        members = [(member, archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]
    change(members)
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as archive:
        for member, data in members:
            member.size = len(data) if member.isreg() else 0
            archive.addfile(member, io.BytesIO(data))
    tar.with_suffix(".idx").write_text(index_tar(tar))
    forge(tar.parent)


def forge(folder: Path, change: Callable[[dict[str, Any]], object] = lambda record: None) -> None:
    """Make manifest.json fit the files as they are now, and its own hash fit it."""
    record = json.loads((folder / "manifest.json").read_text())
    del record["sha256"]
    for shard in record["shards"]:
        tar = folder / shard["name"]
        shard |= {"bytes": tar.stat().st_size, "sha256": sha256_of(tar)}
        shard["idx_sha256"] = sha256_of(tar.with_suffix(".idx"))
    for name in ("entries", "rejects"):
        record[f"{name}_sha256"] = sha256_of(folder / f"{name}.csv")
    change(record)
    sha256 = hashlib.sha256(json.dumps(record, indent=1).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**record, "sha256": sha256}, indent=1) + "\n")
    read_manifest(folder)


def content(members: Members, name: str, change: Callable[[bytes], bytes]) -> None:
    (place,) = (n for n, (member, _) in enumerate(members) if member.name == name)
    members[place] = (members[place][0], change(members[place][1]))


def encoded(pixels: Image.Image, form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    pixels.save(buffer, form)
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.mode = kind, 0o444
    for field, value in fields.items():
        setattr(found, field, value)
    return found


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_packed_folder_is_verified_with_its_counts(packed: Path, jobs: int) -> None:
    proof = verify_shards(packed, jobs=jobs)
    assert (proof.faults, proof.warnings) == ((), ())
    manifest = read_manifest(packed)
    assert (proof.shards, proof.samples) == (5, 18)
    assert proof.patients == {split: record.patients for split, record in manifest.splits.items()}
    assert proof.bytes == sum(tar.stat().st_size for tar in packed.glob("*.tar"))


def test_verification_writes_nothing(packed: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in packed.iterdir()}
    verify_shards(packed)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in packed.iterdir()} == before


def test_a_missing_index_is_built_again_and_said(shards: Path) -> None:
    idx = shards / "val-00000.idx"
    before = idx.read_bytes()
    idx.unlink()
    proof = verify_shards(shards)
    assert proof.faults == () and proof.warnings == (f"{idx} was missing and is built again",)
    assert idx.read_bytes() == before


def test_a_missing_index_is_not_built_from_a_damaged_shard(shards: Path) -> None:
    (shards / "val-00000.idx").unlink()
    tar = shards / "val-00000.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"\1")
    assert faults(shards)[-1] == f"{shards / 'val-00000.idx'} is missing"


# Damage that leaves no hash as it was, and damage by somebody who knows how to forge every hash.


def flip_label(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


CONTENTS: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "a flipped label": ("labels", flip_label, "the label of Atelectasis is "),
    "a label of 2": ("labels", lambda data: data[:13] + b"\2", "the label of Hernia is 2, entries.csv says 0"),
    "a short label": ("labels", lambda data: data[:13], ".labels has 13 bytes, not 14"),
    "a foreign row": ("row", lambda data: struct.pack("<i", 7), ".row holds 07 00 00 00, not 1 as int32"),
    "a long row": ("row", lambda data: data + b"\0", ".row holds 01 00 00 00 00, not 1 as int32"),
    "a cut image": ("jpg", lambda data: data[: len(data) // 2], "the image does not decode: "),
    "no image": ("jpg", lambda data: b"", "the image does not decode: cannot identify image file"),
    "a pickle for an image": ("jpg", lambda data: b"\x80\x04N.", "the image does not decode"),
    "a colour image": (
        "jpg",
        lambda data: encoded(Image.new("RGB", (16, 16))),
        "the image is RGB 16x16, not gray 16x16",
    ),
    "a small image": ("jpg", lambda data: encoded(Image.new("L", (16, 8))), "the image is L 16x8, not gray 16x16"),
    "a PNG named jpg": ("jpg", lambda data: encoded(Image.new("L", (16, 16)), "PNG"), "the image does not decode"),
    "a bomb": (
        "jpg",
        lambda data: data.replace(b"\x08\x00\x10\x00\x10", b"\x08\xff\xff\xff\xff"),
        "the image does not decode: Image size (4294836225 pixels) exceeds limit",
    ),
}


@pytest.mark.parametrize(("suffix", "change", "cause"), CONTENTS.values(), ids=CONTENTS)
def test_a_sample_that_is_not_as_packed_is_named_even_where_every_hash_fits(
    shards: Path, suffix: str, change: Callable[[bytes], bytes], cause: str
) -> None:
    tar = shards / "train-00000.tar"
    rewrite(tar, lambda members: content(members, f"00000001.{suffix}", change))
    (found,) = faults(shards)
    assert found.startswith(f"{tar}, sample 00000001: {cause}"), found


PLACE = 4  # of the labels of the second sample
MEMBERS: dict[str, tuple[Callable[[Members], object], str]] = {
    "an upward path": (
        lambda members: members.insert(3, (member("../x.jpg"), b"")),
        "sample 00000001: the shard holds '../x.jpg' where 00000001.jpg belongs",
    ),
    "an absolute path": (
        lambda members: members.insert(3, (member("/etc/x.jpg"), b"")),
        "sample 00000001: the shard holds '/etc/x.jpg' where",
    ),
    "a pickle": (
        lambda members: members.insert(3, (member("00000000.pkl"), b"")),
        "sample 00000001: the shard holds '00000000.pkl' where",
    ),
    "a pickle at the end": (
        lambda members: members.append((member("00000003.pkl"), b"N.")),
        "behind its 4 samples it holds '00000003.pkl'",
    ),
    "one sample more": (
        lambda members: members.extend((member(f"00000004.{end}"), b"") for end in ("jpg", "labels", "row")),
        "behind its 4 samples it holds '00000004.jpg'",
    ),
    "a symbolic link": (
        lambda members: members.__setitem__(
            PLACE, (member("00000001.labels", tarfile.SYMTYPE, linkname="/etc/passwd"), b"")
        ),
        "sample 00000001: 00000001.labels is no plain USTAR file as packing writes it, but of type b'2'",
    ),
    "a hard link": (
        lambda members: members.__setitem__(
            PLACE, (member("00000001.labels", tarfile.LNKTYPE, linkname="00000000.labels"), b"")
        ),
        "type b'1', time 0, owner 0:0, mode 444, link '00000000.labels'",
    ),
    "a device": (
        lambda members: members.__setitem__(PLACE, (member("00000001.labels", tarfile.CHRTYPE), b"")),
        "sample 00000001: 00000001.labels is no plain USTAR file",
    ),
    "a folder": (lambda members: members.insert(0, (member("x", tarfile.DIRTYPE), b"")), "the shard holds 'x'"),
    "a time": (lambda members: setattr(members[PLACE][0], "mtime", 5), "type b'0', time 5, owner 0:0"),
    "an owner": (lambda members: setattr(members[PLACE][0], "uid", 1000), "time 0, owner 1000:0"),
    "a mode": (lambda members: setattr(members[PLACE][0], "mode", 0o4777), "owner 0:0, mode 4777"),
    "an owner's name": (lambda members: setattr(members[PLACE][0], "uname", "me"), "is no plain USTAR file"),
    "another order": (
        lambda members: members.insert(3, members.pop(4)),
        "sample 00000001: the shard holds '00000001.labels' where 00000001.jpg belongs",
    ),
    "two samples swapped": (
        lambda members: members.insert(0, members.pop(3)),
        "sample 00000000: the shard holds '00000001.jpg' where 00000000.jpg belongs",
    ),
    "a sample too few": (
        lambda members: members.__delitem__(slice(9, None)),
        "sample 00000003: no header of 00000003.jpg at byte ",
    ),
}


@pytest.mark.parametrize(("change", "cause"), MEMBERS.values(), ids=MEMBERS)
def test_a_member_that_packing_does_not_write_is_named_even_where_every_hash_fits(
    shards: Path, change: Callable[[Members], object], cause: str
) -> None:
    tar = shards / "train-00000.tar"
    rewrite(tar, change)
    (found,) = faults(shards)
    assert found.startswith(str(tar)) and cause in found, found


@pytest.mark.parametrize(("place", "cause"), [("padding", "the padding behind "), ("end", "does not end as a tar")])
def test_bytes_hidden_between_or_behind_the_members_are_found(shards: Path, place: str, cause: str) -> None:
    tar = shards / "train-00000.tar"
    data = bytearray(tar.read_bytes())
    with tarfile.open(tar, "r:") as archive:
        first = archive.getmembers()[1]
    data[first.offset_data + first.size if place == "padding" else -1] = 1
    tar.write_bytes(data)
    forge(shards)
    assert any(cause in fault for fault in faults(shards))


def other_index(folder: Path) -> None:
    shutil.copy(folder / "train-00000.idx", folder / "train-00001.idx")


def other_places(folder: Path) -> None:
    idx = folder / "train-00001.idx"
    idx.write_text(idx.read_text().replace("jpg 512 ", "jpg 513 "))


@pytest.mark.parametrize("damage", [other_index, other_places])
def test_an_index_that_does_not_fit_its_tar_is_found_even_where_every_hash_fits(
    shards: Path, damage: Callable[[Path], None]
) -> None:
    damage(shards)
    idx = shards / "train-00001.idx"
    assert faults(shards) == [f"{idx} is not the index that was packed; delete it and it is built again"]
    forge(shards)
    assert faults(shards) == [f"{idx} does not say where the members of train-00001.tar lie"]


def entries_with(folder: Path, old: str, new: str) -> None:
    csv = folder / "entries.csv"
    assert old in csv.read_text()
    csv.write_text(csv.read_text().replace(old, new, 1))
    forge(folder)


def torn_patient(folder: Path) -> None:
    # One patient's image of test becomes one of a patient of train.
    entries = open_shards(folder).entries
    test, train = (entries[entries["split"] == split].iloc[0] for split in ("test", "train"))
    entries_with(folder, f"{test['image']},{test['patient']},", f"{test['image']},{train['patient']},")


def test_a_patient_in_two_splits_is_named_whatever_the_manifest_says(shards: Path) -> None:
    torn_patient(shards)
    assert read_manifest(shards).patients_in_two_splits == 0
    found = faults(shards)
    assert "1 patients are in both train and test, the first is patient" in found[0]
    assert found[0].startswith(str(shards / "entries.csv"))


@pytest.mark.parametrize(
    ("what", "cause"),
    [
        (("splits", "val", "patients"), "says 1 for patients of val, entries.csv has 2"),
        (("splits", "test", "positives", "Mass"), " for Mass of test, entries.csv has "),
        (("splits", "train", "prevalence", "Edema"), " for the prevalence of Edema of train, entries.csv has "),
    ],
)
def test_a_lowered_count_is_named_even_where_every_hash_fits(shards: Path, what: tuple[str, ...], cause: str) -> None:
    def lower(record: dict[str, Any]) -> None:
        for key in what[:-1]:
            record = record[key]
        record[what[-1]] -= 1

    forge(shards, lower)
    assert any(cause in fault for fault in faults(shards)), faults(shards)


def test_samples_left_out_of_manifest_and_index_are_named(shards: Path) -> None:
    def lower(record: dict[str, Any]) -> None:
        record["shards"][1]["samples"] -= 1
        record["splits"]["train"]["images"] -= 1

    forge(shards, lower)
    assert any("says 7 for images of train, entries.csv has 8" in fault for fault in faults(shards))
    with pytest.raises(BadData, match=r"train-00001\.idx has 4 samples, the manifest says 3"):
        open_shards(shards)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("train-00099.tar", "is in the folder, but the manifest does not name it; remove it"),
        ("notes.pkl", "is in the folder, but the manifest does not name it; remove it"),
        (".train-00000.tar.partial", "is in the folder, but the manifest does not name it; remove it"),
    ],
)
def test_a_file_that_the_manifest_does_not_name_is_named(shards: Path, name: str, said: str) -> None:
    (shards / name).touch()
    assert faults(shards) == [f"{shards / name} {said}"]


def test_a_rest_of_packing_is_said_but_is_no_fault(shards: Path) -> None:
    (shards / ".packing").mkdir()
    proof = verify_shards(shards)
    assert proof.faults == () and proof.warnings[0].startswith(f"{shards / '.packing'} is a rest of packing")


@pytest.mark.parametrize("name", ["train-00001.tar", "entries.csv", "rejects.csv"])
def test_a_missing_file_is_named(shards: Path, name: str) -> None:
    (shards / name).unlink()
    assert faults(shards)[0].startswith(f"{shards / name} is missing")


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"row,image\n0,a.png\n", b"{"], ids=repr)
def test_entries_that_cannot_be_read_are_said_to_be_the_cause(shards: Path, text: bytes) -> None:
    (shards / "entries.csv").write_bytes(text)
    assert any("no shard can be compared with it" in fault for fault in faults(shards))


def test_every_fault_of_a_shard_is_told_in_the_order_of_its_samples(shards: Path) -> None:
    tar = shards / "train-00000.tar"

    def break_all(members: Members) -> None:
        for n in range(4):
            for suffix in ("jpg", "labels", "row"):
                content(members, f"{n:08d}.{suffix}", lambda data: b"")

    rewrite(tar, break_all)
    found = faults(shards)
    assert len(found) == 12  # three of each of four samples
    assert all(f"{tar}, sample 0000000{n // 3}" in fault for n, fault in enumerate(found))


def test_a_lossless_folder_is_verified_as_well(phantom_tree: Path, tmp_path: Path) -> None:
    pack(make_plan(phantom_tree, SplitRecipe()), tmp_path / "png", PixelRecipe(32, "png"), shard_size=40)
    assert faults(tmp_path / "png") == []
    tar = tmp_path / "png" / "train-00000.tar"
    palette = encoded(Image.fromarray(np.zeros((32, 32), dtype=np.uint8)).convert("P"), "PNG")
    rewrite(tar, lambda members: content(members, "00000000.png", lambda data: palette))
    assert faults(tmp_path / "png") == [f"{tar}, sample 00000000: the image is P 32x32, not gray 32x32"]
