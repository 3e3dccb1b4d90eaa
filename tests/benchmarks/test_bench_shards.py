"""The set to measure on: as many different images as asked for, the right labels, made once."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.bench_shards import make_bench_shards
from benchmarks.contenders import unpack
from shards.errors import BadData
from shards.folder import SplitReader
from shards.pixels import decode_sample


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tar = tmp_path / "two_256.tar"
    with tarfile.open(tar, "w") as archive:
        for number in range(2):
            buffer = io.BytesIO()
            gray = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(gray).resize((256, 256)).save(buffer, "PNG")
            member = tarfile.TarInfo(f"images/{number}.png")
            member.size = buffer.tell()
            archive.addfile(member, io.BytesIO(buffer.getvalue()))
    (tmp_path / "two_index.csv").write_text("Image Index,Finding Labels\n0.png,Mass|Hernia\n1.png,No Finding\n")
    return tar


def test_a_few_images_become_many_different_ones_with_their_findings_once(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = make_bench_shards(out, 10, source)
    encoded = SplitReader(made, "train").read(range(10)).images
    assert len({image.tobytes() for image in encoded}) == 10
    assert all(decode_sample(image.tobytes(), 224).shape == (224, 224) for image in encoded)
    of_first = made.entries["patient"] % 2 == 1  # originals are taken in turns
    assert (made.entries[["Mass", "Hernia"]].all(axis=1) == of_first).all()
    assert make_bench_shards(out, 8, source).digest == made.digest
    unpack(made, tmp_path / "jpg", "jpg")
    assert sorted((tmp_path / "jpg").iterdir())[0].read_bytes() == encoded[0].tobytes()
    unpack(made, tmp_path / "png", "png")
    first = Image.open(sorted((tmp_path / "png").iterdir())[0])
    with first:
        assert first.mode == "RGB"
        assert np.array_equal(np.asarray(first)[..., 1], decode_sample(encoded[0].tobytes(), 224))

    assert made.manifest.splits["train"].images < 14
    assert make_bench_shards(out, 14, source).manifest.splits["train"].images >= 14


def test_a_folder_of_somebody_else_is_left_alone(source: Path, tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"benchmarks\.bench_shards did not make"):
        make_bench_shards(tmp_path, 1, source)
    assert source.is_file()
