"""PNG bytes to gray, to the training size, to the bytes of a sample.

Any PNG mode is taken: 1, 2, 4, 8 and 16 bit gray, gray with alpha, RGB, RGBA, palette.
Sixteen bits are scaled to eight (not cut off), alpha is ignored, colour becomes luma
(ITU-R BT.601), which leaves NIH's RGBA files, whose channels are equal, as they are.
"""

import io
import struct
import zlib
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

Gray = npt.NDArray[np.uint8]
Encoding = Literal["jpeg", "png"]
SUFFIX: dict[str, str] = {"jpeg": "jpg", "png": "png"}

# In pixels. NIH's files have 1024, the largest originals about 3056. A limit of the side, not of
# the area: a strip of 1 x 2**26 would become a square of 2**52.
MAX_SIDE = 8192
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def read_gray(data: bytes) -> Gray:
    """Decode a PNG file to uint8 gray of shape [height, width].

    The header and every chunk's CRC are checked before a pixel is decoded, so a file that
    claims an absurd size costs no memory. Raises ValueError with the reason for a file that
    is empty, no PNG, truncated, corrupt or has a side over MAX_SIDE.
    """
    _check_chunks(data)
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.load()
            image.info.pop("transparency", None)  # ignored as alpha is, and convert() would warn of it
            if image.mode.startswith("I"):
                return _scale_16_bit(np.asarray(image))
            return np.asarray(image if image.mode == "L" else image.convert("L"), dtype=np.uint8)
    except UnidentifiedImageError as error:
        raise ValueError("pixels do not decode: the header makes no sense") from error
    except (OSError, SyntaxError, ValueError, zlib.error) as error:
        raise ValueError(f"pixels do not decode: {error}") from error


def resize(gray: Gray, size: int) -> Gray:
    """Resize to uint8 [size, size] with Pillow's Lanczos filter, which antialiases.

    An image that is not square is first padded with black to a centred square, so shapes
    keep their aspect; NIH's images are square already.
    """
    height, width = gray.shape
    if height != width:
        side = max(height, width)
        square = np.zeros((side, side), dtype=np.uint8)
        top, left = (side - height) // 2, (side - width) // 2
        square[top : top + height, left : left + width] = gray
        gray = square
    if gray.shape == (size, size):
        return gray
    return np.asarray(Image.fromarray(gray).resize((size, size), Image.Resampling.LANCZOS))


def encode(gray: Gray, encoding: Encoding, quality: int) -> bytes:
    """Encode uint8 [H, W] as a one-channel JPEG of this quality (1 to 100) or a lossless PNG."""
    buffer = io.BytesIO()
    if encoding == "jpeg":
        Image.fromarray(gray).save(buffer, "JPEG", quality=quality)
    else:
        Image.fromarray(gray).save(buffer, "PNG")
    return buffer.getvalue()


def decode_sample(data: bytes) -> Gray:
    """Decode the image of a sample to uint8 [S, S]; raise ValueError where it does not decode."""
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG", "PNG"]) as image:
            return np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"image does not decode: {error}") from error


def _check_chunks(data: bytes) -> None:
    if not data:
        raise ValueError("the file is empty")
    if not data.startswith(_SIGNATURE):
        raise ValueError("not a PNG file")
    place, name = len(_SIGNATURE), b""
    while name != b"IEND":
        if place + 12 > len(data):
            raise ValueError("the file is truncated")
        (length,) = struct.unpack_from(">I", data, place)
        name = data[place + 4 : place + 8]
        end = place + 8 + length
        if end + 4 > len(data):
            raise ValueError("the file is truncated")
        if zlib.crc32(memoryview(data)[place + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise ValueError(f"wrong checksum in chunk {name.decode('ascii', 'replace')}")
        if name == b"IHDR" and length >= 8:
            width, height = struct.unpack_from(">II", data, place + 8)
            if max(width, height) > MAX_SIDE:
                raise ValueError(f"claims {width}x{height} pixels; at most {MAX_SIDE} a side are allowed")
        place = end + 4


def _scale_16_bit(pixels: npt.NDArray[np.generic]) -> Gray:
    # Rounded to nearest: 65535 becomes 255, 257 becomes 1.
    return ((pixels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
