"""How often each finding is shown in each split."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from eval.plots.canvas import COLOURS, new_figure, readable, write


def draw_prevalence(
    prevalence: Mapping[str, Sequence[float | None]],
    images: Mapping[str, int],
    findings: Sequence[str],
    title: str,
    path: Path,
) -> Figure:
    """Write a line a finding with a dot per split to the PNG `path`; return the figure.

    `prevalence` gives each split's shares 0..1 in the order of `findings`; `images` its size, for
    the legend. A split without images has no dots. The file appears whole or not at all.
    """
    figure = new_figure(9, 1.2 + 0.28 * len(findings))
    axes = figure.add_subplot()
    axes.set_title(title)
    for number, (split, shares) in enumerate(prevalence.items()):
        known = [(share, place) for place, share in enumerate(shares) if share is not None]
        axes.scatter(
            [100 * share for share, _ in known],
            [place for _, place in known],
            color=COLOURS[number],
            marker="osD^v"[number % 5],
            s=38,
            alpha=0.8,
            label=f"{split}  ({images[split]:,})",
        )
    axes.set_yticks(range(len(findings)), [readable(finding) for finding in findings], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("Images that show the finding, %")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside right upper", fontsize=9, title="Split  (images)")
    write(figure, path)
    return figure
