import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from shards.pixels import pixels_only


def png(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def drawing(mode: str, width: int = 301, height: int = 257) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(((x * y // 7 + x) % 251).astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_the_image_stays_the_same_and_its_rows_are_only_stored(mode: str) -> None:
    image = drawing(mode)
    kept = pixels_only(png(image))
    again = Image.open(io.BytesIO(kept))
    assert (again.mode, again.tobytes()) == (image.mode, image.tobytes())
    # What it returns passes its own checks, and any other reader's: sums and all.
    assert pixels_only(kept) == kept
    stream = kept[kept.index(b"IDAT") + 4 : kept.index(b"IEND") - 8]
    assert len(stream) > len(zlib.decompress(stream)) >= len(image.tobytes())


def test_sixteen_bits_and_small_images_stay_the_same() -> None:
    for image in (Image.fromarray(np.arange(70_000, dtype=np.uint16).reshape(100, 700)), drawing("L", 1, 1)):
        again = Image.open(io.BytesIO(pixels_only(png(image))))
        assert np.array_equal(np.asarray(again), np.asarray(image))


def test_what_decides_no_pixel_is_left_behind() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Patient", "NAME")
    assert b"NAME" not in pixels_only(png(drawing("L"), pnginfo=text, dpi=(72, 72)))
    assert b"pHYs" not in pixels_only(png(drawing("L"), dpi=(72, 72)))


def test_a_real_file_keeps_its_pixels(nih_data: Path) -> None:
    for path in sorted((nih_data / "nih_sample").glob("images_*/images/*.png"))[::20]:
        data = path.read_bytes()
        assert Image.open(io.BytesIO(pixels_only(data))).tobytes() == Image.open(io.BytesIO(data)).tobytes()


def test_a_stream_that_ends_too_early_is_refused_though_every_checksum_is_right() -> None:
    whole = pixels_only(png(drawing("L")))
    start, end = whole.index(b"IDAT") + 4, whole.index(b"IEND") - 8
    rows = zlib.decompress(whole[start:end])
    short = zlib.compress(rows[: len(rows) // 2])
    chunk = b"IDAT" + short
    framed = struct.pack(">I", len(short)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(ValueError, match="truncated"):
        pixels_only(whole[: start - 8] + framed + whole[end + 4 :])
