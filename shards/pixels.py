"""Decode an image to gray, resize it, and encode it for a shard.

Any PNG mode is taken: 1, 2, 4, 8 and 16 bit gray, gray with alpha, RGB, RGBA, palette. Sixteen bits are scaled to
eight (not cut off), alpha is ignored, colour becomes luma (ITU-R BT.601), which leaves NIH's RGBA files, whose
channels are equal, as they are.

Inflating takes half of the time that NIH's files need. ISA-L does it in 1.9 ms, where the zlib in Pillow takes 4.5,
but undoing PNG's row filters is better left to Pillow; so the inflated rows go to it as a stream of stored blocks,
which costs a copy: 7.4 instead of 9.6 ms per file all in all.
"""

import io
import math
import struct
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from isal import igzip_lib, isal_zlib
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

Gray = npt.NDArray[np.uint8]
Encoding = Literal["jpeg", "png"]
Filter = Literal["lanczos", "bicubic", "hamming", "bilinear", "box"]

# Large images are first averaged over whole blocks of pixels, down to no less than 1.5 times the target, and only
# then filtered. On NIH's files at 224 pixels that takes 0.9 ms instead of Lanczos' 4.0, from which it differs by
# 49.6 dB PSNR: less than JPEG 95 does from its input (47.3 dB). With a gap of 2 it would be 1.7 ms and 53.9 dB
# (python -m benchmarks.packing).
REDUCING_GAP = 1.5
# In pixels. NIH's files have 1024, the largest originals about 3056. An image is padded to a square, so this bounds
# the area, too: a strip of 1 x 60,000 would become 3.6 billion pixels.
MAX_SIDE = 8192
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PIXEL_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
# Values a pixel, by PNG's colour type: gray, RGB, palette, gray with alpha, RGBA.
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# In bytes. Larger images are inflated by Pillow piece by piece instead of as a whole.
_MAX_INFLATED = 2**25
_STORED = 65535  # bytes, the most a stored block of a deflate stream can hold
_FEW = np.ones(64, dtype=np.int32)


@dataclass(frozen=True)
class PixelRecipe:
    """How the pixels of every sample are made."""

    size: int = 224
    """Height and width in pixels."""
    encoding: Encoding = "jpeg"
    quality: int = 95
    """Of JPEG, 1 to 100; without effect on png, which is lossless."""
    filter: Filter = "lanczos"
    """The antialiasing filter of the resize."""


def open_gray(data: bytes) -> Image.Image:
    """Decode a PNG file to a Pillow image of mode L; errors are those of `open_png`."""
    return to_gray(open_png(data))


def open_png(data: bytes) -> Image.Image:
    """Decode a PNG file to a Pillow image of the mode that it has.

    The header and every chunk's CRC are checked before a pixel is decoded, and the decoder is given only the chunks
    that decide pixels: no absurd size that a file claims costs memory, and no text in it is ever read. Raises
    ValueError with the reason for a file that is empty, no PNG, truncated, corrupt or has a side over MAX_SIDE.
    """
    return _decode(PngImageFile, pixels_only(data))


def open_jpeg(data: bytes) -> Image.Image:
    """Decode a JPEG file to a Pillow image of mode L.

    Raises ValueError with the reason for a file that is no JPEG, truncated, corrupt or has a side
    over MAX_SIDE, which is checked before a pixel is decoded.
    """
    return to_gray(_decode(JpegImageFile, data))


def to_gray(image: Image.Image) -> Image.Image:
    """Return a decoded image in mode L: 16 bits scaled, alpha ignored, colour as luma."""
    image.info.pop("transparency", None)  # ignored as alpha is, and convert() would warn of it
    if image.mode.startswith("I"):
        return Image.fromarray(_scale_16_bit(np.asarray(image)))
    return image if image.mode == "L" else image.convert("L")


def is_12_bit(image: Image.Image) -> bool:
    """Tell whether a decoded image has 16 bits of which the upper four are nowhere used.

    Detectors and DICOM have 12 bits, 0 to 4095. Stored in 16 without being scaled, they come out of
    `to_gray` as 0 to 16 of 255: nearly black.
    """
    return image.mode.startswith("I") and int(np.asarray(image).max()) < 4096


def resize(gray: Gray | Image.Image, size: int, filter: Filter = "lanczos") -> Gray:
    """Resize to uint8 [size, size] with one of Pillow's filters, all of which antialias.

    An image that is not square is first padded with black to a centred square, so shapes
    keep their aspect; NIH's images are square already.
    """
    image = gray if isinstance(gray, Image.Image) else Image.fromarray(gray)
    width, height = image.size
    if height != width:
        side = max(height, width)
        square = Image.new("L", (side, side))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    if image.size == (size, size):
        return np.asarray(image)
    resampling = Image.Resampling[filter.upper()]
    return np.asarray(image.resize((size, size), resampling, reducing_gap=REDUCING_GAP))


def encode(gray: Gray, encoding: Encoding, quality: int) -> bytes:
    """Encode uint8 [H, W] as a one-channel JPEG of this quality (1 to 100) or a lossless PNG."""
    buffer = io.BytesIO()
    Image.fromarray(gray).save(buffer, encoding, quality=quality)  # which PNG passes over
    return buffer.getvalue()


def decode_sample(data: bytes, size: int) -> Gray:
    """Decode the image of a sample to uint8 [size, size]; raise ValueError where it is none."""
    kind = PngImageFile if data.startswith(_SIGNATURE) else JpegImageFile
    try:
        image = _open(kind, data)
        if (image.mode, image.size) != ("L", (size, size)):
            raise ValueError(f"{image.mode} {image.width}x{image.height} pixels instead of gray {size}x{size}")
        return np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"image does not decode: {error}") from error


def psnr(gray: Gray, encoded: bytes) -> float:
    """Return how near `encoded` decodes to `gray`, as a peak signal-to-noise ratio in dB.

    An image without error counts as if one pixel were off by one level, so the figure is finite.
    """
    error = decode_sample(encoded, len(gray)).astype(np.int64) - gray
    return 10 * math.log10(255**2 * gray.size / max(int((error * error).sum()), 1))


def _decode(kind: type[PngImageFile] | type[JpegImageFile], data: bytes) -> Image.Image:
    try:
        image = _open(kind, data)
        image.load()
        return image
    except (OSError, SyntaxError) as error:
        raise ValueError(f"pixels do not decode: {error}") from error


def _open(kind: type[PngImageFile] | type[JpegImageFile], data: bytes) -> Image.Image:
    # By the format's own class: Image.open warns of large areas or refuses them, and knows no side.
    try:
        image = kind(io.BytesIO(data))
    except (SyntaxError, IndexError, TypeError, struct.error) as error:  # those that Image.open expects
        raise ValueError("pixels do not decode: the header makes no sense") from error
    if max(image.size) > MAX_SIDE:
        raise ValueError(f"claims {image.width}x{image.height} pixels; at most {MAX_SIDE} a side are allowed")
    return image


def _scale_16_bit(pixels: npt.NDArray[np.generic]) -> Gray:
    # Rounded to nearest: 65535 becomes 255, 257 becomes 1. In place, for the largest image has 268 MB here.
    wide = pixels.astype(np.uint32)
    wide *= 255
    wide += 32767
    wide //= 65535
    return wide.astype(np.uint8)


def pixels_only(data: bytes) -> bytes:
    """Return the same image as a PNG file without text, time and other chunks that decide no pixel.

    Every chunk's CRC is checked first, and no more is inflated than _MAX_INFLATED, so a file that claims an absurd
    size costs no memory. Raises ValueError with the reason for a file that is empty, no PNG, truncated or corrupt.
    """
    if not data:
        raise ValueError("the file is empty")
    if not data.startswith(_SIGNATURE):
        raise ValueError("not a PNG file")
    view = memoryview(data)
    kept: list[bytes | memoryview] = [_SIGNATURE]
    stream: list[memoryview] = []
    header = b""
    place, name = len(_SIGNATURE), b""
    while name != b"IEND":
        if place + 12 > len(data):
            raise ValueError("the file is truncated")
        length, name = struct.unpack_from(">I4s", data, place)
        end = place + 8 + length
        if end + 4 > len(data):
            raise ValueError("the file is truncated")
        if isal_zlib.crc32(view[place + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            shown = name.decode() if name in _PIXEL_CHUNKS else "beside the pixels"
            raise ValueError(f"wrong checksum in chunk {shown}")
        if name == b"IHDR":
            header = data[place + 8 : end]
        if name == b"IDAT":
            stream.append(view[place + 8 : end])
        elif name == b"IEND":
            # As one chunk, for the decoder takes and gives up Python's lock once a chunk, which
            # NIH's files have every 8 KiB: 162 instead of 158 images/s with two threads.
            kept += _chunk(b"IDAT", _inflated(b"".join(stream), header)), _chunk(b"IEND", b"")
        elif name in _PIXEL_CHUNKS:
            kept.append(view[place : end + 4])
        place = end + 4
    # ISA-L's checksums leave the upper halves of the vector registers in use, which slows every older SSE instruction
    # of the thread down: Pillow's resize takes 2.1 instead of 0.9 ms. NumPy's loops clear them (vzeroupper).
    np.add(_FEW, _FEW)
    return b"".join(kept)


def _inflated(stream: bytes, header: bytes) -> bytes:
    # The zlib stream of the image's rows as one of stored blocks; the stream as it is where the rows
    # are interlaced, very large or of an unknown kind. Never more than the header claims is inflated.
    size = _rows_size(header)
    if not 0 < size <= _MAX_INFLATED:
        return stream
    try:
        decompressor = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_ZLIB)
        rows = decompressor.decompress(stream, size)
    except isal_zlib.error as error:  # type: ignore[misc]  # the stub says it is an instance
        raise ValueError(f"pixels do not decode: {error}") from error
    if len(rows) < size:
        raise ValueError("pixels do not decode: image file is truncated")
    view = memoryview(rows)
    parts: list[bytes | memoryview] = [b"\x78\x01"]  # deflate with a window of 32 KiB, no dictionary
    for start in range(0, len(rows), _STORED):
        block = view[start : start + _STORED]
        parts += struct.pack("<BHH", start + _STORED >= len(rows), len(block), _STORED - len(block)), block
    return b"".join([*parts, struct.pack(">I", isal_zlib.adler32(rows))])


def _rows_size(header: bytes) -> int:
    # Bytes of all rows, each with its filter byte before it (PNG specification, sections 7.2 and 9.2).
    if len(header) != 13:
        return 0
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    if interlaced or colour not in _CHANNELS:
        return 0
    return int(height * (1 + (width * _CHANNELS[colour] * depth + 7) // 8))


def _chunk(name: bytes, content: bytes) -> bytes:
    checksum = isal_zlib.crc32(content, isal_zlib.crc32(name))
    return b"".join([struct.pack(">I", len(content)), name, content, struct.pack(">I", checksum)])
