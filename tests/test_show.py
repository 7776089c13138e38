"""Figures: drawn diagrams."""

import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from minillm.show import plot, run
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


def test_a_report_escapes_what_it_shows_and_stands_alone(tmp_path):
    metrics = [
        {"step": i, "tokens": 10 * i, "loss_nats": 5 / i, "lr": 1e-3, "tokens_per_s": 9.0}
        for i in range(1, 4)
    ]
    run.write_report(
        tmp_path / "r.html",
        title="<b>",
        summary=[("a", "1 < 2")],
        scores=[{"name": "s", "n": 4, "correct": 1, "accuracy": 0.25}],
        samples=[("what", "<script>alert(1)</script>", "从前")],
        metrics=metrics,
        stages=[("corpus", "x", 1.0)],
        config={"k": "</pre>"},
        machine={"cpu": "c"},
    )
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "1 of 4" in page
    assert "从前" in page


def test_labels_of_lines_do_not_touch():
    fig, ax = plot.figure("t", x="x (m)", y="y (m)")
    for i in range(3):
        ax.plot([0, 1], [0, 1 + 1e-3 * i], label=str(i))
    plot.label_lines(ax, min_gap=11.0)
    heights = sorted(text.xyann[1] + ax.transData.transform(text.xy)[1] * 72 / fig.dpi for text in ax.texts)
    assert all(b - a > 10.9 for a, b in pairwise(heights))
    assert plot.svg(fig).startswith("<svg")
