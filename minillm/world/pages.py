"""Web pages of the world, with their main text known."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from minillm.corpus import Dice, dice, pick, pick_some
from minillm.world.documents import story_text
from minillm.world.tables import read_toml
from minillm.world.task import CorpusConfig

_AROUND = read_toml("web.toml")["page"]  # what stands around the text of a page


@dataclass(frozen=True, slots=True)
class WebPage:
    """A page whose main text is known: its bytes, the charset of its header ("" for none), the truth, what is hard about it. Chapter 02."""

    data: bytes
    declared: str
    text: str
    traps: tuple[str, ...]


def _web_part(kind: str, lang: str, r: Dice, named: bool) -> str:
    """One piece of boilerplate; without names, nothing but its shape tells what it is."""
    items = [html.escape(item) for item in _AROUND[lang][kind]]
    name = f' class="{kind}"' if named else f' class="x{int(r() * 1000)}"'
    if kind == "menu":
        links = "".join(f'<li><a href="/{i}">{item}</a>' for i, item in enumerate(pick_some(r, items, 8)))
        return f"<nav><ul>{links}</ul></nav>" if named else f"<div{name}><ul>{links}</ul></div>"
    if kind in ("comment", "cookie", "footer"):
        tag = "footer" if named and kind == "footer" else "div"
        start, rest = items[0], items[1:]
        body = "".join(f"<p>{item}</p>" for item in items) if kind == "comment" else f"<p>{start}</p>"
        links = "" if kind == "comment" else " ".join(f'<a href="#">{item}</a>' for item in rest)
        return f"<{tag}{name}>{body}{links}</{tag}>"
    return (
        f"<div{name}>"
        + "".join(f'<div><a href="/{i}">{item}</a></div>' for i, item in enumerate(items))
        + "</div>"
    )


_WEB_TRAPS = {
    "no names": 0.4,
    "misleading names": 0.2,
    "broken markup": 0.25,
    "line breaks": 0.25,
    "split": 0.25,
    "interrupted": 0.3,
    "deep": 0.05,
    "comments": 0.5,
    "long comments": 0.1,
    "undeclared": 0.3,
    "wrong": 0.1,
}

_WRONG_LABELS = (
    ("utf-8", "utf-8"),
    ("iso-8859-1", "cp1252"),
    ("big5", "big5hkscs"),
)  # and what browsers read under them
_CHARSETS = {"en": ("utf-8", "cp1252", "utf-16"), "zh": ("utf-8", "gb18030", "big5hkscs", "utf-16")}


def _main_part(paragraphs: Sequence[str], between: Sequence[str], r: Dice, traps: set[str]) -> str:
    """The main text as markup: paragraphs or line breaks, with links, entities and inline tags inside, and what cuts in between."""
    made = []
    for text in paragraphs:
        words = html.escape(text).replace("&quot;", pick(r, ("&quot;", "&#34;", '"')))
        if r() < 0.5:
            cut = int(len(text) / 2)
            words = f'{html.escape(text[:cut])}<a href="/x"><em>{html.escape(text[cut : cut + 5])}</em></a>{html.escape(text[cut + 5 :])}'
        made.append(words)
    if "broken markup" in traps:
        made = [f"<p {pick(r, ('', 'align=left', 'class=x y'))}>{words}</b></div></span>" for words in made]
    elif "line breaks" not in traps:
        made = [f"<p>{words}</p>" for words in made]
    if "split" in traps:
        made = [f"<section><div>{words}</div></section>" for words in made]
    if "interrupted" in traps:
        made = [part for words in made for part in (words, pick(r, between))][:-1]
    name = pick(r, ("post has-sidebar", "entry comments-open")) if "misleading names" in traps else "content"
    body = ("<br><br>\n" if "line breaks" in traps else "\n").join(made)
    return f'<div class="{name}">{body}' + ("" if "broken markup" in traps else "</div>")


def write_page(seed: object, *, lang: str | None = None, config: CorpusConfig | None = None) -> WebPage:
    """A web page around one to five paragraphs, with boilerplate of eight kinds and, at random, what makes real pages hard.

    Traps: no telling names, names that mislead, broken markup, line breaks for paragraphs, a text in several boxes, a text that
    boxes interrupt, hundreds of nested boxes, comments, comments longer than the text, a charset that is not UTF-8, one that
    is not declared, one that is declared wrongly.

    Args:
        seed: whatever names this page; the same seed gives the same page.
        lang: "en" or "zh"; drawn if None.
    """
    r, config = dice("page", seed), config or CorpusConfig()
    lang = lang or ("zh" if r() < 0.5 else "en")

    def tell(n: int) -> str:
        told = [story_text(config, r, lang)[0].split("\n")[0] for _ in range(n)]
        return ("" if lang == "zh" else " ").join(told)

    paragraphs = [tell(1 + int(r() * 3)) for _ in range(1 + int(r() * 5))]
    traps = {trap for trap, share in _WEB_TRAPS.items() if r() < share}
    part = partial(_web_part, lang=lang, r=r, named="no names" not in traps)
    script = f'<script>if (1 < 2) document.write("<p>{"ad " * 30}</p>");</script><!-- {"build " * 20} --><style>p > a {{}}</style>'
    depth = 300 if "deep" in traps else 1
    between = [part(kind) for kind in ("bold", "teaser", "cookie")]
    main = "<div>" * depth + _main_part(paragraphs, between, r, traps) + "</div>" * depth
    comments = part("comment") if traps & {"comments", "long comments"} else ""
    if "long comments" in traps:
        comments = comments.replace("</div>", "".join(f"<p>{tell(2)}</p>" for _ in range(4)) + "</div>")
    body = [
        part("cookie"),
        part("menu"),
        script,
        main,
        part("bold"),
        part("teaser"),
        comments,
        part("footer"),
    ]
    charset = pick(r, _CHARSETS[lang])
    if lang == "zh" and charset == "big5hkscs":
        charset = "gb18030"  # the stories are simplified
    shown = (
        pick(r, tuple(label for label, codec in _WRONG_LABELS if codec != charset))
        if "wrong" in traps
        else charset
    )
    meta = "" if "undeclared" in traps else f'<meta charset="{"gbk" if shown == "gb18030" else shown}">'
    page = f"<!DOCTYPE html><html><head>{meta}<title>{lang}</title></head><body>{chr(10).join(body)}</body></html>"
    if charset == "cp1252":
        page = page.replace("Great story", "“Très bon” – a great story")
    return WebPage(page.encode(charset), "", "\n".join(paragraphs), tuple(sorted(traps | {charset})))
