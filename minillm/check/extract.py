"""Laws of chapter 02."""

import itertools
import random

from minillm.check import law


def _best_sum(gains):
    return max(
        (sum(gains[i:j]) for i, j in itertools.combinations(range(len(gains) + 1), 2)), default=0
    )  # every run there is


@law(
    "extract.densest",
    "finds the run of the chapter's example",
    hint="3 + 8 - 2 + 10: a small loss is worth it",
)
def _(f):
    assert tuple(f([-6, 3, 8, -2, 10, -9])) == (1, 5), f"got {f([-6, 3, 8, -2, 10, -9])}, expected (1, 5)"


@law(
    "extract.densest", "no run is better", hint="start anew when the sum so far is below zero, never earlier"
)
def _(f):
    r = random.Random(0)
    for _ in range(200):
        gains = [r.randint(-9, 9) for _ in range(r.randint(1, 12))]
        first, last = f(gains)
        got, best = sum(gains[first:last]), max(0, _best_sum(gains))
        assert got == best, f"sum {got} in {gains}, best is {best}"


@law("extract.densest", "nothing but losses gives (0, 0)", hint="the empty run has sum 0")
def _(f):
    for gains in ([], [-1.0], [-3, -2, -5]):
        assert tuple(f(gains)) == (0, 0), f"got {f(gains)} for {gains}"


class _Counted(list):
    """A list that counts what is read from it, and stops a reader who reads too much."""

    reads = 0

    def count_reads(self, n):
        self.reads += n
        assert self.reads <= 10 * len(self), "reads each block more than ten times"

    def __iter__(self):
        for item in super().__iter__():
            self.count_reads(1)
            yield item

    def __getitem__(self, place):
        item = super().__getitem__(place)
        self.count_reads(len(item) if isinstance(place, slice) else 1)
        return item


@law("extract.densest", "one pass is enough", hint="one loop, and no sum() of a run inside it")
def _(f):
    r = random.Random(1)
    f(_Counted(r.uniform(-9, 8) for _ in range(2000)))


@law("extract.repair", "UTF-8 read as Latin-1 comes back", hint="encode as latin-1, decode as utf-8")
def _(f):
    for text in ("“Stay with me,” said Lucy.", "小明在花园里找到了一只风筝。", "déjà vu — naïve"):
        garbled = text.encode().decode("latin-1")
        assert f(garbled) == text, f"{garbled!r} became {f(garbled)!r}"


@law("extract.repair", "what is right stays", hint="if it does not encode, or does not decode, it was right")
def _(f):
    for text in (
        "plain",
        "",
        "déjà vu",
        "小明在花园里。",
        "straße, naïve, £5",
        "こんにちは",
        "Привет",
        "👋 hi",
    ):
        assert f(text) == text, f"{text!r} became {f(text)!r}"


@law(
    "extract.repair",
    "what lost a character is left alone",
    hint="a byte sequence that is cut does not decode",
)
def _(f):
    garbled = "小明".encode().decode("latin-1")[:-1]
    assert f(garbled) == garbled, f"{garbled!r} became {f(garbled)!r}"


@law("extract.token_f1", "the chapter's example", hint="twice what both have, by what each has")
def _(f):
    for found, truth, expected in (("a b c menu", "a b c", 6 / 7), ("水桶里", "水桶", 0.8), ("a", "b", 0)):
        got = f(found, truth)
        assert abs(got - expected) < 1e-9, f"got {got} for {found!r} and {truth!r}, expected {expected:.3f}"


@law(
    "extract.token_f1",
    "what was there once counts once",
    hint="bags, not sets: a Counter, or a list to cross out from",
)
def _(f):
    for found, truth, expected in (("a a", "a", 2 / 3), ("a a b", "a b b", 2 / 3), ("了了了", "了", 0.5)):
        got = f(found, truth)
        assert abs(got - expected) < 1e-9, f"got {got} for {found!r} and {truth!r}, expected {expected:.3f}"


@law("extract.token_f1", "nothing found where nothing was is right", hint="two empty bags are equal")
def _(f):
    assert f("", "") == 1, f"got {f('', '')} for two empty texts"
    assert f("", "a") == f("a", "") == 0, "nothing found, or nothing there: 0"


@law("extract.may_be_utf8", "whole text is", hint="it decodes")
def _(f):
    for text in ("", "plain", "déjà vu", "水桶里有三块石头", "👋"):
        assert f(text.encode()) is True, f"{text!r} in UTF-8 was refused"


@law("extract.may_be_utf8", "another code breaks the pattern", hint="UnicodeDecodeError says where, and why")
def _(f):
    for text, codec in (
        ("你好", "gbk"),
        ("联通", "gbk"),
        ("déjà vu", "latin-1"),
        ("水桶里", "big5"),
    ):
        data = text.encode(codec)
        assert f(data) is False, f"{data!r} is no UTF-8"


@law(
    "extract.may_be_utf8",
    "a last character may be cut",
    hint="the error's reason is another where the data ends too early",
)
def _(f):
    for text in ("水桶里", "a👋", "naïve é"):
        data = text.encode()
        for cut in range(len(data)):
            assert f(data[:cut]) is True, f"{data[:cut]!r} is the beginning of {text!r}"


@law(
    "extract.may_be_utf8",
    "only what has begun is forgiven",
    hint="bytes that no character begins with are not a cut",
)
def _(f):
    for data in (
        b"plain \xff",
        b"plain \x80",
        "水".encode() + b"\xc1",
        b"\xe6 b",
        b"a\xc3(",
        b"\xed\xa0\x80",
    ):
        assert f(data) is False, f"{data!r} is the beginning of nothing"
