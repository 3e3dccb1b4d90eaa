"""Small NIH-shaped trees, made of whatever images a test asks for."""

import io
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from shards.findings import FINDINGS
from shards.packing import pack
from shards.packing.planning import SplitRecipe, make_plan
from shards.pixels import PixelRecipe
from tests.serving import Server, serving

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
IMAGES_A_PATIENT = 2

MakeTree = Callable[..., Path]


@pytest.fixture(scope="session")
def png() -> Callable[..., bytes]:
    """(pixels, save options) -> the bytes of a PNG of these pixels."""

    def encoded(pixels: npt.NDArray[np.generic] | Image.Image, **options: object) -> bytes:
        buffer = io.BytesIO()
        image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        image.save(buffer, "PNG", **options)
        return buffer.getvalue()

    return encoded


@pytest.fixture(scope="session")
def write_metadata() -> Callable[..., Path]:
    """(folder, rows, ...) -> the metadata CSV with these rows, written there."""

    def write(folder: Path, rows: Iterable[str], *, header: str = HEADER, end: str = "\n", start: str = "") -> Path:
        csv = folder / "Data_Entry_2017_v2020.csv"
        csv.write_bytes((start + end.join([header, *rows, ""])).encode())
        return csv

    return write


@pytest.fixture(scope="session")
def make_tree(
    tmp_path_factory: pytest.TempPathFactory, png: Callable[..., bytes], write_metadata: Callable[..., Path]
) -> MakeTree:
    """(patients, size) -> an NIH-shaped tree in two folders, two images a patient, every third for test.

    Image n of the tree shows finding n % 15, or none at 14. `replace` gives other bytes to some images.
    """

    def make(patients: int = 9, *, size: int = 24, replace: Mapping[str, bytes] | None = None) -> Path:
        tree = tmp_path_factory.mktemp("nih")
        draw = np.random.default_rng(0)
        rows: list[str] = []
        lists: dict[str, list[str]] = {"train_val": [], "test": []}
        for number in range(patients * IMAGES_A_PATIENT):
            patient, follow_up = divmod(number, IMAGES_A_PATIENT)
            name = f"{patient + 1:08d}_{follow_up:03d}.png"
            label = (*FINDINGS, "No Finding")[number % 15]
            rows.append(f"{name},{label},{follow_up},{patient + 1},5{follow_up},F,PA,2500,2048,0.171,0.171")
            lists["test" if patient % 3 == 2 else "train_val"].append(name)
            folder = tree / f"images_{1 + (number >= patients):03d}" / "images"
            folder.mkdir(parents=True, exist_ok=True)
            noise = draw.integers(0, 256, (size, size), dtype=np.uint8)
            (folder / name).write_bytes(png(noise) if replace is None else replace.get(name, png(noise)))
        write_metadata(tree, rows)
        for which, names in lists.items():
            (tree / f"{which}_list.txt").write_text("\n".join(names))
        return tree

    return make


@pytest.fixture(scope="session")
def packed(make_tree: MakeTree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished shard folder of 18 images at 16 px, 4 to a shard; only to be read."""
    out = tmp_path_factory.mktemp("packed")
    pack(make_plan(make_tree(), SplitRecipe(val_fraction=0.3)), out, PixelRecipe(size=16), shard_size=4)
    return out


@pytest.fixture
def shards(packed: Path, tmp_path: Path) -> Path:
    """A copy of `packed` that a test may damage."""
    return shutil.copytree(packed, tmp_path / "shards")


@pytest.fixture
def server(packed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The packed shards behind HTTP."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(packed) as server:
        yield server


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    """A folder that is not there yet."""
    return tmp_path / "dest"
