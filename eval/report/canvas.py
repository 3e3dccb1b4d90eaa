"""Figures and colours that all plots share."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from shards.files import atomic_write

# Seven colours that colour-blind readers tell apart: the palette of Okabe and Ito, "Color Universal
# Design", 2008, without its yellow, which is lost on white. Two line styles make fourteen curves.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLES = ("-", "--")

DOTS_PER_INCH = 150
_COLUMNS = 5  # fourteen findings and a key fill three rows


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches that is drawn without a window."""
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_panels(count: int, title: str) -> tuple[Figure, list[Axes], Axes]:
    """Return a figure of `count` panels in rows of five, and axes without a frame for the key.

    The margins are set here: to find them by measuring every label takes three times as long.
    """
    rows = count // _COLUMNS + 1
    height = 0.75 + 2.3 * rows
    figure = Figure(figsize=(11, height), dpi=DOTS_PER_INCH)
    FigureCanvasAgg(figure)
    figure.suptitle(title, y=1 - 0.08 / height, va="top")
    figure.subplots_adjust(
        left=0.065, right=0.985, bottom=0.55 / height, top=1 - 0.6 / height, wspace=0.22, hspace=0.36
    )
    axes = [figure.add_subplot(rows, _COLUMNS, place) for place in range(1, count + 2)]
    axes[-1].set_axis_off()
    return figure, axes[:-1], axes[-1]


def readable(finding: str) -> str:
    """Return a finding's name as text: Pleural_Thickening with a space."""
    return finding.replace("_", " ")


def write(figure: Figure, path: Path) -> None:
    """Write the PNG `path` atomically. Raises ResourceMissing from the disk."""
    with atomic_write(path) as partial:
        # The fastest compression: the same pixels in a twelfth more bytes.
        figure.savefig(partial, format="png", pil_kwargs={"compress_level": 1})
