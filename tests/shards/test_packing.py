import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from shards.errors import BadData, CannotResume, ResourceMissing
from shards.files import sha256_of
from shards.findings import FINDINGS
from shards.folder import SplitReader, open_shards
from shards.manifest import Manifest
from shards.packing import pack
from shards.packing.planning import SplitRecipe, make_plan
from shards.pixels import PixelRecipe, decode_sample, open_gray, psnr, resize
from shards.splits import SPLITS

MakeTree = Callable[..., Path]
Png = Callable[..., bytes]


def packed_into(out: Path, tree: Path, recipe: PixelRecipe | None = None, **options: int) -> Manifest:
    plan = make_plan(tree, SplitRecipe(val_fraction=0.3))
    return pack(plan, out, recipe or PixelRecipe(size=16), **{"shard_size": 4, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_holds_what_its_manifest_names_and_nothing_else(packed: Path) -> None:
    manifest = open_shards(packed).manifest
    tars = [shard.name for shard in manifest.shards]
    assert tars == [
        f"{split}-{number:05d}.tar" for split, count in zip(SPLITS, (2, 1, 2), strict=True) for number in range(count)
    ]
    expected = {"manifest.json", "entries.csv", "rejects.csv", *tars, *(name.replace(".tar", ".idx") for name in tars)}
    assert set(contents(packed)) == expected
    for shard in manifest.shards:
        assert sha256_of(packed / shard.name) == shard.sha256 and (packed / shard.name).stat().st_size == shard.bytes
    assert sha256_of(packed / "entries.csv") == manifest.entries_sha256


def test_the_manifest_counts_images_patients_and_positives_as_entries_csv_does(packed: Path) -> None:
    manifest = open_shards(packed).manifest
    entries = pd.read_csv(packed / "entries.csv")
    assert entries.columns.tolist()[:4] == ["row", "image", "patient", "split"]
    assert entries.columns.tolist()[4:18] == list(FINDINGS)
    for split in SPLITS:
        rows = entries[entries["split"] == split]
        record = manifest.splits[split]
        assert (record.images, record.patients) == (len(rows), rows["patient"].nunique())
        assert record.positives == rows[list(FINDINGS)].sum().to_dict()
    assert sum(record.images for record in manifest.splits.values()) == len(entries) == 18


def test_mean_and_std_are_those_of_the_resized_train_pixels(make_tree: MakeTree, tmp_path: Path) -> None:
    tree = make_tree()
    manifest = packed_into(tmp_path / "out", tree)
    entries = pd.read_csv(tmp_path / "out" / "entries.csv").query("split == 'train'")
    paths = [tree / folder / image for folder, image in entries[["folder", "image"]].values]
    pixels = np.stack([resize(open_gray(path.read_bytes()), 16) for path in paths])
    assert manifest.mean == pytest.approx(pixels.mean()) and manifest.std == pytest.approx(pixels.std())


@pytest.mark.parametrize("recipe", [PixelRecipe(16), PixelRecipe(32, "png")], ids=["jpeg", "png"])
def test_the_bytes_depend_neither_on_jobs_nor_on_the_place(
    make_tree: MakeTree, tmp_path: Path, recipe: PixelRecipe
) -> None:
    tree = make_tree()
    packed_into(tmp_path / "one", tree, recipe, jobs=1)
    packed_into(tmp_path / "two", shutil.copytree(tree, tmp_path / "moved"), recipe, jobs=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_second_run_writes_nothing(shards: Path, make_tree: MakeTree) -> None:
    def state() -> dict[str, tuple[int, int]]:
        found = ((path, path.stat()) for path in (shards, *shards.rglob("*")))
        return {path.name: (stat.st_mtime_ns, stat.st_ino) for path, stat in found}

    before = state()
    packed_into(shards, make_tree())
    assert state() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": PixelRecipe(20)}, "size was 16, is now 20"),
        ({"recipe": PixelRecipe(16, quality=80)}, "quality was 95, is now 80"),
        ({"recipe": PixelRecipe(16, "png")}, "encoding was jpeg, is now png"),
        ({"shard_size": 5}, "shard_size was 4, is now 5"),
    ],
)
@pytest.mark.parametrize("state", ["finished", "interrupted"])
def test_a_folder_packed_otherwise_is_refused_with_what_differs(
    make_tree: MakeTree, tmp_path: Path, state: str, change: dict[str, object], message: str
) -> None:
    bad = {"00000001_000.png": b"bad"} if state == "interrupted" else {}
    out = tmp_path / "out"
    if state == "interrupted":
        with pytest.raises(BadData):
            packed_into(out, make_tree(replace=bad))
    else:
        packed_into(out, make_tree())
    before = contents(out)
    with pytest.raises(CannotResume, match=message):
        packed_into(out, make_tree(), **change)  # type: ignore[arg-type]
    assert contents(out) == before


def test_other_metadata_or_another_split_is_refused_too(shards: Path, make_tree: MakeTree) -> None:
    with pytest.raises(CannotResume, match="seed was 0, is now 1"):
        pack(make_plan(make_tree(), SplitRecipe(seed=1, val_fraction=0.3)), shards, PixelRecipe(16), shard_size=4)
    tree = make_tree()
    csv = tree / "Data_Entry_2017_v2020.csv"
    csv.write_text(csv.read_text().replace("Mass", "Nodule"))
    with pytest.raises(CannotResume, match=r"metadata CSV was .*, is now "):
        packed_into(shards, tree)


def test_a_folder_with_other_files_and_a_file_in_the_way_are_left_alone(make_tree: MakeTree, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    with pytest.raises(BadData, match="holds other files and no shards"):
        packed_into(tmp_path / "thesis", make_tree())
    with pytest.raises(BadData, match="is a file"):
        packed_into(tmp_path / "thesis" / "chapter1.tex", make_tree())
    with pytest.raises(ResourceMissing, match="cannot write"):
        packed_into(tmp_path / "thesis" / "chapter1.tex" / "out", make_tree())
    assert contents(tmp_path) == {"thesis/chapter1.tex": b"precious"}


BAD = {"00000001_000.png": b"", "00000004_001.png": b"no image", "00000009_001.png": b"\x89PNG\r\n\x1a\n"}


@pytest.mark.parametrize("jobs", [1, 2])
def test_too_many_rejects_are_all_listed_and_no_manifest_stands(make_tree: MakeTree, tmp_path: Path, jobs: int) -> None:
    with pytest.raises(BadData, match=r"3 images do not decode, more than --max-rejects 2; the first is images_001/"):
        packed_into(tmp_path / "out", make_tree(replace=BAD), jobs=jobs, max_rejects=2)
    assert not (tmp_path / "out" / "manifest.json").exists()
    rejects = pd.read_csv(tmp_path / "out" / "rejects.csv")
    assert dict(rejects[["image", "reason"]].values.tolist()) == {
        "00000001_000.png": "the file is empty",
        "00000004_001.png": "not a PNG file",
        "00000009_001.png": "the file is truncated",
    }


def test_allowed_rejects_are_listed_and_the_rest_is_packed(make_tree: MakeTree, tmp_path: Path) -> None:
    manifest = packed_into(tmp_path / "out", make_tree(replace=BAD), max_rejects=3, shard_size=1)
    assert manifest.rejects == 3 and sum(split.images for split in manifest.splits.values()) == 15
    folder = open_shards(tmp_path / "out")
    assert not set(folder.entries["image"]) & set(BAD)
    for split in SPLITS:
        reader = SplitReader(folder, split)
        samples = reader.read(range(len(reader)))
        assert np.array_equal(samples.labels, folder.entries.loc[samples.rows, list(FINDINGS)].to_numpy())


def test_no_text_of_a_source_image_reaches_the_folder(make_tree: MakeTree, tmp_path: Path, png: Png) -> None:
    told = PngInfo()
    told.add_text("Patient", "Jane Doe")
    told.add_itxt("Name", "Jane Doe", zip=False)
    image = png(np.zeros((24, 24), np.uint8), pnginfo=told, exif=b"Exif\0\0Jane Doe")
    assert image.count(b"Jane Doe") == 3
    bad = image[:-20]
    tree = make_tree(replace={"00000001_000.png": image, "00000002_000.png": bad})
    packed_into(tmp_path / "out", tree, PixelRecipe(24, "png"), max_rejects=1)
    assert not any(b"Jane" in data for data in contents(tmp_path / "out").values())


def test_every_kind_of_png_is_packed_as_its_gray(make_tree: MakeTree, tmp_path: Path, png: Png) -> None:
    ramp = np.add.outer(np.arange(24), np.arange(24)).astype(np.uint8) * 5
    gray = Image.fromarray(ramp)
    alpha = gray.convert("RGB")
    alpha.putalpha(gray)
    with_alpha = gray.copy()
    with_alpha.putalpha(gray)
    bilevel = gray.point(lambda level: 255 * (level > 99)).convert("1")
    kinds = [
        gray,
        gray.convert("RGB"),
        gray.convert("P"),
        alpha,
        with_alpha,
        Image.fromarray(ramp.astype(np.uint16) * 257),
        bilevel,
    ]
    names = [f"{1 + n // 2:08d}_{n % 2:03d}.png" for n in range(len(kinds))]
    tree = make_tree(replace={name: png(kind) for name, kind in zip(names, kinds, strict=True)})
    packed_into(tmp_path / "out", tree, PixelRecipe(24, "png"))
    rows = pd.read_csv(tmp_path / "out" / "entries.csv").set_index("image")["row"]
    packed = {}
    for tar in (tmp_path / "out").glob("*.tar"):
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                if member.name.endswith(".png"):
                    data = archive.extractfile(member).read()  # type: ignore[union-attr]
                    packed[int(member.name[:8])] = np.asarray(Image.open(io.BytesIO(data)))
    for name in names[:-1]:
        assert np.array_equal(packed[rows[name]], ramp), name
    assert np.array_equal(packed[rows[names[-1]]], 255 * (ramp > 99))


def test_a_shard_whose_images_are_all_bad_is_not_there_and_the_others_keep_their_names(
    make_tree: MakeTree, tmp_path: Path
) -> None:
    images = pd.read_csv(tmp_path / "all" / "entries.csv") if packed_into(tmp_path / "all", make_tree()) else None
    assert images is not None
    first = images["image"][:4]  # the first shard of train
    manifest = packed_into(tmp_path / "out", make_tree(replace=dict.fromkeys(first, b"")), max_rejects=4)
    assert [shard.name for shard in manifest.shards][:2] == ["train-00001.tar", "val-00000.tar"]
    assert not list((tmp_path / "out").glob("train-00000.*"))
    assert SplitReader(open_shards(tmp_path / "out"), "train").read([0]).rows.tolist() == [4]


def test_without_a_good_image_in_train_nothing_is_finished(make_tree: MakeTree, tmp_path: Path) -> None:
    names = [f"{1 + n // 2:08d}_{n % 2:03d}.png" for n in range(18)]
    with pytest.raises(BadData, match="18 images do not decode, which leaves none of train"):
        packed_into(tmp_path / "out", make_tree(replace=dict.fromkeys(names, b"")), max_rejects=18)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_the_manifest_proves_the_split_and_gives_every_finding_s_prevalence(packed: Path) -> None:
    manifest = json.loads((packed / "manifest.json").read_text())
    assert manifest["patients_in_two_splits"] == 0
    for split, patients in (("train", 4), ("val", 2), ("test", 3)):
        record = manifest["splits"][split]
        assert record["patients"] == patients
        assert list(record["prevalence"]) == list(FINDINGS)
        for finding, share in record["prevalence"].items():
            assert share == round(record["positives"][finding] / record["images"], 6)


def test_a_split_without_images_has_no_prevalence(make_tree: MakeTree, tmp_path: Path) -> None:
    plan = make_plan(make_tree(), SplitRecipe(val_fraction=0))
    manifest = pack(plan, tmp_path, PixelRecipe(16))
    assert manifest.splits["val"].images == 0 and set(manifest.splits["val"].prevalence.values()) == {None}
    assert open_shards(tmp_path).manifest == manifest


def test_the_loss_of_the_encoding_is_measured_on_every_sixteenth_row(make_tree: MakeTree, tmp_path: Path) -> None:
    tree = make_tree()
    good, poor = (packed_into(tmp_path / str(q), tree, PixelRecipe(16, quality=q)) for q in (95, 30))
    folder = open_shards(tmp_path / "95")
    nearness = []
    for split, position in (("train", 0), ("test", 4)):
        (row,) = SplitReader(folder, split).read([position]).rows
        assert row % 16 == 0
        entry = folder.entries.loc[row]
        gray = resize(open_gray((tree / entry["folder"] / entry["image"]).read_bytes()), 16)
        nearness.append(psnr(gray, SplitReader(folder, split).read([position]).images[0].tobytes()))
    assert good.psnr == round(sum(nearness) / 2, 2)
    assert poor.psnr is not None and poor.psnr < good.psnr
    assert packed_into(tmp_path / "png", tree, PixelRecipe(16, "png")).psnr is None


def test_the_recipe_names_filter_and_aspect_and_another_filter_gives_other_bytes(
    make_tree: MakeTree, tmp_path: Path
) -> None:
    tree = make_tree()
    lanczos, box = (packed_into(tmp_path / name, tree, PixelRecipe(16, filter=name)) for name in ("lanczos", "box"))
    assert (lanczos.recipe["filter"], box.recipe["filter"]) == ("lanczos", "box")
    assert lanczos.recipe["aspect"] == "padded to a square"
    assert lanczos.shards[0].sha256 != box.shards[0].sha256


@pytest.mark.parametrize("size", [224, 256, 320, 512, 1024])
def test_every_common_size_is_packed(make_tree: MakeTree, tmp_path: Path, size: int) -> None:
    manifest = packed_into(tmp_path, make_tree(), PixelRecipe(size, quality=80))
    assert manifest.size == size
    (data,) = SplitReader(open_shards(tmp_path), "val").read([0]).images
    assert decode_sample(data.tobytes(), size).shape == (size, size)


def test_entries_and_rejects_tell_the_sha256_of_every_source_file(make_tree: MakeTree, tmp_path: Path) -> None:
    tree = make_tree(replace=BAD)
    packed_into(tmp_path / "out", tree, max_rejects=3)
    known = pd.concat(pd.read_csv(tmp_path / "out" / name) for name in ("entries.csv", "rejects.csv"))
    assert len(known) == 18
    for folder, image, sha256 in known[["folder", "image", "source_sha256"]].values:
        assert sha256_of(tree / folder / image) == sha256


def test_the_real_sample_is_packed_near_its_pixels(nih_data: Path, tmp_path: Path) -> None:
    sample = nih_data / "nih_sample"
    manifest = pack(make_plan(sample, SplitRecipe()), tmp_path, PixelRecipe(), shard_size=50, jobs=2)
    assert sum(split.images for split in manifest.splits.values()) == 120
    assert (manifest.splits["test"].images, manifest.rejects) == (44, 0)
    folder = open_shards(tmp_path)
    reader = SplitReader(folder, "test")
    positions = range(0, len(reader), 9)
    for data, row in zip(reader.read(positions).images, reader.read(positions).rows, strict=True):
        entry = folder.entries.loc[row]
        source = resize(open_gray((sample / entry["folder"] / entry["image"]).read_bytes()), 224)
        with Image.open(io.BytesIO(data.tobytes())) as image:
            difference = np.abs(np.asarray(image).astype(int) - source)
        assert difference.mean() < 2 and difference.max() <= 24
