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
