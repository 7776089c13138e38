"""Drawn figures: boxes and arrows as SVG, whose text may be in any script that the reader's own fonts have."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

from minillm.show.plot import COLORS

_LINE, _MARGIN = 19, 9  # height of a line and space above the first, in pixels


@dataclass(frozen=True)
class DrawnBox:
    """Where a box stands: its middle and its size, in pixels."""

    x: int | float
    y: int | float
    width: int | float
    height: int | float


class Diagram:
    """Boxes with lines of text, and arrows between them; `done` shows it in a notebook.

    Args:
        width, height: in pixels; the origin is the upper left corner.
    """

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.parts: list[str] = []

    def text(
        self, x: int | float, y: int | float, line: str, *, color: str = "black", bold: bool = False
    ) -> None:
        """One line of text around (x, y)."""
        weight = ' font-weight="bold"' if bold else ""
        place = f'x="{x:g}" y="{y:g}" text-anchor="middle" dominant-baseline="central"'
        self.parts.append(f'<text {place} fill="{COLORS[color]}"{weight}>{escape(line, quote=False)}</text>')

    def box(
        self,
        x: int | float,
        y: int | float,
        title: str,
        *lines: str,
        width: int | float = 170,
        color: str = "blue",
    ) -> DrawnBox:
        """A box around (x, y) with a title, bold where there are more lines below it."""
        box = DrawnBox(x, y, width, _LINE * (1 + len(lines)) + 2 * _MARGIN)
        corner = f'x="{x - width / 2:g}" y="{y - box.height / 2:g}" width="{width:g}" height="{box.height:g}"'
        look = f'rx="6" fill="{COLORS[color]}" fill-opacity="0.09" stroke="{COLORS[color]}"'
        self.parts.append(f"<rect {corner} {look}/>")
        for i, line in enumerate((title, *lines)):
            height = y - box.height / 2 + _MARGIN + _LINE * (i + 0.5)
            self.text(
                x, height, line, color=color if i == 0 and lines else "black", bold=i == 0 and bool(lines)
            )
        return box

    def arrow(self, start: DrawnBox, end: DrawnBox, label: str = "", *, color: str = "grey") -> None:
        """An arrow between the sides of two boxes that face each other, with a label at its middle."""
        (x1, x2), (y1, y2) = (start.x, end.x), (start.y, end.y)
        if abs(x2 - x1) >= (start.width + end.width) / 2:
            way = 1 if x2 > x1 else -1
            x1, x2 = x1 + way * start.width / 2, x2 - way * end.width / 2
        else:
            way = 1 if y2 > y1 else -1
            y1, y2 = y1 + way * start.height / 2, y2 - way * end.height / 2
        line = f'x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"'
        self.parts.append(
            f'<line {line} stroke="{COLORS[color]}" stroke-width="1.5" marker-end="url(#tip)"/>'
        )
        if label:
            self.text((x1 + x2) / 2, (y1 + y2) / 2 - 11, label, color=color)

    def svg(self) -> str:
        """The picture as one SVG element."""
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        tip = f'<path d="M0,0 L9,4 L0,8 z" fill="{COLORS["grey"]}"/>'
        marker = f'<marker id="tip" markerWidth="9" markerHeight="8" refX="9" refY="4" orient="auto" markerUnits="userSpaceOnUse">{tip}</marker>'
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">\n'
            f'<defs>{marker}</defs>\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>'
        )

    def done(self) -> Any:
        """Show the picture."""
        from IPython.display import SVG, display

        display(SVG(self.svg()))
