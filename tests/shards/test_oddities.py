"""What looks wrong though it can be packed: counted in a line each, in the manifest, refused by --strict."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shards.errors import BadData
from shards.folder import open_shards
from shards.manifest import Manifest, read_manifest
from shards.packing import pack
from shards.packing.planning import SplitRecipe, make_plan
from shards.pixels import PixelRecipe

MakeTree = Callable[..., Path]
Png = Callable[..., bytes]
NAME = "Data_Entry_2017_v2020.csv"
FIRST, SECOND = "00000001_000.png", "00000002_001.png"


def packed_into(out: Path, tree: Path, **options: int) -> Manifest:
    plan = make_plan(tree, SplitRecipe(val_fraction=0.3))
    return pack(plan, out, PixelRecipe(16), shard_size=4, **options)  # type: ignore[arg-type]


def twelve_bits(tree: Path, png: Png) -> str:
    for name in (FIRST, SECOND):
        (path,) = tree.rglob(name)
        path.write_bytes(png(np.random.default_rng(0).integers(0, 4096, (24, 24), dtype=np.uint16)))
    return "2 images have 16 bits but no value over 4095 (the first is images_001/images/0000000"


def small(tree: Path, png: Png) -> str:
    (path,) = tree.rglob(SECOND)
    path.write_bytes(png(np.zeros((9, 15), dtype=np.uint8)))
    return f"1 images are smaller than --size (the first is images_001/images/{SECOND})"


def unlisted(tree: Path, png: Png) -> str:
    for name in ("b.png", "a.png"):
        (tree / "images_002" / "images" / name).write_bytes(b"")
    return "2 images are in no row of the metadata (the first is images_002/images/a.png)"


def other_patient(tree: Path, png: Png) -> str:
    csv = tree / NAME
    csv.write_text(csv.read_text().replace(f"{FIRST},Atelectasis,0,1,", f"{FIRST},Atelectasis,0,77,"))
    return f"1 images have another patient ID than the one in their name (the first is {FIRST})"


def unknown_age(tree: Path, png: Png) -> str:
    csv = tree / NAME
    csv.write_text(re.sub(r",5\d,F,", ", ,F,", csv.read_text(), count=3))
    return f"3 ages are empty (the first is {FIRST})"


ODD = {
    "twelve_bits": (twelve_bits, 2),
    "enlarged": (small, 1),
    "unlisted": (unlisted, 2),
    "other_patient": (other_patient, 1),
    "unknown_age": (unknown_age, 3),
}


@pytest.mark.parametrize(("kind", "jobs"), [*((kind, 1) for kind in ODD), ("enlarged", 2)])
def test_what_looks_wrong_is_told_in_a_line_and_counted_in_the_manifest(
    make_tree: MakeTree, png: Png, tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, jobs: int
) -> None:
    damage, count = ODD[kind]
    tree = make_tree()
    said = damage(tree, png)
    manifest = packed_into(tmp_path / "out", tree, jobs=jobs)
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and warnings[0].startswith(f"warning: {said}")
    assert manifest.warnings == {kind: count}
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["warnings"] == {kind: count}
    assert read_manifest(tmp_path / "out") == manifest
    # Again, when nothing is left to do; only the example of what is in the pixels is not known any more.
    assert packed_into(tmp_path / "out", tree) == manifest
    again = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert [re.sub(r" \(.*\)", "", line) for line in again] == [re.sub(r" \(.*\)", "", warnings[0])]


@pytest.mark.parametrize("kind", ODD)
def test_strict_refuses_what_looks_wrong_before_there_is_a_manifest_and_once_there_is_one(
    make_tree: MakeTree, png: Png, tmp_path: Path, kind: str
) -> None:
    tree = make_tree()
    said = ODD[kind][0](tree, png)
    with pytest.raises(BadData) as error:
        packed_into(tmp_path / "out", tree, strict=True)
    assert error.value.message.startswith(said) and "--strict refuses" in error.value.message
    assert not (tmp_path / "out" / "manifest.json").exists()
    packed_into(tmp_path / "out", tree)
    with pytest.raises(BadData, match="--strict refuses"):
        packed_into(tmp_path / "out", tree, strict=True)


def test_a_tree_in_order_has_no_warning_and_passes_strict(
    make_tree: MakeTree, tmp_path: Path, packed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert packed_into(tmp_path / "out", make_tree(), strict=True).warnings is None
    assert "warning" not in capfd.readouterr().err
    text = (tmp_path / "out" / "manifest.json").read_bytes()
    assert text == (packed / "manifest.json").read_bytes() and b"warnings" not in text


def test_a_resumed_pack_counts_what_was_packed_before_it_was_interrupted(
    make_tree: MakeTree, png: Png, tmp_path: Path
) -> None:
    tree = make_tree()
    for damage, _ in ODD.values():
        damage(tree, png)
    whole = packed_into(tmp_path / "whole", tree)
    assert whole.warnings is not None and sorted(whole.warnings) == sorted(ODD)
    (last,) = tree.rglob("00000009_001.png")
    good = last.read_bytes()
    last.write_bytes(b"")
    with pytest.raises(BadData, match="do not decode"):
        packed_into(tmp_path / "out", tree)
    last.write_bytes(good)
    kept = {tar: tar.stat().st_ino for tar in (tmp_path / "out").glob("train-*.tar")}
    assert packed_into(tmp_path / "out", tree) == whole
    assert kept == {tar: tar.stat().st_ino for tar in (tmp_path / "out").glob("train-*.tar")}
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_names_that_do_not_tell_the_patient_are_not_held_against_the_metadata(
    make_tree: MakeTree, tmp_path: Path
) -> None:
    tree = make_tree()
    csv = tree / NAME
    lines = csv.read_text().splitlines()
    renumbered = [re.sub(r",(\d+),5", lambda match: f",{int(match[1]) + 100},5", line) for line in lines]
    csv.write_text("\n".join(renumbered))
    assert make_plan(tree, SplitRecipe()).oddities == {}


def test_sixteen_bits_that_are_used_are_not_taken_for_twelve(make_tree: MakeTree, png: Png, tmp_path: Path) -> None:
    deep = np.zeros((24, 24), dtype=np.uint16)
    deep[3, 3] = 4096
    assert packed_into(tmp_path, make_tree(replace={FIRST: png(deep)})).warnings is None


def test_an_unknown_age_is_minus_one_in_entries_csv(make_tree: MakeTree, png: Png, tmp_path: Path) -> None:
    tree = make_tree()
    unknown_age(tree, png)
    packed_into(tmp_path, tree)
    entries = open_shards(tmp_path).entries
    assert (entries["age"] == -1).sum() == 3 and entries["age"].dtype == np.int64


def test_a_name_with_a_line_break_is_refused_with_its_row(make_tree: MakeTree) -> None:
    csv = make_tree() / NAME
    csv.write_text(csv.read_text().replace(FIRST, f'"a\nb{FIRST}"'))
    with pytest.raises(BadData, match="row 2: image has a line break"):
        make_plan(csv.parent, SplitRecipe())
