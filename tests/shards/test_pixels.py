import io
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shards.pixels import MAX_SIDE, Filter, Gray, decode_sample, encode, open_gray, psnr, resize

ROOT = Path(__file__).parents[2]
Png = Callable[..., bytes]

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GRAY = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
# A chest is smooth at this scale; noise is not what JPEG is for.
SMOOTH = np.add.outer(np.arange(0, 128, 2), np.arange(0, 128, 2)).astype(np.uint8)


def read_gray(data: bytes) -> Gray:
    return np.asarray(open_gray(data))


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def raw_png(width: int, height: int, depth: int, colour: int, rows: bytes, *before: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"".join([SIGNATURE, header, *before, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")])


def with_alpha(mode: str) -> Image.Image:
    image = Image.fromarray(GRAY).convert(mode)
    image.putalpha(Image.fromarray(255 - GRAY))
    return image


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(GRAY),
        Image.fromarray(GRAY).convert("RGB"),
        with_alpha("RGB"),
        with_alpha("L"),
        Image.fromarray(GRAY).convert("P"),
        Image.fromarray(GRAY.astype(np.uint16) * 257),
    ],
    ids=["L", "RGB", "RGBA", "LA", "P", "I;16"],
)
def test_the_same_gray_in_any_mode_reads_as_exactly_that_gray(image: Image.Image, png: Png) -> None:
    assert np.array_equal(read_gray(png(image)), GRAY)


@pytest.mark.parametrize("options", [{"transparency": bytes(range(256))}, {"transparency": 3}], ids=repr)
def test_a_transparent_palette_reads_as_its_colours(options: dict[str, object], png: Png) -> None:
    image = Image.fromarray(GRAY).convert("P")
    assert np.array_equal(read_gray(png(image, **options)), GRAY)


@pytest.mark.parametrize(
    ("depth", "row", "grays"), [(1, 0b01000000, [0, 255]), (2, 0b00011011, [0, 85, 170, 255]), (4, 0x1E, [17, 238])]
)
def test_few_bits_are_stretched_to_the_whole_range(depth: int, row: int, grays: list[int]) -> None:
    data = raw_png(len(grays), 1, depth, 0, bytes([0, row]))
    assert read_gray(data).tolist() == [grays]


def test_colour_becomes_luma(png: Png) -> None:
    primaries = np.eye(3, dtype=np.uint8)[None] * 255
    assert read_gray(png(primaries)).tolist() == [[76, 150, 29]]  # 255 x (0.299, 0.587, 0.114)


@given(values=st.lists(st.integers(0, 65535), min_size=1, max_size=64))
def test_sixteen_bits_are_scaled_to_the_nearest_level_and_keep_their_order(png: Png, values: list[int]) -> None:
    deep = np.sort(np.array([values], dtype=np.uint16))
    gray = read_gray(png(deep))
    assert np.array_equal(gray, np.rint(deep / 257))
    assert (np.diff(gray.astype(int)) >= 0).all()


def test_nothing_but_pixels_is_read(png: Png) -> None:
    secret = chunk(b"tEXt", b"Patient\x00Jane Doe") + chunk(b"iTXt", b"Name\x00\x00\x00\x00\x00Jane Doe")
    data = png(GRAY)
    told = data[:33] + secret + data[33:]
    packed = [encode(resize(read_gray(source), 16), "png", 95) for source in (data, told)]
    assert packed[0] == packed[1]


VALID = raw_png(4, 4, 8, 0, bytes(20))


def jpeg(image: Image.Image = Image.fromarray(GRAY)) -> bytes:  # noqa: B008
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"patient 17 was away", "not a PNG file"),
        (jpeg(), "not a PNG file"),
        (SIGNATURE, "the file is truncated"),
        (VALID[:40], "the file is truncated"),
        (VALID[:-1], "the file is truncated"),
        (VALID[:-12], "the file is truncated"),
        (VALID[:45] + bytes([VALID[45] ^ 1]) + VALID[46:], "wrong checksum in chunk IDAT"),
        (VALID[:18] + b"\x09" + VALID[19:], "wrong checksum in chunk IHDR"),
        (SIGNATURE + chunk(b"IEND", b""), "pixels do not decode: the header makes no sense"),
        (raw_png(4, 4, 7, 9, bytes(20)), "pixels do not decode: the header makes no sense"),
        (raw_png(0, 4, 8, 0, bytes(20)), "pixels do not decode"),
        (raw_png(4, 4, 8, 0, bytes(9)), "pixels do not decode: image file is truncated"),
        (VALID[:33] + chunk(b"tEXt", b"Jane")[:-1] + b"?" + VALID[33:], "wrong checksum in chunk beside the pixels"),
        (VALID[:33] + VALID[-12:], "pixels do not decode"),
    ],
)
def test_a_bad_file_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{reason}") as error:
        read_gray(data)
    assert " at 0x" not in str(error.value)  # no address of memory: the same file, the same reason


@given(position=st.integers(0, 8 * len(VALID) - 1))
def test_any_flipped_bit_is_noticed(position: int) -> None:
    damaged = bytearray(VALID)
    damaged[position // 8] ^= 1 << position % 8
    with pytest.raises(ValueError, match=r"not a PNG|truncated|checksum|claims"):
        read_gray(bytes(damaged))


@given(
    name=st.sampled_from([b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"tRNS", b"PLTE", b"zTXt", b"iTXt", b"eXIf", b"IHDR"]),
    data=st.binary(max_size=24),
    colour=st.sampled_from([0, 2, 3, 4, 6]),
)
def test_nonsense_with_a_right_checksum_is_read_or_refused_but_never_breaks(
    name: bytes, data: bytes, colour: int
) -> None:
    try:
        gray = read_gray(raw_png(2, 2, 8, colour, bytes(18), chunk(name, data)))
    except ValueError:
        return
    assert gray.dtype == np.uint8 and gray.ndim == 2


@pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (MAX_SIDE + 1, 1), (1, 1 << 26)])
def test_a_bomb_is_refused_by_its_header_without_memory(width: int, height: int) -> None:
    bomb = raw_png(width, height, 8, 0, bytes(1 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"claims {width}x{height} pixels"):
            read_gray(bomb)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_bomb_of_a_hundred_kilobytes_costs_a_process_no_memory(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(raw_png(30_000, 30_000, 8, 0, bytes(109_000_000)))
    assert 100_000 < (tmp_path / "bomb.png").stat().st_size < 120_000
    code = """
import resource, sys
from pathlib import Path
from shards.pixels import open_gray
data = Path(sys.argv[1]).read_bytes()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    open_gray(data)
except ValueError as error:
    print(error, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, sep=";")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "bomb.png"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    reason, grown = done.stdout.split(";")[0], int(done.stdout.rsplit(";", 1)[1])
    assert reason.startswith("claims 30000x30000 pixels") and grown < 1024  # KiB


@pytest.mark.parametrize("side", [17, MAX_SIDE, 65_500])
def test_a_sample_of_another_size_is_refused_by_its_header_without_memory(side: int) -> None:
    data = jpeg()
    forged = data.replace(b"\x08\x00\x14\x00\x1e", b"\x08" + struct.pack(">HH", side, side))
    assert decode_sample(jpeg(Image.fromarray(GRAY[:16, :16])), 16).shape == (16, 16) and forged != data
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"^image does not decode: .*{side}x{side} pixels"):
            decode_sample(forged, 16)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_text_is_not_even_unpacked() -> None:
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200 << 20)))
    data = raw_png(4, 4, 8, 0, bytes(20), text, chunk(b"Jane", b"Doe"), chunk(b"pHYs", b"broken"))
    assert np.array_equal(read_gray(data), np.zeros((4, 4)))


def test_the_largest_allowed_strip_is_packed() -> None:
    strip = read_gray(raw_png(MAX_SIDE, 1, 8, 0, bytes(1 + MAX_SIDE)))
    assert resize(strip, 16).shape == (16, 16)


@given(level=st.integers(0, 255), side=st.integers(1, 40), size=st.integers(1, 40))
def test_a_plain_gray_stays_plain_at_any_size(level: int, side: int, size: int) -> None:
    assert (resize(np.full((side, side), level, dtype=np.uint8), size) == level).all()


def test_an_image_of_the_right_size_is_not_touched() -> None:
    assert np.array_equal(resize(SMOOTH, len(SMOOTH)), SMOOTH)


@pytest.mark.parametrize("filter", get_args(Filter))
def test_resizing_does_not_alias(filter: Filter) -> None:
    checkerboard = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    inner = resize(checkerboard, 16, filter)[2:-2, 2:-2].astype(int)
    assert np.abs(inner - 127).max() <= 8  # every fourth pixel would be all 0 or all 255


@pytest.mark.parametrize("shape", [(10, 30), (30, 10)], ids=["landscape", "portrait"])
def test_an_image_that_is_not_square_is_padded_with_black_on_both_sides(shape: tuple[int, int]) -> None:
    padded = resize(np.full(shape, 200, dtype=np.uint8), 30)
    if shape[0] > shape[1]:
        padded = padded.T
    assert (padded[10:20] == 200).all() and not padded[:10].any() and not padded[20:].any()


def decoded(data: bytes) -> npt.NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "L"
        return np.asarray(image)


def test_png_loses_nothing_and_jpeg_a_few_levels_in_one_channel() -> None:
    assert np.array_equal(decoded(encode(SMOOTH, "png", 1)), SMOOTH)
    error = np.abs(decoded(encode(SMOOTH, "jpeg", 95)).astype(int) - SMOOTH)
    assert error.max() <= 4


def test_a_higher_quality_is_nearer_to_the_pixels_and_larger() -> None:
    files = [encode(GRAY, "jpeg", quality) for quality in (30, 95)]
    errors = [np.abs(decoded(file).astype(int) - GRAY).mean() for file in files]
    assert errors[0] > errors[1] and len(files[0]) < len(files[1])


def test_a_real_image_is_resized_nearer_to_full_lanczos_than_jpeg_is_to_its_input(nih_data: Path) -> None:
    for path in sorted((nih_data / "nih_sample").glob("images_*/images/*.png"))[::12]:
        gray = read_gray(path.read_bytes())
        full = np.asarray(Image.fromarray(gray).resize((224, 224), Image.Resampling.LANCZOS))
        error = np.mean((resize(gray, 224).astype(float) - full) ** 2)
        assert 10 * np.log10(255**2 / error) > psnr(full, encode(full, "jpeg", 95)) - 1


def test_every_real_rgba_file_reads_as_its_red_channel(nih_data: Path) -> None:
    colourful = 0
    for path in sorted((nih_data / "nih_sample").glob("images_*/images/*.png")):
        with Image.open(path) as image:
            if image.mode != "RGBA":
                continue
            colourful += 1
            assert np.array_equal(read_gray(path.read_bytes()), np.asarray(image.getchannel("R")))
    assert colourful == 6
