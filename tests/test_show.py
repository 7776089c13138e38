"""Figures: drawn diagrams."""

import xml.etree.ElementTree as ElementTree

import pytest

from minillm.show.diagram import Diagram

SVG = "{http://www.w3.org/2000/svg}"


def lines_of(picture):
    tree = ElementTree.fromstring(picture.svg())
    return [[float(line.get(k)) for k in ("x1", "y1", "x2", "y2")] for line in tree.iter(SVG + "line")]


def test_a_diagram_is_one_svg_with_its_text_as_text():
    picture = Diagram(300, 200)
    picture.box(80, 60, "title", "第一行", 'a < b & "c"')
    tree = ElementTree.fromstring(picture.svg())
    assert (tree.get("width"), tree.get("height")) == ("300", "200")
    assert [text.text for text in tree.iter(SVG + "text")] == ["title", "第一行", 'a < b & "c"']


@pytest.mark.parametrize(
    ("to", "line"),
    [
        ((300, 100), [150, 100, 250, 100]),  # beside it: from side to side
        ((0, 150), [50, 100, 50, 150]),  # edges that touch count as beside
        ((100, 300), [100, 118.5, 100, 281.5]),  # below it: from edge to edge
        ((120, 0), [100, 81.5, 120, 18.5]),
    ],
)
def test_an_arrow_runs_between_the_sides_that_face_each_other(to, line):
    picture = Diagram(400, 400)
    start, end = picture.box(100, 100, "from", width=100), picture.box(*to, "to", width=100)
    picture.arrow(start, end, "label")
    assert lines_of(picture) == [line]
