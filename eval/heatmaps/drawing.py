"""Draw one heat map over its image, with boxes and a caption."""

import functools
import io
import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont

SIDE = 448  # pixels a side that a smaller image is enlarged to: twice the 224 of most
_OPACITY = 0.55  # where a map is 1; less lets the map be missed, more hides what it lies on
_BOX_COLOUR = (90, 255, 120)
_TEXT = 17  # pixels
_MARGIN = 6


def draw_heat_map(
    image: npt.NDArray[np.uint8],
    heat: npt.NDArray[np.float32],
    *,
    finding: str,
    probability: float,
    threshold: float,
    boxes: Iterable[Sequence[float]] = (),
    note: str = "",
) -> bytes:
    """Return a PNG of the gray image with the map over it, and a caption under it. Takes 25 ms of one core.

    The colour goes from black over red to yellow with the map and is the more opaque the hotter; where
    the map is 0 the image is untouched.

    Args:
        image: uint8 [S, S], enlarged to SIDE where it is smaller.
        heat: float [S, S], 0..1.
        finding: named in the caption, with spaces for underscores.
        probability: 0..1, as the threshold is compared with it.
        threshold: 0..1; NaN says that there is none.
        boxes: x, y of the upper left corner, width and height as shares 0..1 of the image.
        note: a second line of the caption, such as the image's name.
    """
    size = (max(SIDE, len(image)),) * 2
    levels = (heat * 255).round().clip(0, 255).astype(np.uint8)
    gray, hot = (Image.fromarray(each).resize(size, Image.Resampling.BICUBIC) for each in (image, levels))
    colours = _colours()[np.asarray(hot)]
    opacity = hot.point([round(level * _OPACITY) for level in range(256)])
    picture = Image.composite(Image.fromarray(colours), gray.convert("RGB"), opacity)
    _outline(picture, boxes)
    cut = "no threshold" if math.isnan(threshold) else f"threshold {threshold:.3f}"
    caption = [f"{finding.replace('_', ' ')}: probability {probability:.3f}, {cut}", *([note] if note else [])]
    buffer = io.BytesIO()
    _captioned(picture, caption).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


@functools.cache
def _colours() -> npt.NDArray[np.uint8]:
    # Evenly rising lightness, so that it also reads in a gray print.
    levels = colormaps["inferno"](np.linspace(0.25, 1, 256))[:, :3]
    return np.asarray((levels * 255).round().astype(np.uint8))


def _outline(picture: Image.Image, boxes: Iterable[Sequence[float]]) -> None:
    pen = ImageDraw.Draw(picture)
    side = picture.width
    for x, y, width, height in boxes:
        corners = [side * x, side * y, side * (x + width) - 1, side * (y + height) - 1]
        # A dark line inside the bright one: seen on white bone and on black air.
        pen.rectangle([min(max(corner, 0), side - 1) for corner in corners], outline=_BOX_COLOUR, width=2)
        inner = [corners[0] + 2, corners[1] + 2, corners[2] - 2, corners[3] - 2]
        if inner[2] > inner[0] and inner[3] > inner[1]:
            pen.rectangle(inner, outline=(0, 0, 0), width=1)


def _captioned(picture: Image.Image, lines: Sequence[str]) -> Image.Image:
    line_height = math.ceil(_TEXT * 1.3)
    height = len(lines) * line_height + 2 * _MARGIN
    canvas = Image.new("RGB", (picture.width, picture.height + height), (16, 16, 16))
    canvas.paste(picture)
    pen = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        at = (_MARGIN, picture.height + _MARGIN + number * line_height)
        pen.text(at, line, fill=(240, 240, 240) if number == 0 else (170, 170, 170), font=_font())
    return canvas


@functools.cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_TEXT)
