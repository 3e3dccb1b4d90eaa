"""Image files of any origin as a model takes them: read within bounds, or refused in one line."""

import io
import random
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.predict.images import read_image
from shards.errors import BadData
from shards.pixels import MAX_SIDE

ROOT = Path(__file__).parents[3]
GRAY = np.add.outer(np.arange(0, 128, 2), np.arange(0, 128, 2)).astype(np.uint8)


def jpeg(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def claiming(width: int, height: int, **options: object) -> bytes:
    """A JPEG of 64 x 64 pixels whose header says another size."""
    data = bytearray(jpeg(Image.fromarray(GRAY), **options))
    start = data.index(b"\xff\xc2" if options.get("progressive") else b"\xff\xc0") + 5
    data[start : start + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(data)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize(
    ("width", "height"), [(65500, 65500), (13000, 13000), (1, 60000), (60000, 1), (MAX_SIDE + 1, 8)]
)
def test_a_jpeg_that_claims_too_large_a_side_is_refused_by_its_header(
    tmp_path: Path, width: int, height: int, progressive: bool
) -> None:
    path = tmp_path / "bomb.jpg"
    path.write_bytes(claiming(width, height, progressive=progressive))
    with pytest.raises(BadData) as error:
        read_image(path, 32)
    assert error.value.message == (
        f"{path} cannot be read: claims {width}x{height} pixels; at most {MAX_SIDE} a side are allowed"
    )


def test_a_strip_of_sixty_thousand_pixels_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "strip.jpg"
    Image.new("L", (1, 60_000)).save(path)
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom eval.predict.images import read_image\n"
        "try:\n    read_image(Path(sys.argv[1]), 224)\nexcept Exception as error:\n    print(error.message)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )

    def bounded() -> None:  # what the whole process may map: its libraries take 1 GB of it
        resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))

    done = subprocess.run(
        [sys.executable, "-c", code, path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        preexec_fn=bounded,
    )
    assert "claims 1x60000 pixels" in done.stdout, done.stderr


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_of_any_mode_is_read_as_its_gray(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "one.jpg"
    path.write_bytes(jpeg(Image.fromarray(GRAY).convert(mode), quality=95))
    assert np.abs(read_image(path, 64).astype(int) - GRAY).mean() < 4


def test_a_damaged_jpeg_is_read_or_refused_but_never_breaks(tmp_path: Path) -> None:
    draw = random.Random(0)
    whole = [jpeg(Image.fromarray(GRAY).convert(mode), progressive=p) for mode in ("L", "RGB") for p in (0, 1)]
    path = tmp_path / "damaged.jpg"
    for n in range(300):
        data = bytearray(whole[n % len(whole)])
        for _ in range(draw.randint(1, 8)):
            # Most of them in the header, where sizes and tables are.
            data[draw.randrange(2, draw.choice([200, len(data)]))] = draw.randrange(256)
        path.write_bytes(data[: draw.choice([len(data), draw.randrange(2, len(data))])])
        try:
            assert read_image(path, 32).shape == (32, 32)
        except BadData as error:
            said = error.message
            assert said.startswith(str(path)) and "\n" not in said
