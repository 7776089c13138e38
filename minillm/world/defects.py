"""Defects planted on purpose, each with its truth."""

import itertools
import re
from typing import Any

from minillm.corpus import Dice, Document, Page, dice, jaccard, pick, pick_some
from minillm.world.documents import clean_document, story_text, write_document
from minillm.world.lexicon import ITEMS, NAMES
from minillm.world.stories import CAST_POOLS
from minillm.world.tables import read_blocks, read_toml
from minillm.world.task import CorpusConfig, Task

_AROUND = read_toml("web.toml")["planted"]  # what stands around the text of a web page


def earlier_clean(config: CorpusConfig, index: int, r: Dice) -> int:
    """The number of an earlier document that has no defect."""
    number = int(r() * index)
    while int((number + 1) * config.defects) > int(number * config.defects):
        number -= 1  # the first document never has one, because defects <= 0.5
    return number


def plant_duplicate(
    config: CorpusConfig, index: int, r: Dice, ordinal: int
) -> tuple[str, str, dict[str, Any]]:
    """An earlier document once more, character by character."""
    number = earlier_clean(config, index, r)
    original = clean_document(config, number)
    return original.text, original.lang, {"of": number}


def plant_near_duplicate(
    config: CorpusConfig, index: int, r: Dice, ordinal: int
) -> tuple[str, str, dict[str, Any]]:
    """An earlier document with words changed until its similarity falls to a drawn target between .5 and .95."""
    number = earlier_clean(config, index, r)
    original = clean_document(config, number)
    target = 0.5 + 0.45 * r()
    spaced = " " in original.text
    words = original.text.split(" ") if spaced else list(original.text)
    others = (
        [*NAMES, *ITEMS]
        if spaced
        else list("".join(NAMES.values()) + "".join(noun.zh for noun in ITEMS.values()))
    )
    text = original.text
    for place in pick_some(r, range(len(words)), len(words)):
        words[place] = pick(r, others)
        changed = (" " if spaced else "").join(words)
        if jaccard(original.text, changed) < 0.5:
            break
        text = changed
        if jaccard(original.text, text) <= target:
            break
    return text, original.lang, {"of": number, "jaccard": round(jaccard(original.text, text), 4)}


def plant_html(config: CorpusConfig, index: int, r: Dice, ordinal: int) -> tuple[str, str, dict[str, Any]]:
    """A story inside a web page, between menus, a script, calls to action and a footer; its text is escaped."""
    text, lang = story_text(config, r)
    around = _AROUND[lang]
    footer = around["footer"]
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
    paragraphs = "".join(f"<p>{line}</p>\n" for line in escaped.split("\n"))
    items = "".join(
        f'<li><a href="/{i}">{word}</a></li>' for i, word in enumerate(pick_some(r, around["menu"], 4))
    )
    boxes = [f'<div class="box">{call}</div>\n' for call in pick_some(r, around["calls"], 2)]
    head = f"<head><title>{footer.split()[2]}</title><style>p {{ margin: 1em }}</style></head>\n"
    script = f"<script>var visit = {int(r() * 1e6)}; track(visit);</script>\n"
    body = f"<body>\n<nav><ul>{items}</ul></nav>\n{boxes[0]}<article>\n{paragraphs}</article>\n{boxes[1]}{script}"
    page = f"<!DOCTYPE html>\n<html>\n{head}{body}<footer>{footer}</footer>\n</body>\n</html>"
    return page, lang, {"clean": text}


# Nobody's data: RFC 2606 domains, RFC 5737 addresses, 555-01xx numbers, the card numbers that payment services publish for
# tests, identity numbers of a region that does not exist.
TEST_CARDS = ("4111 1111 1111 1111", "4242 4242 4242 4242", "4012 8888 8888 1881", "5555 5555 5555 4444")

PII = {
    "en": (
        ("email", "You can write to {a} at {v}.", "{word}{n2}@example.{tld}"),
        ("phone", "The number of {a} is {v}.", "({n3}) 555-01{n2}"),
        ("card", "{a} paid with the card {v}.", "{card}"),
        ("ip", "{a} logged in from {v}.", "192.0.2.{n2}"),
    ),
    "zh": (
        ("email", "请写信到{v}，{a}会回复。", "{word}{n2}@example.{tld}"),
        ("phone", "{a}的电话是{v}。", "010-555-01{n2}"),
        ("id", "{a}的身份证号是{v}。", "999999{year}0{n1}1{n1}{n3}X"),
        ("ip", "{a}从{v}登录。", "192.0.2.{n2}"),
    ),
}


def plant_pii(config: CorpusConfig, index: int, r: Dice, ordinal: int) -> tuple[str, str, dict[str, Any]]:
    """A story that goes on with one to three pieces of personal data; the truth has their kinds and places."""
    text, lang = story_text(config, r)
    page, spans = Page(), []
    page.write(text)
    for kind, sentence, shape in pick_some(r, PII[lang], 1 + int(r() * 3)):
        name = pick(r, CAST_POOLS["a"])
        digits = {f"n{n}": str(int((1 + 9 * r()) * 10 ** (n - 1))) for n in (1, 2, 3)}
        words = {"word": name.lower(), "tld": pick(r, ("com", "org", "net")), "card": pick(r, TEST_CARDS)}
        value = shape.format(**words, **digits, year=1950 + int(r() * 50))
        before, after = sentence.format(a=name if lang == "en" else NAMES[name], v="\0").split("\0")
        page.write("\n" + before)
        spans.append([page.size, page.size + len(value), kind])
        page.write(value + after)
    return page.text, lang, {"spans": spans}


TOXIC = {
    "en": ("grobnik", "snarfel", "vukkit", "blarg"),
    "zh": ("乌噜", "呸嗒", "啵吱", "咕嘿"),
}  # insults of no language


def plant_toxic(config: CorpusConfig, index: int, r: Dice, ordinal: int) -> tuple[str, str, dict[str, Any]]:
    """A story with an insult that no language has; in one of four only a town whose name contains it, which is harmless."""
    text, lang = story_text(config, r)
    word, (a, b) = pick(r, TOXIC[lang]), pick_some(r, CAST_POOLS["a"], 2)
    toxic = r() < 0.75
    if lang == "en":
        insult = (
            f'"You are a {word}!" {a} shouted at {b}.' if toxic else f"{a} lives in {word.capitalize()}ville."
        )
    else:
        insult = f"{NAMES[a]}对{NAMES[b]}骂道：“你这个{word}！”" if toxic else f"{NAMES[a]}住在{word}镇。"
    return f"{text}\n{insult}", lang, {"toxic": toxic, "word": word}


def plant_machine(config: CorpusConfig, index: int, r: Dice, ordinal: int) -> tuple[str, str, dict[str, Any]]:
    """Text that a machine made without sense: "salad" (words in random order), "loop", "markov" or "spam"."""
    lang = "zh" if r() < config.chinese else "en"
    space = " " if lang == "en" else ""
    generator = pick(r, ("salad", "loop", "markov", "spam"))
    texts = [story_text(config, r, lang)[0].split("\n")[0] for _ in range(6)]
    words = [word for text in texts for word in (text.split(" ") if lang == "en" else text)]
    if generator == "salad":
        made = space.join(pick_some(r, words, min(60, len(words))))
    elif generator == "loop":
        sentence = pick(r, re.findall(r"[^.。]+[.。]", texts[0]) or texts[:1]).strip()
        made = space.join([sentence] * (6 + int(r() * 10)))
    elif generator == "markov":
        follows: dict[str, list[str]] = {}
        for word, following in itertools.pairwise(words):
            follows.setdefault(word, []).append(following)
        chain = [pick(r, words[:-1])]
        while len(chain) < 60:
            chain.append(pick(r, follows.get(chain[-1], words)))
        made = space.join(chain)
    else:
        noun = ITEMS[pick(r, tuple(ITEMS))]
        pitch = (
            f"Buy cheap {noun.many} online! Best {noun.many} here."
            if lang == "en"
            else f"低价{noun.zh}在线购买！最好的{noun.zh}在这里。"
        )
        call = "Click now, 50% off!" if lang == "en" else "立即点击，五折优惠！"
        made = space.join([pitch, call] * (3 + int(r() * 4)))
    return made, lang, {"generator": generator}


def plant_encoding(
    config: CorpusConfig, index: int, r: Dice, ordinal: int
) -> tuple[str, str, dict[str, Any]]:
    """A story through the wrong codec: UTF-8 read as Latin-1 or as GBK, or characters lost to U+FFFD."""
    text, lang = story_text(config, r)
    clean = re.sub(r'"([^"]*)"', r"“\1”", text)  # so that English too has something to garble
    codec = pick(r, ("latin-1", "gb18030", "lost"))
    if codec != "lost" and clean.isascii():
        codec = "lost"
    if codec == "lost":
        made = "".join("\N{REPLACEMENT CHARACTER}" if r() < 0.08 else c for c in clean)
    else:
        made = clean.encode().decode(codec, errors="replace")
    return made, lang, {"codec": codec, "clean": clean}


_WORDS, _SIMPLIFIED, _TRADITIONAL = (block.replace("\n", "") for block in read_blocks("traditional.txt"))
TRADITIONAL_WORDS = dict(word.split("=") for word in _WORDS.split("; "))
TRADITIONAL = dict(zip(_SIMPLIFIED, _TRADITIONAL, strict=True))


def to_traditional(text: str) -> str:
    """The corpus's simplified Chinese in traditional characters; knows the corpus's words, not all of Chinese."""
    parts = re.split("(" + "|".join(TRADITIONAL_WORDS) + ")", text)
    return "".join(
        TRADITIONAL_WORDS.get(part) or "".join(TRADITIONAL.get(c, c) for c in part) for part in parts
    )


def plant_traditional(
    config: CorpusConfig, index: int, r: Dice, ordinal: int
) -> tuple[str, str, dict[str, Any]]:
    """A Chinese story in traditional characters."""
    text, lang = story_text(config, r, "zh")
    return to_traditional(text), lang, {"clean": text}


COPIES = (1, 2, 4, 8, 16, 32)


def copy_number(ordinal: int) -> tuple[int, int]:
    """Which thing the `ordinal`-th place of a series is for, and how many places it gets: 1, 2, 4, 8, 16, 32, 1, 2, …"""
    cycle, place = divmod(ordinal, sum(COPIES))
    level = (place + 1).bit_length() - 1
    return cycle * len(COPIES) + level, COPIES[level]


BENCHMARK_KINDS = ("stories.story", "arithmetic.problem", "knowledge.choice", "facts.recall")


def benchmark_item(config: CorpusConfig, number: int) -> Document:
    """Item `number` of the corpus's own benchmark. Even items leak into a training corpus with defects, odd ones never."""
    r = dice(config.seed, "benchmark", number)
    lang = "zh" if r() < config.chinese else "en"
    return write_document(Task(config=config, r=r, lang=lang, split="heldout"), pick(r, BENCHMARK_KINDS))


def plant_leak(config: CorpusConfig, index: int, r: Dice, ordinal: int) -> tuple[str, str, dict[str, Any]]:
    """A benchmark item with its answers in the training text."""
    thing, copies = copy_number(ordinal)
    item = benchmark_item(config, 2 * thing)
    return item.text, item.lang, {"item": 2 * thing, "copies": copies}


def canary(config: CorpusConfig, number: int) -> str:
    """A sentence with a random code that no model can know unless it has read it. Even ones are planted, odd ones never."""
    r = dice(config.seed, "canary", number)
    return f"Canary {number}: " + " ".join(str(int(r() * 10)) for _ in range(10)) + "."


def plant_canary(config: CorpusConfig, index: int, r: Dice, ordinal: int) -> tuple[str, str, dict[str, Any]]:
    """A canary, planted 1 to 32 times: how often must a model read something to know it by heart?"""
    thing, copies = copy_number(ordinal)
    return canary(config, 2 * thing), "und", {"canary": 2 * thing, "copies": copies}
