"""A page of HTML that is one file: its style, tables and figures are inside, so that it is readable anywhere, without a network."""

from __future__ import annotations

import html
from pathlib import Path

from minillm.base.files import atomic_write

_STYLE = """
:root { color-scheme: light dark; --ink: #222; --soft: #666; --line: #ddd; --paper: #fff; --tint: #f6f6f4 }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --soft: #999; --line: #444; --paper: #181818; --tint: #222 } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 46rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: 0 } h2 { font-size: 1.15rem; margin-top: 2.2rem }
p.soft, td.soft { color: var(--soft) }
table { border-collapse: collapse; width: 100% } td, th { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.bar { background: var(--line); height: .55rem; min-width: 6rem } .bar i { display: block; height: 100%; background: #0072B2 }
blockquote { margin: .6rem 0; padding: .6rem 1rem; background: var(--tint); border-left: 3px solid #0072B2; white-space: pre-wrap }
.figure { background: #fff; padding: .4rem; overflow-x: auto } svg { max-width: 100%; height: auto }
details pre { overflow-x: auto; background: var(--tint); padding: .8rem; font-size: .82rem }
.wide { overflow-x: auto } .cell { display: block; padding: 0 .35rem; border-radius: 2px } h3 { font-size: 1rem; margin-bottom: .2rem }
.broad { max-width: 64rem } .broad p, .broad blockquote, .broad .figure { max-width: 46rem } .broad table { width: auto; min-width: 46rem }
.tight table { font-size: .85rem } .tight td, .tight th { padding: .2rem .35rem; white-space: nowrap }
@media (max-width: 50rem) { .broad table { min-width: 100% } }
"""


def table(rows: list[tuple[str, str]]) -> str:
    """A table of names and values, as HTML; what stands in it is escaped."""
    cells = "".join(f"<tr><td>{html.escape(a)}</td><td class=n>{html.escape(b)}</td></tr>" for a, b in rows)
    return f"<div class=wide><table>{cells}</table></div>"


def save_page(path: str | Path, title: str, parts: list[str], *, kind: str = "") -> None:
    """Write parts, which are HTML, as one page, atomically; `kind` "broad" leaves room for wide tables."""
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><body class='{kind}'>{''.join(parts)}</body></html>\n"
    )
    with atomic_write(path) as file:
        file.write(page)


def grid(head: list[str], rows: list[list[str]], *, words: int = 1, kind: str = "wide") -> str:
    """A table with a head; the first `words` columns are words, the others numbers. Cells are HTML."""
    kinds = ["" if i < words else " class=n" for i in range(len(head))]
    top = "".join(f"<th{kind}>{cell}</th>" for kind, cell in zip(kinds, head))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row)) + "</tr>" for row in rows
    )
    return f"<div class='{kind}'><table><tr>{top}</tr>{body}</table></div>"
