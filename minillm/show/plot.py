"""The book's figures, in one style: sizes, colours, units on the axes, labels at the lines."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with any colour vision, and in grey. https://jfly.uni-koeln.de/color/
COLORS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "red": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "yellow": "#F0E442",
    "grey": "#7F7F7F",
    "black": "#222222",
}

CYCLE = [COLORS[name] for name in ("blue", "orange", "green", "red", "purple", "sky", "grey", "black")]

_STYLE: Any = {
    "figure.dpi": 110,
    "savefig.dpi": 110,
    "savefig.bbox": "tight",
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "minillm",
}


def panels(
    *titles: str,
    x: str | list[str],
    y: str | list[str],
    width: float = 7.0,
    height: float = 3.4,
    share_y: bool = False,
) -> tuple[Figure, list[Axes]]:
    """One row of axes, a title each. `x` and `y` are axis labels with their unit, one for all or one each."""
    import matplotlib.pyplot as plt
    from cycler import cycler

    with plt.rc_context({**_STYLE, "axes.prop_cycle": cycler(color=CYCLE)}):
        fig, grid = plt.subplots(
            1, len(titles), figsize=(width, height), squeeze=False, sharey=share_y, layout="constrained"
        )
        axes = list(grid[0])
        for index, (ax, title) in enumerate(zip(axes, titles)):
            ax.set_title(title)
            ax.set_xlabel(x if isinstance(x, str) else x[index])
            if not share_y or index == 0:
                ax.set_ylabel(y if isinstance(y, str) else y[index])
    return fig, axes


def figure(title: str, *, x: str, y: str, width: float = 6.0, height: float = 3.4) -> tuple[Figure, Axes]:
    """One set of axes. `x` and `y` are labels with their unit: "length (tokens)"."""
    fig, axes = panels(title, x=x, y=y, width=width, height=height)
    return fig, axes[0]


def label_lines(ax: Axes, *, pad: float = 4.0, min_gap: float = 11.0) -> None:
    """Write each line's label beside its last point, in its colour, moved apart where they would touch.

    Args:
        ax: axes whose lines have labels; call it after limits and scales are set.
        pad: space between line and text, in points.
        min_gap: least vertical distance between two labels, in points.
    """
    ax.figure.draw_without_rendering()  # type: ignore[union-attr]
    scale = 72.0 / ax.figure.dpi
    placed: list[tuple[float, tuple[float, float], Any]] = []
    for line in ax.get_lines():
        points = np.asarray(line.get_xydata(), dtype=float)
        if len(points) and not str(line.get_label()).startswith("_"):
            end = (points[-1, 0], points[-1, 1])
            placed.append((float(ax.transData.transform(end)[1]) * scale, end, line))
    last = -1e9
    for height, end, line in sorted(placed, key=lambda item: item[0]):
        target = max(height, last + min_gap)
        ax.annotate(
            str(line.get_label()),
            end,
            xytext=(pad, target - height),
            textcoords="offset points",
            va="center",
            color=line.get_color(),
            fontsize=9,
            annotation_clip=False,
        )
        last = target


def done(fig: Figure) -> None:
    """Show a finished figure in a notebook and close it, so that a cell stores the picture and nothing else."""
    import matplotlib.pyplot as plt

    try:
        from IPython.display import Image, display

        buffer = io.BytesIO()
        with plt.rc_context(_STYLE):
            fig.savefig(buffer, format="png", metadata={"Software": None})
        display(Image(buffer.getvalue(), format="png", width=round(fig.get_figwidth() * 110)))
    except ImportError:  # a script without IPython
        plt.show()
    plt.close(fig)


def svg(fig: Figure) -> str:
    """The figure as an SVG element, to stand inside an HTML page; closes the figure."""
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    with plt.rc_context(_STYLE):
        fig.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(fig)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
