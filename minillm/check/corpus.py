"""Laws of chapter 01."""

from __future__ import annotations

import random
from typing import Any

from minillm.check import law


@law("corpus.sum_split", "it gives 'train' or 'heldout'", hint="return one of these two strings")
def _(f):
    for a, b in ((0, 0), (3, 4), (47, 85), (999, 1)):
        assert f(a, b) in ("train", "heldout"), f"sum_split({a}, {b}) is {f(a, b)!r}"


@law(
    "corpus.sum_split",
    "about one pair in eight is held out",
    hint="hash the pair to a number and compare it with 1/8",
)
def _(f):
    for low in (0, 1000):
        share = sum(f(a, b) == "heldout" for a in range(low, low + 80) for b in range(a, low + 80)) / 3240
        assert 0.09 < share < 0.16, f"the share of held-out pairs from {low} on is {share:.3f}"


@law("corpus.sum_split", "a+b and b+a are one meaning", hint="sort the operands before you hash them")
def _(f):
    for a in range(40):
        for b in range(a):
            assert f(a, b) == f(b, a), f"{a}+{b} is in {f(a, b)!r}, {b}+{a} in {f(b, a)!r}"


@law("corpus.sum_split", "the same answer every time", hint="no random numbers: a hash of the pair")
def _(f):
    first = [f(a, 3 * a) for a in range(200)]
    random.seed(1)
    assert first == [f(a, 3 * a) for a in range(200)], "asked again, it answers differently"


@law(
    "corpus.sum_split",
    "it depends on both operands",
    hint="hash the pair, not the sum and not the first operand",
)
def _(f):
    for name, group in (
        ("with one first operand", [(7, b) for b in range(7, 300)]),
        ("with one sum", [(a, 400 - a) for a in range(200)]),
        ("with one difference", [(a, a + 5) for a in range(200)]),
    ):
        sides = {f(a, b) for a, b in group}
        assert len(sides) == 2, f"all pairs {name} are on one side, {sides.pop()!r}"


@law(
    "corpus.repeat_share", "one document repeats nothing", hint="the share of repeats is (n - different) / n"
)
def _(f):
    for k in (1, 5, 1000):
        assert abs(f(1, k)) < 1e-9, f"repeat_share(1, {k}) is {f(1, k)}"


@law(
    "corpus.repeat_share",
    "with one text, all but the first are repeats",
    hint="different texts = k (1 - (1 - 1/k)^n)",
)
def _(f):
    assert abs(f(10, 1) - 0.9) < 1e-9, f"repeat_share(10, 1) is {f(10, 1)}, expected 0.9"


@law(
    "corpus.repeat_share",
    "it agrees with drawing",
    hint="each text stays unwritten with probability (1 - 1/k)^n",
)
def _(f):
    draw = random.Random(0)
    for n, k in ((24, 12), (50, 200), (300, 100)):
        repeats = [1 - len({draw.randrange(k) for _ in range(n)}) / n for _ in range(400)]
        mean = sum(repeats) / len(repeats)
        assert abs(f(n, k) - mean) < 0.012, (
            f"repeat_share({n}, {k}) is {f(n, k):.3f}, drawing gives {mean:.3f}"
        )


@law("corpus.times_scratchpad", "one digit is one step", hint="'7*8=56': digit, *, factor, =, product")
def _(f):
    for a, digit, steps in ((7, 8, "7*8=56"), (3, 2, "3*2=6"), (0, 5, "0*5=0")):
        assert f(a, digit) == steps, f"times_scratchpad({a}, {digit}) is {f(a, digit)!r}, expected {steps!r}"


@law(
    "corpus.times_scratchpad",
    "units come first, and carries are added",
    hint="go through reversed(str(a)); carry = result // 10",
)
def _(f):
    for a, digit, steps in (
        (47, 8, "7*8=56,4*8+5=37"),
        (12, 3, "2*3=6,1*3=3"),
        (208, 5, "8*5=40,0*5+4=4,2*5=10"),
    ):
        assert f(a, digit) == steps, f"times_scratchpad({a}, {digit}) is {f(a, digit)!r}, expected {steps!r}"


@law(
    "corpus.times_scratchpad",
    "the steps spell the product",
    hint="the last step counts whole, the others by their last digit",
)
def _(f):
    for a in (9, 10, 99, 405, 12345):
        for digit in range(1, 10):
            results = [step.rpartition("=")[2] for step in f(a, digit).split(",")]
            spelt = results[-1] + "".join(result[-1] for result in reversed(results[:-1]))
            assert int(spelt) == a * digit, f"the steps of {a}*{digit} spell {spelt}, not {a * digit}"


def _lines(data: bytes, limit: int) -> list[bytes | None]:
    lines = data.split(b"\n")
    lines = lines[:-1] if not lines[-1] else lines
    return [None if len(line) > limit else line for line in lines]


@law(
    "corpus.lines",
    "one chunk, short lines",
    hint="split at b'\\n'; what stands behind the last one is a line if it is not empty",
)
def _(f):
    for data in (b"", b"a\nbc\n", b"a\nbc", b"\n\nx\n"):
        assert f([data], 100) == _lines(data, 100), f"lines([{data!r}], 100) is {f([data], 100)!r}"


@law("corpus.lines", "it does not matter where chunks end", hint="keep the rest of a chunk for the next one")
def _(f):
    data = b"first\n\nsecond line\nthird\nx"
    for size in range(1, 8):
        chunks = [data[i : i + size] for i in range(0, len(data), size)]
        assert f(chunks, 100) == _lines(data, 100), f"chunks of {size} bytes give {f(chunks, 100)!r}"


@law(
    "corpus.lines",
    "a line above the limit is None, one at the limit is not",
    hint="compare len(line) > limit; then go on behind the line end",
)
def _(f):
    data = b"12345\n123456\n1\n1234567890123\nend"
    for size in (1, 3, 100):
        chunks = [data[i : i + size] for i in range(0, len(data), size)]
        assert f(chunks, 5) == _lines(data, 5), f"limit 5, chunks of {size}: {f(chunks, 5)!r}"


@law(
    "corpus.lines",
    "memory is bounded",
    hint="forget the beginning of a line as soon as it is above the limit",
)
def _(f):
    import tracemalloc

    chunk = b"a" * 10_000
    tracemalloc.start()
    try:
        found = f((chunk for _ in range(500)), 1000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == [None], f"a line of 5 MB without an end gives {found!r:.60}"
    assert peak < 500_000, f"it held {peak} bytes of a line of 5 MB, with a limit of 1000"


def _read_plot(table: str) -> tuple[Any, list[tuple[str, int, str, int]]]:
    from minillm.world import stories

    plot = stories.parse_plot(table)
    return plot, [
        (lang, wording, template, step)
        for lang in ("en", "zh")
        for step, line in enumerate(plot.lines)
        for wording, template in enumerate(line.wordings(lang))
    ]


@law(
    "corpus.plot",
    "it can be parsed",
    hint="a head 'name: roles', lines 'English || 中文', questions 'Q ask = answer || 问 = 答'",
)
def _(table):
    plot, _ = _read_plot(table)
    assert set(plot.roles) == {"a", "b", "x=toy", "p"}, (
        f"its roles are {' '.join(plot.roles)}, not a b x=toy p"
    )


@law("corpus.plot", "three sentences and two questions", hint="write one more")
def _(table):
    plot, _ = _read_plot(table)
    assert len(plot.lines) >= 3, f"it has {len(plot.lines)} sentences"
    assert len(plot.questions) >= 2, f"it has {len(plot.questions)} questions"


@law(
    "corpus.plot", "each language names every role", hint="a role that no sentence names cannot be read back"
)
def _(table):
    from minillm.world import reading

    plot, _ = _read_plot(table)
    for lang in ("en", "zh"):
        rules = reading.plot_rules(plot, lang)
        certain = {step for step, line in enumerate(plot.lines) if not line.optional}
        named = {role for _, _, step, groups in rules if step in certain for role, _ in groups}
        missing = sorted({"a", "b", "x", "p"} - named)
        assert not missing, f"no certain sentence in {lang!r} names {', '.join(missing)}"


@law(
    "corpus.plot",
    "told in either language, it can be read back",
    hint="look at the sentence in the message: is a slot misspelt?",
)
def _(table):
    from minillm import corpus
    from minillm.world import reading, stories

    plot, wordings = _read_plot(table)
    rules = {lang: reading.plot_rules(plot, lang) for lang in ("en", "zh")}
    for seed in range(30):
        plan = stories.fill_roles(plot, corpus.dice("check", seed))
        for lang, _, template, step in wordings:
            sentence = template.format_map(stories.word_forms(plan, lang))
            read = [
                (rule, hit)
                for rule in rules[lang]
                if rule[2] == step and (hit := rule[0].fullmatch(sentence))
            ]
            assert read, f"not read back: {sentence}"
            words = reading.surface_words(lang)
            for (_, _, _, groups), hit in read[:1]:
                for (role, kind), word in zip(groups, hit.groups()):
                    value = words[kind][word] if role else None
                    assert not role or value == plan[role], (
                        f"{role} is read as {value}, not {plan[role]}: {sentence}"
                    )


@law(
    "corpus.plot",
    "a question and its answer are about the same world in both languages",
    hint="let both languages use the same roles in a question and its answer",
)
def _(table):
    import re

    plot, _ = _read_plot(table)
    for question in plot.questions:
        slots = {
            lang: [{slot[-1] for slot in re.findall(r"\{(\w+)\}", text)} for text in question[lang]]
            for lang in ("en", "zh")
        }
        assert slots["en"] == slots["zh"], f"the slots differ: {question['en']} {question['zh']}"
        assert slots["en"][1], f"the answer is the same in every world: {question['en'][1]}"
