"""Decode an image to gray, resize it, and encode it for a shard.

Any PNG mode is taken: 1, 2, 4, 8 and 16 bit gray, gray with alpha, RGB, RGBA, palette.
Sixteen bits are scaled to eight (not cut off), alpha is ignored, colour becomes luma
(ITU-R BT.601), which leaves NIH's RGBA files, whose channels are equal, as they are.
"""

import io
import math
import struct
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from shards.png import SIGNATURE, pixels_only

Gray = npt.NDArray[np.uint8]
Encoding = Literal["jpeg", "png"]
Filter = Literal["lanczos", "bicubic", "hamming", "bilinear", "box"]
SUFFIX: dict[str, str] = {"jpeg": "jpg", "png": "png"}

# Large images are first averaged over whole blocks of pixels, down to no less than 1.5 times the
# target, and only then filtered. On NIH's files at 224 pixels that takes 1.0 ms instead of Lanczos'
# 4.2, from which it differs by 49.7 dB PSNR: less than JPEG 95 does from its input (47.3 dB). With a
# gap of 2 it would be 1.7 ms and 54.0 dB (python -m benchmarks.packing).
REDUCING_GAP = 1.5

# In pixels. NIH's files have 1024, the largest originals about 3056. An image is padded to a square,
# so this bounds the area, too: a strip of 1 x 60,000 would become 3.6 billion pixels.
MAX_SIDE = 8192


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

    The header and every chunk's CRC are checked before a pixel is decoded, so a file that
    claims an absurd size costs no memory; of the other chunks only those that decide pixels
    are given to the decoder, so no text in a file is ever read. Raises ValueError with the
    reason for a file that is empty, no PNG, truncated, corrupt or has a side over MAX_SIDE.
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
    if encoding == "jpeg":
        Image.fromarray(gray).save(buffer, "JPEG", quality=quality)
    else:
        Image.fromarray(gray).save(buffer, "PNG")
    return buffer.getvalue()


def decode_sample(data: bytes, size: int) -> Gray:
    """Decode the image of a sample to uint8 [size, size]; raise ValueError where it is none."""
    kind = PngImageFile if data.startswith(SIGNATURE) else JpegImageFile
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
