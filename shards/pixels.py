"""PNG bytes to gray, to the training size, to the bytes of a sample.

Any PNG mode is taken: 1, 2, 4, 8 and 16 bit gray, gray with alpha, RGB, RGBA, palette.
Sixteen bits are scaled to eight (not cut off), alpha is ignored, colour becomes luma
(ITU-R BT.601), which leaves NIH's RGBA files, whose channels are equal, as they are.
"""

import io
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from shards.png import pixels_only

Gray = npt.NDArray[np.uint8]
Encoding = Literal["jpeg", "png"]
Filter = Literal["lanczos", "bicubic", "hamming", "bilinear", "box"]
SUFFIX: dict[str, str] = {"jpeg": "jpg", "png": "png"}

# Large images are first averaged over whole blocks of pixels, down to no less than 1.5 times the
# target, and only then filtered. On NIH's files at 224 pixels that takes 1.0 ms instead of Lanczos'
# 4.2, from which it differs by 49.7 dB PSNR: less than JPEG 95 does from its input (47.3 dB). With a
# gap of 2 it would be 1.7 ms and 54.0 dB (python -m benchmarks.packing).
REDUCING_GAP = 1.5


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
    """Decode a PNG file to a Pillow image of mode L.

    The header and every chunk's CRC are checked before a pixel is decoded, so a file that
    claims an absurd size costs no memory; of the other chunks only those that decide pixels
    are given to the decoder, so no text in a file is ever read. Raises ValueError with the
    reason for a file that is empty, no PNG, truncated, corrupt or has a side over png.MAX_SIDE.
    """
    try:
        with Image.open(io.BytesIO(pixels_only(data)), formats=["PNG"]) as image:
            image.load()
            image.info.pop("transparency", None)  # ignored as alpha is, and convert() would warn of it
            if image.mode.startswith("I"):
                return Image.fromarray(_scale_16_bit(np.asarray(image)))
            return image if image.mode == "L" else image.convert("L")
    except UnidentifiedImageError as error:
        raise ValueError("pixels do not decode: the header makes no sense") from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"pixels do not decode: {error}") from error


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
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG", "PNG"]) as image:
            gray = np.asarray(image)
        if gray.shape != (size, size):
            raise ValueError(f"{gray.shape} pixels instead of {size} x {size}")
        return gray
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"image does not decode: {error}") from error


def psnr(gray: Gray, encoded: bytes) -> float:
    """Return how near `encoded` decodes to `gray`, as a peak signal-to-noise ratio in dB.

    An image without error counts as if one pixel were off by one level, so the figure is finite.
    """
    error = decode_sample(encoded, len(gray)).astype(np.int64) - gray
    return 10 * math.log10(255**2 * gray.size / max(int((error * error).sum()), 1))


def _scale_16_bit(pixels: npt.NDArray[np.generic]) -> Gray:
    # Rounded to nearest: 65535 becomes 255, 257 becomes 1.
    return ((pixels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
