"""Chapter 01: documents, dice, splits, pages, words and sentences in two scripts; the laws of its exercises."""

import random
import re
import unicodedata
from collections import Counter

import pytest

from minillm.check import check, laws
from minillm.corpus import (
    HAN,
    UNIT,
    Document,
    Page,
    dice,
    guess_lang,
    in_words,
    jaccard,
    pick_some,
    pick_weighted,
    sentences_of,
    split_of,
    units,
)
from minillm.readers.lines import bounded_lines

GOOD_PLOT = """
repair: a b x=toy p
The {x} of {a} was broken. || {a}的{x}坏了。
{b} mended it in {p}. || {b}在{p}里把它修好了。
"How can I thank you?" asked {a}. || {a}问：“我该怎么谢你？”
Q Who mended the {x}? = {b} || 谁修好了{x}？ = {b}
Q Where was the {x} mended? = {p} || {x}是在哪里修好的？ = {p}
"""


def times_scratchpad(a, digit):
    steps, carry = [], 0
    for x in reversed(str(a)):
        result = int(x) * digit + carry
        steps.append(f"{x}*{digit}" + (f"+{carry}" if carry else "") + f"={result}")
        carry = result // 10
    return ",".join(steps)


SOLUTIONS = {
    "corpus.sum_split": lambda a, b: split_of("+", min(a, b), max(a, b)),
    "corpus.repeat_share": lambda n, k: 1 - k * (1 - (1 - 1 / k) ** n) / n,
    "corpus.times_scratchpad": times_scratchpad,
    "corpus.lines": lambda chunks, limit: [line for _, line in bounded_lines(chunks, limit)],
    "corpus.plot": GOOD_PLOT,
}


@pytest.mark.parametrize(
    ("exercise", "law"), [(name, law) for name in SOLUTIONS for law in laws(name)], ids=str
)
def test_the_package_obeys_its_laws(exercise, law):
    law(SOLUTIONS[exercise])


@pytest.mark.parametrize(
    ("exercise", "wrong", "law"),
    [
        ("sum_split", lambda a, b: None, "it gives 'train' or 'heldout'"),
        ("sum_split", lambda a, b: "heldout" if (a + b) % 2 else "train", "about one pair in eight is held out"),
        ("sum_split", lambda a, b: split_of(a, b), "a+b and b+a are one meaning"),
        ("sum_split", lambda a, b: "heldout" if (a + b) % 8 == 3 else "train", "it depends on both operands"),
        ("sum_split", lambda a, b: "heldout" if abs(a - b) % 8 == 3 else "train", "it depends on both operands"),
        ("sum_split", lambda a, b: random.choice(["train"] * 7 + ["heldout"]), "a+b and b+a are one meaning"),
        ("repeat_share", lambda n, k: n / k, "one document repeats nothing"),
        ("repeat_share", lambda n, k: (n - 1) / n, "it agrees with drawing"),
        ("times_scratchpad", lambda a, d: f"{a}*{d}={a * d}", "units come first, and carries are added"),
        ("times_scratchpad", lambda a, d: ",".join(f"{x}*{d}={int(x) * d}" for x in reversed(str(a))), "units come first, and carries are added"),
        ("lines", lambda chunks, limit: b"".join(chunks).split(b"\n"), "one chunk, short lines"),
        ("lines", lambda chunks, limit: [line for c in chunks for line in c.split(b"\n") if line or c.count(b"\n") > 1][:3], "one chunk, short lines"),
        ("lines", lambda chunks, limit: b"".join(chunks).splitlines(), "a line above the limit is None, one at the limit is not"),
        ("lines", lambda chunks, limit: [None if len(x) > limit else x for x in b"".join(chunks).splitlines()], "memory is bounded"),
        ("plot", "x: a\nno separator", "it can be parsed"),
        ("plot", GOOD_PLOT.split("\nQ")[0], "three sentences and two questions"),
        ("plot", GOOD_PLOT.replace("in {p}. ||", "at home. ||"), "each language names every role"),
        ("plot", GOOD_PLOT.replace("{x}？ = {b}", "{x}？ = {a}"), "a question and its answer are about the same world in both languages"),
    ],
)  # fmt: skip
def test_check_names_the_broken_law(exercise, wrong, law):
    report = check(f"corpus.{exercise}", wrong, quiet=True)
    broken = [rule.name for rule, reason in report.reasons.items() if reason is not None]
    assert broken[0] == law


def test_dice_are_uniform_and_depend_on_every_part_of_the_key():
    r = dice("x", 1)
    values = [r() for _ in range(20000)]
    assert abs(sum(values) / 20000 - 0.5) < 0.01
    assert min(values) >= 0
    assert max(values) < 1
    assert len({dice(*key)() for key in (("x", 1), ("x", 2), ("y", 1), (1, "x"), ("x1",))}) == 5


def test_pick_some_gives_every_subset():
    r = dice("subsets")
    counts = Counter(frozenset(pick_some(r, range(4), 2)) for _ in range(6000))
    assert len(counts) == 6
    assert min(counts.values()) > 850
    with pytest.raises(ValueError, match=r"n=5 is more than the 4 items"):
        pick_some(r, range(4), 5)


def test_pick_weighted_keeps_the_weights():
    r = dice("weights")
    counts = Counter(pick_weighted(r, [(3.0, "a"), (0.0, "b"), (1.0, "c")]) for _ in range(8000))
    assert counts["b"] == 0
    assert abs(counts["a"] / 8000 - 0.75) < 0.02


def test_an_eighth_of_the_meanings_is_held_out_whatever_the_seed():
    share = sum(split_of("x", i) == "heldout" for i in range(20000)) / 20000
    assert abs(share - 0.125) < 0.01


def test_jaccard_against_the_definition():
    assert jaccard("abcdef", "abcdef") == 1
    assert jaccard("abcdef", "uvwxyz") == 0
    assert jaccard("abcdef", "abcdeg", n=5) == 1 / 3  # abcde shared; bcdef, bcdeg not


@pytest.mark.parametrize(
    ("text", "lang"),
    [
        ("The quick brown fox.", "en"),
        ("敏捷的棕色狐狸跳过懒狗。", "zh"),
        ("我们用 Transformer 训练 language model 模型", "mixed"),
        ("12345 + 678 = ...", "und"),
        ("Съешь же ещё этих мягких булок", "und"),
        ("これはひらがなのぶんしょうです", "und"),
        ("𠀀𠀁𠀂𠀃𠀄", "zh"),  # the ideographs beyond 65,535 are Chinese too
        ("", "und"),
    ],
)
def test_guess_lang(text, lang):
    assert guess_lang(text) == lang


def test_documents_are_frozen_and_small():
    d = Document("x")
    with pytest.raises(AttributeError):
        d.text = "y"
    assert not hasattr(d, "__dict__")
    assert (d.lang, d.kind, d.split, d.meta) == ("und", "text", "train", {})


def test_units_are_words_and_single_chinese_characters():
    assert units("Lily's 3 kites, 飞走了 re-do_x") == [
        "Lily's",
        "3",
        "kites",
        "飞",
        "走",
        "了",
        "re-do",
        "x",
    ]
    assert in_words("three words here") == 3
    assert in_words("三个汉字词语") == pytest.approx(4)


def test_han_is_every_ideograph_and_nothing_else():
    """Chapters 02 to 07 count with this one definition; kana and the marks between characters are not in it."""
    han = re.compile(f"[{HAN}]")
    for code in (*range(0x2E80, 0xFB00), *range(0x1F000, 0x33480)):
        name = unicodedata.name(chr(code), "")
        if name.startswith(("CJK UNIFIED IDEOGRAPH", "CJK COMPATIBILITY IDEOGRAPH")):
            assert han.match(chr(code)), hex(code)
        elif name:
            assert not han.match(chr(code)), (hex(code), name)


def test_every_chapter_means_the_same_by_han():
    from minillm import dedup, tokenizer

    assert tokenizer.CJK.endswith(HAN)  # with kana before it: scripts without spaces
    text = "Tom 有𠀀本书, 三只"
    assert dedup.WORD.findall(text) == UNIT.findall(text) == units(text)


@pytest.mark.parametrize(
    "text", ["", "No end", 'He said "Go!" and went. 他说：“走！”然后走了。\nEnd', "…。 !?\n\n a"]
)
def test_sentences_lose_nothing(text):
    assert "".join(sentences_of(text)) == text
    assert len(sentences_of("One. Two! 三。四？\nfive")) == 5


@pytest.mark.parametrize(("lang", "space"), [("en", " "), ("zh", "")])
def test_a_page_knows_where_its_answers_are(lang, space):
    page = Page()
    page.write("told")
    page.ask(lang, "who", "Tom", "first")
    page.say(lang, "user", "hello")
    page.say(lang, "assistant", "good day", "second")
    found = {label: page.text[start:end] for start, end, label in page.answers}
    assert found == {"first": space + "Tom", "second": space + "good day"}
    assert page.size == len(page.text)
