import io
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from shards.errors import BadData, CannotResume, ResourceMissing
from shards.findings import FINDINGS
from shards.folder import SplitReader, open_shards
from shards.manifest import Manifest
from shards.packing import pack
from shards.pixels import read_gray, resize
from shards.planning import SplitRecipe, make_plan
from shards.publishing import sha256_of
from shards.shard import PixelRecipe
from shards.splits import SPLITS

ROOT = Path(__file__).parents[2]
TIMEOUT = 120
MakeTree = Callable[..., Path]
Png = Callable[..., bytes]


def packed_into(out: Path, tree: Path, recipe: PixelRecipe | None = None, **options: int) -> Manifest:
    plan = make_plan(tree, SplitRecipe(val_fraction=0.3))
    return pack(plan, out, recipe or PixelRecipe(size=16), **{"shard_size": 4, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_the_folder_holds_what_its_manifest_names_and_nothing_else(packed: Path) -> None:
    manifest = open_shards(packed).manifest
    tars = [shard.name for shard in manifest.shards]
    assert tars == [
        f"{split}-{number:05d}.tar"
        for split, count in zip(SPLITS, (2, 1, 2), strict=True)
        for number in range(count)
    ]
    expected = {
        "manifest.json",
        "entries.csv",
        "rejects.csv",
        *tars,
        *(name.replace(".tar", ".idx") for name in tars),
    }
    assert set(contents(packed)) == expected
    for shard in manifest.shards:
        assert (
            sha256_of(packed / shard.name) == shard.sha256
            and (packed / shard.name).stat().st_size == shard.bytes
        )
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
    pixels = np.stack([resize(read_gray(path.read_bytes()), 16) for path in paths])
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
        pack(
            make_plan(make_tree(), SplitRecipe(seed=1, val_fraction=0.3)),
            shards,
            PixelRecipe(16),
            shard_size=4,
        )
    tree = make_tree()
    csv = tree / "Data_Entry_2017_v2020.csv"
    csv.write_text(csv.read_text().replace("Mass", "Nodule"))
    with pytest.raises(CannotResume, match=r"metadata CSV was .*, is now "):
        packed_into(shards, tree)


def test_a_finished_folder_that_is_damaged_is_not_called_finished(shards: Path, make_tree: MakeTree) -> None:
    (shards / "val-00000.tar").unlink()
    with pytest.raises(BadData, match=r"val-00000\.tar is missing"):
        packed_into(shards, make_tree())


def test_a_folder_with_other_files_and_a_file_in_the_way_are_left_alone(
    make_tree: MakeTree, tmp_path: Path
) -> None:
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
def test_too_many_rejects_are_all_listed_and_no_manifest_stands(
    make_tree: MakeTree, tmp_path: Path, jobs: int
) -> None:
    with pytest.raises(
        BadData, match=r"3 images do not decode, more than --max-rejects 2; the first is images_001/"
    ):
        packed_into(tmp_path / "out", make_tree(replace=BAD), jobs=jobs, max_rejects=2)
    assert not (tmp_path / "out" / "manifest.json").exists()
    rejects = pd.read_csv(tmp_path / "out" / "rejects.csv")
    assert dict(rejects.values.tolist()) == {
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


def test_after_mending_the_rejects_the_same_command_ends_at_the_same_bytes(
    make_tree: MakeTree, tmp_path: Path, packed: Path
) -> None:
    tree, good = make_tree(replace=BAD), make_tree()
    with pytest.raises(BadData):
        packed_into(tmp_path / "out", tree)
    for path in good.rglob("*.png"):
        shutil.copy(path, tree / path.relative_to(good))
    packed_into(tmp_path / "out", tree)
    assert contents(tmp_path / "out") == contents(packed)


def test_finished_shards_are_kept_when_packing_goes_on(make_tree: MakeTree, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(BadData):
        packed_into(out, make_tree(replace={"00000003_000.png": b""}))
    before = {path.name: path.stat().st_ino for path in out.glob("*.tar")}
    packed_into(out, make_tree())
    rewritten = [name for name, inode in before.items() if (out / name).stat().st_ino != inode]
    assert rewritten == ["test-00000.tar"]


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


def make_shards(tree: Path, out: Path, jobs: int, **popen: object) -> "subprocess.Popen[str]":
    options = ["--size", "16", "--shard-size", "2", "--jobs", str(jobs)]
    return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
        [sys.executable, ROOT / "scripts" / "make_shards.py", tree, out, *options],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen,
    )  # fmt: skip


@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_in_the_middle_the_same_command_ends_at_the_same_bytes(
    make_tree: MakeTree, tmp_path: Path, png: Png, jobs: int
) -> None:
    slow = png(np.random.default_rng(0).integers(0, 256, (1500, 1500), dtype=np.uint8))
    names = [f"{1 + n // 2:08d}_{n % 2:03d}.png" for n in range(36)]
    tree = make_tree(18, replace=dict.fromkeys(names, slow))
    out = tmp_path / "out"
    process = make_shards(tree, out, jobs)
    while not list((out / ".packing").glob("*-*.json")):
        assert process.poll() is None, process.communicate()[1]
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=TIMEOUT)  # returns once no worker is left that holds the other end
    assert process.returncode == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    _, errors = make_shards(tree, out, jobs).communicate(timeout=TIMEOUT)
    assert (out / "manifest.json").exists(), errors
    plan = make_plan(tree, SplitRecipe())
    pack(plan, tmp_path / "undisturbed", PixelRecipe(16), shard_size=2, jobs=2)
    assert contents(out) == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_disk_that_fills_up_is_exit_4_without_a_short_file_and_with_room_again_all_is_finished(
    make_tree: MakeTree, tmp_path: Path, jobs: int
) -> None:
    tree, out = make_tree(), tmp_path / "out"

    def allow_no_tar() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))  # a tar has 10,240 bytes or more

    process = make_shards(tree, out, jobs, preexec_fn=allow_no_tar)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 4, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith(f"Error: cannot write {out}/") and "File too large" in errors
    assert not [name for name in contents(out) if name.endswith((".tar", ".idx", ".partial"))]
    _, errors = make_shards(tree, out, jobs).communicate(timeout=TIMEOUT)
    assert len(open_shards(out).entries) == 18, errors


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
        source = resize(read_gray((sample / entry["folder"] / entry["image"]).read_bytes()), 224)
        with Image.open(io.BytesIO(data.tobytes())) as image:
            difference = np.abs(np.asarray(image).astype(int) - source)
        assert difference.mean() < 2 and difference.max() <= 24
