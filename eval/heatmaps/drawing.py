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

Box = tuple[float, float, float, float]


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
    side = max(SIDE, len(image))
    gray = _enlarged(Image.fromarray(image), side)
    hot = _enlarged(Image.fromarray((heat * 255).round().clip(0, 255).astype(np.uint8)), side)
    colours = _colours()[np.asarray(hot)]
    opacity = hot.point([round(level * _OPACITY) for level in range(256)])
    picture = Image.composite(Image.fromarray(colours), gray.convert("RGB"), opacity)
    _outline(picture, boxes)
    return _png(_captioned(picture, [_decision(finding, probability, threshold), note]))


def _enlarged(image: Image.Image, side: int) -> Image.Image:
    return image if image.size == (side, side) else image.resize((side, side), Image.Resampling.BICUBIC)


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


def _decision(finding: str, probability: float, threshold: float) -> str:
    cut = "no threshold" if math.isnan(threshold) else f"threshold {threshold:.3f}"
    return f"{finding.replace('_', ' ')}: probability {probability:.3f}, {cut}"


def _captioned(picture: Image.Image, lines: Sequence[str]) -> Image.Image:
    lines = [line for line in lines if line]
    line_height = math.ceil(_TEXT * 1.3)
    height = len(lines) * line_height + 2 * _MARGIN
    whole = Image.new("RGB", (picture.width, picture.height + height), (16, 16, 16))
    whole.paste(picture)
    pen = ImageDraw.Draw(whole)
    for number, line in enumerate(lines):
        at = (_MARGIN, picture.height + _MARGIN + number * line_height)
        pen.text(at, line, fill=(240, 240, 240) if number == 0 else (170, 170, 170), font=_font())
    return whole


@functools.cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_TEXT)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()
