"""The book's site is complete, and needs nothing from outside. Links inside a built site are followed if there is one."""

import importlib.util
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[1]
BOOK, SITE = ROOT / "book", ROOT / "book" / "_build" / "html"

spec = importlib.util.spec_from_file_location("site_extension", BOOK / "site_extension.py")
site = sys.modules["site_extension"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site)

CONTENTS = site.contents()
WRITTEN = [chapter for chapter in CONTENTS if chapter.written]


def prose(chapter):
    return "\n".join(site.text_of(cell) for cell in chapter.cells if cell["cell_type"] == "markdown")


def page(name):
    return (BOOK / f"{name}.md").read_text(encoding="utf-8")


# ---- the table of contents


def test_every_notebook_is_in_the_contents():
    assert {path.stem for path in (ROOT / "chapters").glob("*.ipynb")} <= {
        chapter.name for chapter in CONTENTS
    }


def test_chapters_are_numbered_in_order():
    assert [int(chapter.name[:2]) for chapter in CONTENTS] == list(range(len(CONTENTS)))


@pytest.mark.parametrize("chapter", WRITTEN, ids=lambda chapter: chapter.name)
def test_a_chapter_begins_with_its_number_and_exports_its_slug(chapter):
    assert chapter.title.startswith(f"{chapter.name[:2]} · ")
    if chapter.module:
        assert site.text_of(chapter.cells[0]).strip() == f"#| default_exp {chapter.slug}"
    titles = re.findall(r"^# .*", prose(chapter), re.M)
    assert len(titles) == 1, f"one title, not {titles}"


@pytest.mark.parametrize("chapter", WRITTEN, ids=lambda chapter: chapter.name)
def test_chapters_link_to_chapters_that_are_planned(chapter):
    names = {chapter.name for chapter in CONTENTS}
    assert set(re.findall(r"\]\((?:[^)\s]*/)?(\w+)\.ipynb", prose(chapter))) <= names


@pytest.mark.parametrize(
    "path", [*(c.path for c in WRITTEN), *ROOT.glob("*.md"), *BOOK.glob("*.md")], ids=lambda p: p.stem
)
def test_a_link_that_names_a_number_leads_to_that_chapter(path):
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\[(?:[Cc]hapter )?(\d\d)(?: \w+)?\]\([^)\s]*?(\d\d)_\w+\.ipynb", text)
    assert [link for link in links if link[0] != link[1]] == []


def test_the_map_links_what_is_written_and_only_that():
    text = site.map_markdown(CONTENTS)
    assert set(re.findall(r"\(chapters/(\w+)\.ipynb\)", text)) == {chapter.name for chapter in WRITTEN}
    assert set(re.findall(r" <chapters/(\w+)>$", text, re.M)) == {chapter.name for chapter in WRITTEN}
    for chapter in CONTENTS:
        assert chapter.builds in text


# ---- papers and words


def test_every_paper_that_is_cited_is_in_the_references():
    listed = re.findall(r"arXiv:(\d{4}\.\d{4,5})", page("references"))
    assert len(listed) == len(set(listed))
    sources = [*(ROOT / "minillm").rglob("*.py"), *(chapter.path for chapter in WRITTEN)]
    missing = {
        number: source.name
        for source in sources
        for number in re.findall(r"arXiv:(\d{4}\.\d{4,5})", source.read_text(encoding="utf-8"))
        if number not in listed
    }
    assert not missing, f"add to book/references.md: {missing}"


def test_the_glossary_is_in_order_and_every_word_has_its_chapter():
    entries = re.findall(
        r"^(\S[^\n]*)\n((?:  \S[^\n]*\n|\n(?=  ))+)", page("glossary").partition("{glossary}")[2], re.M
    )
    words = [word for word, _ in entries]
    assert len(words) > 40
    assert words == sorted(set(words), key=str.lower)
    names = {chapter.name for chapter in CONTENTS}
    for word, text in entries:
        assert set(re.findall(r"\(chapters/(\w+)\.ipynb\)", text)) & names, f"{word} has no chapter"


def test_the_notation_is_taken_from_chapter_00():
    chapter = CONTENTS[0]
    if not chapter.written:
        pytest.skip("chapter 00 is not written yet")
    text = site.notation_markdown(CONTENTS)
    for letter in ("B", "T", "S", "D", "H", "K", "F", "V"):
        assert re.search(rf"\|\s*[$`*]*{letter}[$`*]*\s*\|", text), f"no row for {letter}"


# ---- what the extension does


def test_links_to_what_has_no_page_become_text():
    missing = site.Chapter(name="99_later", part="", builds="")
    present = WRITTEN[0]
    chapters = [missing, present]
    mend = lambda text: site.mend_links(text, chapters, "../")  # noqa: E731
    assert mend("see [chapter 99](99_later.ipynb#why).") == "see chapter 99."
    assert mend(f"see [it]({present.name}.ipynb#why).") == f"see [it]({present.name}.ipynb#why)."
    assert mend("the [module](../minillm/norm.py)") == "the [module](../api/norm.md)"
    assert mend("the [tests](../tests/test_norm.py)") == "the tests"
    assert mend("```\n[x](99_later.ipynb)\n```") == "```\n[x](99_later.ipynb)\n```"
    assert mend("[paper](https://arxiv.org/abs/1)") == "[paper](https://arxiv.org/abs/1)"


def test_papers_become_links_outside_code_and_links():
    link = "[arXiv:1910.07467](https://arxiv.org/abs/1910.07467)"
    assert site.link_papers("see arXiv:1910.07467.") == f"see {link}."
    assert site.link_papers(link) == link
    assert site.link_papers("`arXiv:1910.07467`") == "`arXiv:1910.07467`"


def test_directives_for_tools_do_not_reach_the_page():
    cells = [
        {"cell_type": "code", "source": "#| default_exp norm", "metadata": {}, "outputs": []},
        {"cell_type": "markdown", "source": "# 05 · Norm", "metadata": {}},
        {"cell_type": "code", "source": "#| export\ndef f(x):\n    return x", "metadata": {}, "outputs": []},
        {"cell_type": "code", "source": "# NBVAL_IGNORE_OUTPUT\nf(1)", "metadata": {}, "outputs": []},
    ]
    shown = json.loads(site.notebook_page(json.dumps({"cells": cells}), CONTENTS))["cells"]
    assert [cell["source"] for cell in shown] == ["# 05 · Norm", "def f(x):\n    return x", "f(1)"]
    assert shown[1]["metadata"]["exports"] == ["f"]
    assert "exports" not in shown[2]["metadata"]


def test_a_figure_is_described_by_its_title_and_axes():
    cell = 'fig, ax = plot.figure("Loss", x="step", y="loss (nats)")\nplot.done(fig)'
    assert site.alternative_text(cell) == "Figure: Loss, horizontal axis step, vertical axis loss (nats)"
    bars = 'fig, ax = plot.figure("Time", x="step (ms)", y="")'
    assert site.alternative_text(bars) == "Figure: Time, horizontal axis step (ms)"


def test_signatures_are_shown_as_they_are_written():
    def f(x: 'Float[Tensor, "B T D"]', *rest: int, eps: float = 1e-5, **more) -> 'Float[Tensor, "B T"]':
        return x

    text, returns = site.written_signature(None, "function", "f", f, {}, None, None)
    assert text == "(x: 'Float[Tensor, \"B T D\"]', *rest: int, eps: float = 1e-5, **more)"
    assert returns == "'Float[Tensor, \"B T\"]'"


def test_docstrings_are_plain_text():
    lines = [
        "The *normed* x_ of a*b|c, `a*b`.",
        "",
        "Seen:",
        "",
        "    # . *",
        "    # # .",
        "",
        "Args:",
        "    x_: arXiv:1910.07467.",
    ]
    site.plain_docstring(None, "function", "f", None, None, lines)
    assert lines[0] == r"The *normed* x\_ of a\*b\|c, ``a*b``."
    assert lines[4:8] == [".. code-block:: text", "", "    # . *", "    # # ."]
    assert lines[9:] == ["Args:", r"    x\_: `arXiv:1910.07467 <https://arxiv.org/abs/1910.07467>`__."]


# ---- the built site, if there is one


class Page(HTMLParser):
    """What a page refers to, loads and shows."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loaded, self.silent_images = set(), set(), set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        if tag == "a" and attrs.get("href"):
            self.links.add(attrs["href"])
        if tag in ("script", "img", "iframe", "source", "video", "audio") and attrs.get("src"):
            self.loaded.add(attrs["src"])
        if tag == "link" and attrs.get("rel") not in ("canonical", "license"):
            self.loaded.add(attrs.get("href", ""))
        if tag == "img" and not attrs.get("alt"):
            self.silent_images.append(attrs.get("src"))


@pytest.fixture(scope="module")
def pages():
    if not (SITE / "index.html").exists():
        pytest.skip("the book is not built: make book")
    return {path: Page(path) for path in SITE.rglob("*.html") if "_static" not in path.parts}


def test_pages_load_nothing_from_outside(pages):
    outside = {src for page in pages.values() for src in page.loaded if re.match(r"(https?:)?//", src)}
    styles = {
        path.name
        for path in SITE.rglob("*.css")
        if re.search(r"(@import|url\()\s*['\"]?(https?:)?//", path.read_text())
    }
    assert not outside
    assert not styles


def test_every_link_and_file_inside_the_site_is_there(pages):
    broken = []
    for path, page in pages.items():
        for target in page.links | page.loaded:
            if re.match(r"\w+:|//", target):
                continue
            name, _, anchor = unquote(target).partition("#")
            name = name.partition("?")[0]
            file = (path.parent / name).resolve() if name else path
            if not file.exists():
                broken.append(f"{path.relative_to(SITE)} -> {target}")
            elif anchor and file in pages and anchor not in pages[file].ids:
                broken.append(f"{path.relative_to(SITE)} -> {target} (no such place)")
    assert not broken, "\n".join(sorted(broken)[:20])


def test_every_image_is_described(pages):
    assert not {src for page in pages.values() for src in page.silent_images}
