"""Web pages of the world, with their main text known."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from minillm.corpus import Dice, dice, pick, pick_some
from minillm.world.documents import story_text
from minillm.world.task import CorpusConfig


@dataclass(frozen=True, slots=True)
class WebPage:
    """A page whose main text is known: its bytes, the charset of its header ("" for none), the truth, what is hard about it. Chapter 02."""

    data: bytes
    declared: str
    text: str
    traps: tuple[str, ...]


_WEB = {
    "en": {
        "menu": "Home|News|Sports|Weather|Shop|About us|Contact|Log in|Help|Careers|Newsletter|Archive",
        "cookie": "We and our 213 partners store and read information on your device, such as cookies, to show you ads that fit you, "
        "to measure them and to improve our services. You can change your mind at any time. Accept all|Reject all|Settings",
        "footer": "Copyright 2026 Example Media. All rights reserved. No part of this site may be copied, stored or passed on without "
        "written permission of the publisher. Terms|Privacy|Imprint|Jobs",
        "comment": "Great story, thanks for sharing it with all of us here!|First! I read this to my kids every single evening.|"
        "I do not agree at all, the ending makes no sense to me.|Does anyone know who drew the pictures?",
        "teaser": "Ten things you did not know about lamps|Why everyone talks about this small shop|The best pears of the year",
        "bold": "Read more|Share this page|Print|Subscribe now",
    },
    "zh": {
        "menu": "首页|新闻|体育|天气|商城|关于我们|联系我们|登录|帮助|招聘|订阅|归档",
        "cookie": "我们和213个合作伙伴会在您的设备上存储和读取信息，例如Cookie，用来展示适合您的广告、衡量效果并改进服务。您可以随时更改选择。"
        "全部接受|全部拒绝|设置",
        "footer": "版权所有2026示例传媒，保留所有权利。未经出版方书面许可，不得复制、保存或转载本站任何内容。条款|隐私|法律声明|招聘",
        "comment": "写得真好，谢谢分享给我们大家！|沙发！我每天晚上都给孩子读这个故事。|完全不同意，结尾让人看不懂。|有人知道插图是谁画的吗？",
        "teaser": "关于灯你不知道的十件事|为什么大家都在谈论这家小店|今年最好吃的梨",
        "bold": "阅读全文|分享本页|打印|立即订阅",
    },
}


def _web_part(kind: str, lang: str, r: Dice, named: bool) -> str:
    """One piece of boilerplate; without names, nothing but its shape tells what it is."""
    items = [html.escape(item) for item in _WEB[lang][kind].split("|")]
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
