"""What the book's site needs beyond Sphinx and MyST-NB.

- `book/chapters` becomes a copy of `chapters/`.
- `contents.toml` becomes the navigation and the map; links to chapters that are not written yet become plain text.
- Export and test directives leave the code cells; an exported cell says where it went, a figure gets a description.
- One API page is written per module. Its entries link to the chapter's cell that defines them, and back.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import json
import os
import re
import shutil
import textwrap
import tomllib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

BOOK = Path(__file__).resolve().parent
ROOT = BOOK.parent
CHAPTERS = ROOT / "chapters"
MIRROR = BOOK / "chapters"
PACKAGE = ROOT / "minillm"

ARXIV = re.compile(r"(?<![\w/\[.])arXiv:(\d{4}\.\d{4,5})(?!\d*\])")
FOR_TOOLS = re.compile(r" *# (fmt: (skip|off|on)|noqa\b.*|type: ignore.*)$", re.M)
SECTION = re.compile(
    r"(Args|Attributes|Examples?|Notes?|Raises|Returns|Sources?|Warns|Yields):\s*$|- |\d+\. "
)
LINK = re.compile(r"(?<!!)\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<target>[^()\s]+)\)")


# ---- the table of contents ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chapter:
    """One line of contents.toml."""

    name: str
    part: str
    builds: str
    module: bool = True

    @property
    def slug(self) -> str:
        return self.name.partition("_")[2]

    @property
    def path(self) -> Path:
        return CHAPTERS / f"{self.name}.ipynb"

    @property
    def written(self) -> bool:
        return self.path.exists()

    @functools.cached_property
    def cells(self) -> list[dict[str, Any]]:
        return json.loads(self.path.read_text(encoding="utf-8"))["cells"] if self.written else []

    @property
    def title(self) -> str:
        """The notebook's first heading, or number and slug."""
        for cell in self.cells:
            found = re.search(r"^# (.+)$", text_of(cell), re.M) if cell["cell_type"] == "markdown" else None
            if found:
                return found[1].strip()
        return f"{self.name[:2]} · {self.slug}"

    @property
    def short_title(self) -> str:
        return re.split(r": | — ", self.title)[0]


def contents() -> list[Chapter]:
    """Every planned chapter, in order."""
    table = tomllib.loads((BOOK / "contents.toml").read_text(encoding="utf-8"))
    return [Chapter(part=part["title"], **entry) for part in table["part"] for entry in part["chapter"]]


def text_of(cell: dict[str, Any]) -> str:
    return cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])


def map_markdown(chapters: list[Chapter]) -> str:
    """The map: a table per part, and behind it the navigation."""
    lines = [":::{container} map", "| chapter | module | what it builds |", "|---|---|---|"]
    for part in dict.fromkeys(chapter.part for chapter in chapters):
        lines.append(f"| **{part}** | | |")
        for chapter in (chapter for chapter in chapters if chapter.part == part):
            link = f"[{chapter.short_title}](chapters/{chapter.name}.ipynb)"
            module = f"`minillm.{chapter.slug}`" if chapter.module else "–"
            if chapter.module and (PACKAGE / f"{chapter.slug}.py").exists():
                module = f"[{module}](api/{chapter.slug}.md)"
            lines.append(
                f"| {link if chapter.written else chapter.short_title + ' *(to come)*'} | {module} | {chapter.builds} |"
            )
    lines.append(":::")
    for part in dict.fromkeys(chapter.part for chapter in chapters):
        written = [
            f"{chapter.short_title} <chapters/{chapter.name}>"
            for chapter in chapters
            if chapter.part == part and chapter.written
        ]
        if written:
            lines += ["", "```{toctree}", ":hidden:", f":caption: {part}", "", *written, "```"]
    return "\n".join(lines)


def notation_markdown(chapters: list[Chapter]) -> str:
    """The notation section of chapter 00, so that it is written once."""
    prose = "\n\n".join(text_of(cell) for cell in chapters[0].cells if cell["cell_type"] == "markdown")
    found = re.search(r"^## Notation\n(.*?)(?=^## |\Z)", prose, re.S | re.M)
    if not found:
        return "The notation is defined in [chapter 00](chapters/00_evolution.ipynb)."
    paragraphs = found[1].strip().split("\n\n")
    return "\n\n".join(text for text in paragraphs if not (text is paragraphs[-1] and text.endswith(":")))


def citations(chapters: list[Chapter]) -> dict[str, list[Chapter]]:
    """arXiv number -> the chapters that cite it."""
    found: dict[str, list[Chapter]] = {}
    for chapter in chapters:
        text = "\n".join(text_of(cell) for cell in chapter.cells)
        for number in dict.fromkeys(re.findall(r"(?:arXiv:|arxiv\.org/abs/)(\d{4}\.\d{4,5})", text)):
            found.setdefault(number, []).append(chapter)
    return found


# ---- pages as they are read -----------------------------------------------------------------------------------------


def mend_links(text: str, chapters: list[Chapter], depth: str) -> str:
    """Make links lead somewhere: unwritten chapters lose theirs, files of the repository lead to their page here.

    Args:
        text: markdown.
        chapters: the table of contents.
        depth: "" for a page in book/, "../" for one in a folder below it.
    """
    by_name = {chapter.name: chapter for chapter in chapters}

    def mend(match: re.Match[str]) -> str:
        label, target = match["text"], match["target"]
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:|#", target):
            return match[0]
        stem = Path(path).stem
        if path.endswith(".ipynb") and stem in by_name:
            return match[0] if by_name[stem].written else label
        module = re.fullmatch(r"(?:\.\./)*minillm/(\w+)\.py", path)
        if module and (PACKAGE / f"{module[1]}.py").exists():
            return f"[{label}]({depth}api/{module[1]}.md{'#' + anchor if anchor else ''})"
        page = re.fullmatch(r"(?:\.\./)*book/(\w+\.md)", path)
        if page and (BOOK / page[1]).exists():
            return f"[{label}]({depth}{page[1]})"
        if depth and path.startswith("../") and not (BOOK / path.removeprefix("../")).exists():
            return label  # a file of the repository that has no page
        return match[0]

    pieces = re.split(r"(```.*?```|`[^`\n]*`)", text, flags=re.S)  # code is left alone
    return "".join(piece if piece.startswith("`") else LINK.sub(mend, piece) for piece in rejoin(pieces))


def rejoin(pieces: list[str]) -> Iterator[str]:
    """Put inline code inside a link's text back into one piece with its link."""
    joined = ""
    for piece in pieces:
        if piece.startswith("```"):
            yield joined
            yield piece
            joined = ""
        else:
            joined += piece
    yield joined


def link_papers(text: str) -> str:
    """arXiv:1910.07467 -> a link, outside code and outside links."""
    pieces = re.split(r"(```.*?```|`[^`\n]*`|\[[^\]]*\]\([^)]*\)|<[^>\s]+>)", text, flags=re.S)
    return "".join(
        piece if index % 2 else ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", piece)
        for index, piece in enumerate(pieces)
    )


def unbroken(row: re.Match[str]) -> str:
    """A table row whose numbers do not break at a hyphen: 1e-5 on one line."""
    return re.sub(r"(?<=\de)-(?=\d)", "\N{NON-BREAKING HYPHEN}", row[0])


def defined_names(source: str) -> list[str]:
    """The names that an exported cell defines."""
    names: list[str] = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    return [name for name in names if not name.startswith("__")]


def only(source: str, *kinds: type[ast.stmt]) -> bool:
    """Is this a long cell of nothing but such statements?"""
    return source.count("\n") > 10 and all(isinstance(node, kinds) for node in ast.parse(source).body)


def alternative_text(source: str) -> str:
    """A description of the figure that a cell draws, from its titles and axis labels."""
    try:
        calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    except SyntaxError:  # a cell magic
        return "Figure"
    for call in calls:
        if isinstance(call.func, ast.Attribute) and call.func.attr in ("figure", "panels"):
            titles = [ast.unparse(arg).strip("f'\"") for arg in call.args]
            axes = {
                key.arg: ast.unparse(key.value).strip("f[]'\"")
                for key in call.keywords
                if key.arg in ("x", "y")
            }
            parts = [f"Figure: {'; '.join(titles)}"]
            parts += [
                f"{'horizontal' if key == 'x' else 'vertical'} axis {label}"
                for key, label in axes.items()
                if label
            ]
            return ", ".join(parts).replace("', '", ", ")
    return "Figure"


def notebook_page(text: str, chapters: list[Chapter]) -> str:
    """The notebook as the site shows it: without directives for tools, with places to link to."""
    notebook = json.loads(text)
    cells: list[dict[str, Any]] = []
    for cell in notebook["cells"]:
        source = text_of(cell)
        if cell["cell_type"] == "markdown":
            cell["source"] = re.sub(r"(?m)^\|.*$", unbroken, link_papers(mend_links(source, chapters, "../")))
        elif cell["cell_type"] == "code":
            directives = re.findall(r"^#\| ?(\w+)", source, re.M)
            if "default_exp" in directives:
                continue
            kept = [line for line in source.splitlines() if not re.match(r"#\||# ?NBVAL_", line)]
            cell["source"] = FOR_TOOLS.sub("", "\n".join(kept)).strip("\n")
            if not cell["source"] and not cell.get("outputs"):
                continue
            metadata = cell.setdefault("metadata", {})
            metadata["mystnb"] = {"image": {"alt": alternative_text(cell["source"])}}
            if "export" in directives or "exports" in directives:
                metadata["exports"] = defined_names(cell["source"])
                if only(cell["source"], ast.Assign, ast.AnnAssign):
                    metadata["tags"] = [*metadata.get("tags", []), "table"]  # data: scrolls in a window
                elif only(cell["source"], ast.Import, ast.ImportFrom, ast.Assign):
                    metadata["tags"], metadata["fold"] = [*metadata.get("tags", []), "hide-input"], "imports"
        cells.append(cell)
    notebook["cells"] = cells
    return json.dumps(notebook, ensure_ascii=False)


def read_source(app: Sphinx, docname: str, source: list[str]) -> None:
    chapters = contents()
    if docname.startswith("chapters/"):
        source[0] = notebook_page(source[0], chapters)
        return
    text = source[0]
    if "%MAP%" in text:
        text = text.replace("%MAP%", map_markdown(chapters))
    if "%NOTATION%" in text:
        text = text.replace("%NOTATION%", notation_markdown(chapters).replace("](../", "](").strip())
        text = re.sub(r"\]\((\d\d_\w+\.ipynb)", r"](chapters/\1", text)
    if docname == "benchmarks":
        from benchmark_page import fill

        text = fill(text)
    if "%CLEAN_" in text:
        for name, table in cleaning_tables().items():
            text = text.replace(name, table)
    if docname == "faults":
        text = re.sub(r"(?m)^%FAULTS (\w+)%$", lambda match: faults_table(match[1]), text)
    if docname == "references":
        cited = citations(chapters)
        text = re.sub(
            r"arXiv:(\d{4}\.\d{4,5})", lambda match: match[0] + cited_in(cited.get(match[1], [])), text
        )
    source[0] = link_papers(mend_links(text, chapters, "../" if "/" in docname else ""))


def cleaning_tables() -> dict[str, str]:
    """The tables of cleaning.md, from what `benchmarks.clean` measured."""
    record = json.loads((ROOT / "data" / "results" / "clean.json").read_text(encoding="utf-8"))
    results = record["results"]
    sizes = sorted({int(n) for by_size in results.values() for n in by_size})
    run = results["everything"][max(results["everything"], key=int)]
    truth = [
        "| step | to find | caught | recall | acted on | precision | sound |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    truth += [
        f"| {r['step']} | {r['planted']:,} | {r['caught']:,} | {r['recall']:.3f} | {r['acted']:,} | {r['precision']:.3f} | {r['sound']:,} |"
        for r in run["truth"]
    ]
    columns = [f"{n:,}" for n in sizes]
    cost = [
        "| step | "
        + " | ".join([*(f"docs/s, {c}" for c in columns), *(f"MiB, {c}" for c in columns)])
        + " |",
        "|---|" + "--:|" * (2 * len(sizes)),
    ]
    for name, by_size in results.items():
        found = [by_size.get(str(n)) for n in sizes]
        cells = [f"{one['documents_per_s']:,.0f}" if one else "" for one in found]
        cells += [f"{one['peak_memory_bytes'] / 2**20:,.0f}" if one else "" for one in found]
        cost.append(f"| {name} | {' | '.join(cells)} |")
    machine = record["machine"]
    cost += ["", f"Measured by `{record['command']}` on {machine.get('cpu', 'this machine')}."]
    return {"%CLEAN_TRUTH%": "\n".join(truth), "%CLEAN_COST%": "\n".join(cost)}


def faults_table(part: str) -> str:
    """A part of faults.md, from what `make faults` tried: the rows of a test file, or their summary."""
    record = json.loads((ROOT / "data" / "results" / "faults.json").read_text(encoding="utf-8"))
    rows, machine = record["faults"], record["machine"]
    if part == "summary":
        return (
            f"**{len(rows)} faults, {sum(row['tried'] for row in rows):,} tries**, in {record['seconds'] / 60:.0f} minutes on "
            f"{machine['cpu']}, {machine['cpu_cores']} cores, torch {machine['torch']}, by `{record['command']}`."
        )
    rows = [row for row in rows if row["test"].startswith(f"{part}.py::")]
    lines = ["| fault | tried | outcome |", "|---|--:|---|"]
    lines += [f"| {row['fault']} | {row['tried']:,} | {row['outcome']} |" for row in rows]
    return "\n".join(lines)


def cited_in(chapters: list[Chapter]) -> str:
    if not chapters:
        return ""
    return " · " + ", ".join(f"[{chapter.name[:2]}](chapters/{chapter.name}.ipynb)" for chapter in chapters)


# ---- exported cells and API entries, linked to each other ------------------------------------------------------------


@functools.cache
def definitions() -> dict[str, tuple[str, str]]:
    """Full name of every exported object -> (chapter's name, title)."""
    found: dict[str, tuple[str, str]] = {}
    for chapter in contents():
        for cell in chapter.cells:
            source = text_of(cell)
            if cell["cell_type"] == "code" and re.match(r"#\| ?exports?\b", source):
                for name in defined_names(re.sub(r"^#\|.*$", "", source, flags=re.M)):
                    found[f"minillm.{chapter.slug}.{name}"] = (chapter.name, chapter.title)
    return found


def api_link(target: str, text: str, docname: str) -> nodes.Element:
    """Code that leads to its API entry, if it has one."""
    return addnodes.pending_xref(
        "",
        nodes.literal("", text),
        refdomain="py",
        reftype="obj",
        reftarget=target,
        refexplicit=True,
        refwarn=False,
        refdoc=docname,
    )


def link_definitions(app: Sphinx, doctree: nodes.document) -> None:
    docname = app.env.docname
    if docname.startswith("chapters/"):
        module = f"minillm.{docname.partition('_')[2]}"
        for cell in list(
            doctree.findall(lambda node: isinstance(node, nodes.container) and "cell_metadata" in node)
        ):
            if cell.get("prompt_show"):
                kind = "solution" if cell["hide_mode"] == "all" else cell["cell_metadata"].get("fold", "code")
                cell["prompt_show"], cell["prompt_hide"] = f"Show {kind}", f"Hide {kind}"
            names = cell["cell_metadata"].get("exports")
            if names is None:
                continue
            cell["classes"].append("exported")
            cell["ids"] += [f"define-{name}" for name in names]
            label = nodes.paragraph("", "exported to ", classes=["exported-to"])
            shown = [name for name in names if not name.startswith("_") and len(name) > 1 and name != "log"]
            targets = [f"{module}.{name}" for name in shown] or [module]
            for index, target in enumerate(targets):
                label += nodes.Text(", " if index else "")
                label += api_link(target, target if index == 0 else target.rpartition(".")[2], docname)
            cell.parent.insert(cell.parent.index(cell), label)
        for literal in list(doctree.findall(nodes.literal)):
            if re.fullmatch(r"minillm(\.\w+)+", literal.astext()) and isinstance(
                literal.parent, nodes.paragraph
            ):
                literal.replace_self(api_link(literal.astext(), literal.astext(), docname))
    elif docname.startswith("api/"):
        for paragraph in list(doctree.findall(nodes.paragraph)):
            if paragraph.astext() == "Bases: object":
                paragraph.parent.remove(paragraph)
        for signature in doctree.findall(addnodes.desc_signature):
            for literal in signature.findall(nodes.inline):  # shapes as they are written: "B T D"
                value = literal.astext()
                if re.fullmatch(r"'[^'\"]*'", value):
                    literal.children = [nodes.Text(f'"{value[1:-1]}"')]
            for identifier in signature["ids"]:
                if identifier in definitions():
                    chapter, title = definitions()[identifier]
                    uri = f"../chapters/{chapter}.html#define-{identifier.rpartition('.')[2]}"
                    link = nodes.reference(
                        "",
                        f"[chapter {chapter[:2]}]",
                        refuri=uri,
                        internal=True,
                        reftitle=title,
                        classes=["chapter-link"],
                    )
                    signature += link
                    break


# ---- API pages ------------------------------------------------------------------------------------------------------


def modules() -> list[str]:
    """The package's modules and subpackages, in the book's order: chapters first, then what was written by hand."""
    order = {chapter.slug: index for index, chapter in enumerate(contents()) if chapter.module}
    names = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.parent.name for path in PACKAGE.glob("*/__init__.py")
    }
    public = [name for name in names if not name.startswith("_")]
    return sorted(public, key=lambda name: (order.get(name, len(order)), name))


def first_sentence(text: str | None) -> str:
    line = " ".join((text or "").strip().partition("\n\n")[0].split())
    return re.split(r"(?<=\w)\. ", line)[0].rstrip(".").replace("|", r"\|")


def automodule(name: str) -> str:
    """What Sphinx replaces by the docstrings of a module."""
    return f"```{{eval-rst}}\n.. automodule:: minillm.{name}\n   :members:\n   :show-inheritance:\n```\n"


def write_api() -> None:
    """Write book/api/*.md; files that did not change keep their time, so that a rebuild reads only what is new."""
    chapters = {chapter.slug: chapter for chapter in contents() if chapter.module}
    folder = BOOK / "api"
    pages: dict[str, str] = {}
    rows: dict[bool, list[str]] = {True: [], False: []}
    for name in modules():
        chapter = chapters.get(name)
        if chapter:
            where = f"Defined in [chapter {chapter.name[:2]}](../chapters/{chapter.name}.ipynb)"
            about, intro = chapter.builds, f"*{where}: {chapter.builds}.*\n\n"
        else:
            about, intro = first_sentence(importlib.import_module(f"minillm.{name}").__doc__), ""
        parts = [f"{name}.{path.stem}" for path in sorted((PACKAGE / name).glob("[!_]*.py"))]
        pages[name] = f"# minillm.{name}\n\n{intro}" + automodule(name)
        if name != "check":  # its files are laws, which have a page of their own
            pages[name] += "".join(f"\n## minillm.{part}\n\n{automodule(part)}" for part in parts)
        rows[chapter is not None].append(f"| [`minillm.{name}`]({name}.md) | {about} |")
    pages["laws"] = laws_markdown(chapters)
    lines = [
        "# The package",
        "",
        "Generated from the docstrings. Names of shapes: [notation](../notation.md).",
        "",
    ]
    lines += ["## Built in the chapters", "", "| module | builds |", "|---|---|", *rows[True], ""]
    lines += ["## Written by hand", "", "| module | purpose |", "|---|---|", *rows[False], ""]
    pages["index"] = "\n".join([*lines, "```{toctree}", ":hidden:", "", *modules(), "laws", "```", ""])
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("*.md"):
        if stale.stem not in pages:
            stale.unlink()
    for name, text in pages.items():
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def laws_markdown(chapters: dict[str, Chapter]) -> str:
    """Every exercise with the laws that `check` holds it against."""
    from minillm.check import _LAWS

    lines = [
        "# Exercises and their laws",
        "",
        'Every chapter ends in exercises. `check("module.name", yours)` holds your code against these laws, in this order,',
        "and shows the first one that it breaks, with a hint. The package's own tests use the same laws.",
        "",
        "```python\nfrom minillm.check import check\n\n"
        "def rms_norm(x, weight, eps=1e-5):\n    return x / x.norm(dim=-1, keepdim=True) * weight\n\n"
        'check("norm.rms_norm", rms_norm)\n```',
    ]
    for slug in chapters:
        if (PACKAGE / "check" / f"{slug}.py").exists():
            importlib.import_module(f"minillm.check.{slug}")
            exercises = {name: rules for name, rules in _LAWS.items() if name.startswith(f"{slug}.")}
            if exercises:
                lines += ["", f"## [{chapters[slug].short_title}](../chapters/{chapters[slug].name}.ipynb)"]
            for exercise, rules in exercises.items():
                lines += [
                    "",
                    f"`{exercise}`",
                    "",
                    *[f"{number}. {rule.name}" for number, rule in enumerate(rules, 1)],
                ]
    return "\n".join(lines) + "\n"


def written_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """The signature as the source has it, shapes and all; None leaves Sphinx's own."""
    try:
        if what == "class" and dataclasses.is_dataclass(obj):
            fields = [
                f"{field.name}: {field.type}"
                + ("" if field.default is dataclasses.MISSING else f" = {field.default!r}")
                for field in dataclasses.fields(obj)
                if field.init and isinstance(field.type, str)
            ]
            return ("(*, " + ", ".join(fields) + ")", None) if fields else None
        function = obj.__init__ if what == "class" else inspect.unwrap(getattr(obj, "__func__", obj))
        if what not in ("class", "function", "method") or not inspect.isfunction(function):
            return None
        source = textwrap.dedent(inspect.getsource(function))
        node = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError, AttributeError):
        return None
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return None

    def piece(part: ast.AST | None) -> str:
        return " ".join((ast.get_source_segment(source, part) or "").split()) if part is not None else ""

    def parameter(arg: ast.arg, default: ast.expr | None = None, star: str = "") -> str:
        text = star + arg.arg + (f": {piece(arg.annotation)}" if arg.annotation else "")
        return text + ((" = " if arg.annotation else "=") + piece(default) if default is not None else "")

    given = node.args
    plain = given.posonlyargs + given.args
    defaults = [None] * (len(plain) - len(given.defaults)) + list(given.defaults)
    parts = [parameter(arg, default) for arg, default in zip(plain, defaults)]
    if given.posonlyargs:
        parts.insert(len(given.posonlyargs), "/")
    if plain and plain[0].arg in ("self", "cls"):
        parts = parts[1:]
    if given.vararg or given.kwonlyargs:
        parts.append(parameter(given.vararg, star="*") if given.vararg else "*")
    parts += [parameter(arg, default) for arg, default in zip(given.kwonlyargs, given.kw_defaults)]
    if given.kwarg:
        parts.append(parameter(given.kwarg, star="**"))
    result = piece(node.returns) if what != "class" else ""
    return "(" + ", ".join(parts) + ")", result or None


def also_members(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Functions and methods of the package are listed for their signature, even where there is no more to say."""
    function = inspect.unwrap(getattr(obj, "__func__", getattr(obj, "fget", obj)) or obj)
    own = inspect.isfunction(function) and function.__module__.startswith("minillm.")
    return False if skip and own and not name.startswith("_") else None


def plain_line(line: str) -> str:
    """A line of prose as reStructuredText."""
    parts = re.split(r"(``[^`]*``|`[^`]*`)", line)
    for at, part in enumerate(parts):
        if at % 2 == 0:
            part = re.sub(
                r"(?<![\\\w*])(\*\w[^*]*\w\*)(?![\w*])|(?<!\\)([*|])",
                lambda star: star[1] or "\\" + star[2],
                part,
            )
            part = re.sub(r"(?<=\w)_(?=\W|$)", r"\\_", part)
            parts[at] = ARXIV.sub(r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", part)
        elif not part.startswith("``") and not re.fullmatch(r"`\w[\w.]*`", part):
            parts[at] = (
                f"`{part}`"  # code (`.model` is a file), and not the name of something that could be linked
            )
    return "".join(parts)


def plain_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with `code`: stars, bars and trailing underscores mean themselves, what is indented is a drawing, papers are linked."""
    result: list[str] = []
    drawing = section = False
    for line in lines:
        if line and not line.startswith(" "):
            drawing, section = False, bool(SECTION.match(line))
        elif line.startswith("    ") and not section and not drawing and result and not result[-1]:
            drawing = True
            result += [".. code-block:: text", ""]
        result.append(line if drawing else plain_line(line))
    lines[:] = result
    if what in ("attribute", "data", "property"):
        _one_liners[name] = list(lines)


_one_liners: dict[str, list[str]] = {}


def whole_one_liner(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Napoleon takes what stands before the first colon of an attribute's docstring for its type: undo it."""
    if name in _one_liners:
        lines[:] = _one_liners.pop(name)


# ---- the build ------------------------------------------------------------------------------------------------------


def mirror_chapters() -> None:
    """Copy chapters/*.ipynb to book/chapters/: MyST resolves links of files, and loses its way behind a symbolic link."""
    mirror = MIRROR
    if mirror.is_symlink():
        mirror.unlink()
    mirror.mkdir(exist_ok=True)
    sources = {path.name: path for path in CHAPTERS.glob("*.ipynb")}
    for old in mirror.iterdir():
        if old.is_file() and old.name not in sources:
            old.unlink()
    for name, source in sources.items():
        copy = mirror / name
        if not copy.exists() or copy.read_bytes() != source.read_bytes():
            shutil.copyfile(source, copy)


def prepare(app: Sphinx) -> None:
    write_api()
    from sphinx.util import logging

    known = {chapter.name for chapter in contents()}
    for path in sorted(CHAPTERS.glob("*.ipynb")):
        if path.stem not in known:
            logging.getLogger(__name__).warning("chapters/%s is not in book/contents.toml", path.name)


def note_chapters(app: Sphinx, config: Any) -> None:
    """A chapter that appears or goes changes links on any page: everything is read again."""
    global CHAPTERS
    mirror_chapters()
    CHAPTERS = MIRROR  # from here on: what others write meanwhile waits for the next build
    config.chapters_written = [chapter.name for chapter in contents() if chapter.written]


def always_read(app: Sphinx, env: Any, added: set[str], changed: set[str], removed: set[str]) -> list[str]:
    """Pages made from the chapters are read again when there is a change in any."""
    return [
        name
        for name in ("index", "notation", "references", "glossary", "benchmarks", "faults")
        if name in env.found_docs
    ]


def setup(app: Sphinx) -> dict[str, Any]:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    app.add_config_value("chapters_written", [], "env", types=frozenset({list}))
    app.connect("config-inited", note_chapters)
    app.connect("builder-inited", prepare)
    app.connect("env-get-outdated", always_read)
    app.connect("source-read", read_source)
    app.connect("doctree-read", link_definitions)
    app.connect("autodoc-process-signature", written_signature)
    app.connect("autodoc-skip-member", also_members)
    app.connect("autodoc-process-docstring", plain_docstring, priority=400)
    app.connect("autodoc-process-docstring", whole_one_liner, priority=600)
    version = zlib.crc32(Path(__file__).read_bytes())  # pages kept from an earlier version are read again
    return {"env_version": version, "parallel_read_safe": True, "parallel_write_safe": True}
