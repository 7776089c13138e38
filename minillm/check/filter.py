"""Laws of chapter 03."""

import math
import random
import time

from minillm.check import law


@law("filter.allowed", "the chapter's example", hint="solve the formula of the precision for f")
def _(f):
    got = f(0.01, 0.9, 0.5)
    assert abs(got - 1 / 110) < 1e-9, f"got {got}, expected {1 / 110:.5f}: 9 of 990"


@law("filter.allowed", "it gives the precision that was asked for", hint="found against found and accused")
def _(f):
    for base, recall, precision in ((0.2, 1, 0.9), (0.001, 0.5, 0.99), (0.5, 0.7, 0.5)):
        got = f(base, recall, precision)
        really = base * recall / (base * recall + (1 - base) * got)
        assert abs(really - precision) < 1e-9, f"precision {really}, asked for {precision}"


@law("filter.allowed", "a share is never above 1", hint="where nearly all is bad, all may be accused")
def _(f):
    assert f(0.9, 1, 0.5) == 1, f"got {f(0.9, 1, 0.5)} where 90 % are bad and half may be wrong"
    assert f(0.3, 1, 1) == 0, "a precision of 1 allows no false alarm"


@law("filter.repeated_share", "the chapter's example", hint="ab twice, with its blank; the second without")
def _(f):
    got = f(["a", "b", "a", "b", "a", "c"], 2, 11)
    assert got == (6 / 11, 2 / 11), f"got {got}, expected (6/11, 2/11)"


@law("filter.repeated_share", "what occurs once is no repetition", hint="(0, 0) if no run comes twice")
def _(f):
    for words, n in (("the old lamp stood there", 2), ("one", 2), ("", 3), ("a b", 2)):
        got = f(words.split(), n, max(1, len(words)))
        assert tuple(got) == (0, 0), f"got {got} for {words!r}"


@law("filter.repeated_share", "repetitions do not overlap", hint="after a repeated run go on behind it")
def _(f):
    got = f(["x"] * 6, 2, 11)
    assert abs(got[1] - 4 / 11) < 1e-9, f"{got[1] * 11:g} of 11 characters in x x x x x x, expected 4"


def _slow_share(words, n, total):
    runs = [words[i : i + n] for i in range(len(words) - n + 1)]
    counts = [runs.count(run) for run in runs]
    if max(counts, default=0) < 2:
        return 0.0, 0.0
    repeated, at = 0, 0
    fresh = []
    while at < len(runs):
        if runs[at] in fresh:
            repeated += n
            at += n
        else:
            fresh.append(runs[at])
            at += 1
    return (2 * n - 1) * max(counts) / total, repeated / total


@law(
    "filter.repeated_share",
    "equals a slow version",
    hint="one letter a word: a run of n has 2n - 1 characters",
)
def _(f):
    r = random.Random(5)
    for _ in range(100):
        words, n = [r.choice("abc") for _ in range(r.randint(1, 30))], r.randint(1, 4)
        got, expected = f(words, n, 100), _slow_share(words, n, 100)
        assert all(abs(a - b) < 1e-9 for a, b in zip(got, expected)), (
            f"got {got} for {' '.join(words)}, runs of {n}, expected {expected}"
        )


@law("filter.repeated_share", "ten thousand words take a moment", hint="count in a dict, remember in a set")
def _(f):
    words = [str(n) for n in range(5_000)] * 2
    start = time.process_time()
    f(words, 3, 50_000)
    assert time.process_time() - start < 0.5, "more than half a second"


@law("filter.surely_below", "a short text is never accused", hint="0.88 to the power of 23 is above 0.05")
def _(f):
    for n in range(1, 24):
        assert not f(0, n, 0.12), f"0 of {n} lines was accused"


@law("filter.surely_below", "a long one is", hint="0.88 to the power of 24 is below 0.05")
def _(f):
    for k, n in ((0, 24), (1, 60), (5, 100)):
        assert f(k, n, 0.12), f"{k} of {n} lines was not accused"


@law("filter.surely_below", "it is the sum", hint="all terms from 0 to k, and no normal curve in their place")
def _(f):
    r = random.Random(6)
    for _ in range(300):
        n, p = r.randint(1, 60), r.choice((0.05, 0.12, 0.3))
        k = r.randint(0, n)
        chance = sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))
        assert bool(f(k, n, p)) == (chance < 0.05), f"{k} of {n} at {p}: the sum is {chance:.3f}"


@law("filter.surely_below", "ten thousand lines are no trouble", hint="binomials overflow: add up logarithms")
def _(f):
    start = time.process_time()
    assert f(1_100, 10_000, 0.12), "1,100 of 10,000 was not accused"
    assert not f(1_160, 10_000, 0.12), "1,160 of 10,000 was accused"
    assert time.process_time() - start < 0.5, "more than half a second"


def _variant(f, text, expected):
    assert f(text) == expected, f"{text}: got {f(text)!r}, expected {expected!r}"


@law("filter.han_variant", "one way of writing", hint="count the characters that only one way has")
def _(f):
    _variant(f, "蓝色的蜡烛", "simplified")
    _variant(f, "藍色的蠟燭", "traditional")


@law("filter.han_variant", "most characters tell nothing", hint="山 and 水 are written alike in both")
def _(f):
    for text in ("山上有水", "", "12 + 30"):
        _variant(f, text, "")


@law("filter.han_variant", "one slip does not decide", hint="below a fifth of the characters that tell")
def _(f):
    _variant(f, "国蓝烛开关门风马鸟鱼國", "simplified")
    _variant(f, "國藍燭開關門風馬鳥魚国", "traditional")


@law(
    "filter.han_variant",
    "a mixture is both",
    hint="shares of the characters that tell, not of the whole text",
)
def _(f):
    _variant(f, "蓝藍红紅", "both")
    _variant(f, "山上有水山上有水山上有水蓝藍", "both")
