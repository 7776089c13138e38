"""Laws of chapter 02."""

import itertools
import random
import time

from minillm.check import law


def _best_sum(gains):
    return max(
        (sum(gains[i:j]) for i, j in itertools.combinations(range(len(gains) + 1), 2)), default=0
    )  # every run there is


@law(
    "quality.densest",
    "finds the run of the chapter's example",
    hint="3 + 8 - 2 + 10: a small loss is worth it",
)
def _(f):
    assert tuple(f([-6, 3, 8, -2, 10, -9])) == (1, 5), f"got {f([-6, 3, 8, -2, 10, -9])}, expected (1, 5)"


@law(
    "quality.densest", "no run is better", hint="start anew when the sum so far is below zero, never earlier"
)
def _(f):
    r = random.Random(0)
    for _ in range(200):
        gains = [r.randint(-9, 9) for _ in range(r.randint(1, 12))]
        first, last = f(gains)
        got, best = sum(gains[first:last]), max(0, _best_sum(gains))
        assert got == best, f"sum {got} in {gains}, best is {best}"


@law("quality.densest", "nothing but losses gives (0, 0)", hint="the empty run has sum 0")
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


@law("quality.densest", "one pass is enough", hint="one loop, and no sum() of a run inside it")
def _(f):
    r = random.Random(1)
    f(_Counted(r.uniform(-9, 8) for _ in range(2000)))


@law("quality.identity_check", "the standard's own example ends in X", hint="weights are 2^(18-k) modulo 11")
def _(f):
    assert f("11010519491231002") == "X", f"got {f('11010519491231002')!r}"


@law(
    "quality.identity_check",
    "the 18 digits, weighted, are 1 modulo 11",
    hint="(12 - sum modulo 11) modulo 11, and X for ten",
)
def _(f):
    r = random.Random(2)
    for _ in range(100):
        digits = "".join(str(r.randint(0, 9)) for _ in range(17))
        value = "0123456789X".index(f(digits))
        total = sum(int(d) * 2 ** (17 - k) for k, d in enumerate(digits)) + value
        assert total % 11 == 1, f"{digits}{f(digits)}: {total % 11} modulo 11"


@law("quality.identity_check", "reads only the first 17 characters", hint="a whole number may be given")
def _(f):
    assert f("110105194912310021") == "X", "the eighteenth character has no part in it"


@law("quality.auroc", "perfect, reversed and blind", hint="count the pairs in which the positive is above")
def _(f):
    for negative, positive, expected in (([1, 2], [3, 4], 1), ([3, 4], [1, 2], 0), ([1, 4], [2, 3], 0.5)):
        got = f(negative, positive)
        assert abs(got - expected) < 1e-9, f"got {got} for {negative}, {positive}; expected {expected}"


@law("quality.auroc", "ties count half", hint="a tie is half a pair")
def _(f):
    got = f([1, 2, 2], [2, 2])
    assert abs(got - 4 / 6) < 1e-9, f"got {got}, expected {4 / 6:.4f}"


@law("quality.auroc", "equals the share of pairs", hint="sort once, then look up where each score stands")
def _(f):
    r = random.Random(3)
    for _ in range(20):
        low, high = ([r.randint(0, 9) for _ in range(r.randint(1, 30))] for _ in range(2))
        pairs = sum((a < b) + (a == b) / 2 for a in low for b in high) / (len(low) * len(high))
        assert abs(f(low, high) - pairs) < 1e-9, f"got {f(low, high)}, expected {pairs}"


@law("quality.auroc", "three thousand scores take a moment", hint="no loop over pairs: sort, then search")
def _(f):
    r = random.Random(4)
    low, high = ([r.random() for _ in range(3_000)] for _ in range(2))
    start = time.process_time()
    f(low, high)
    assert time.process_time() - start < 0.5, "more than half a second"


@law("quality.repair", "UTF-8 read as Latin-1 comes back", hint="encode as latin-1, decode as utf-8")
def _(f):
    for text in ("“Stay with me,” said Lucy.", "小明在花园里找到了一只风筝。", "déjà vu — naïve"):
        garbled = text.encode().decode("latin-1")
        assert f(garbled) == text, f"{garbled!r} became {f(garbled)!r}"


@law("quality.repair", "what is right stays", hint="if it does not encode, or does not decode, it was right")
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
    "quality.repair",
    "what lost a character is left alone",
    hint="a byte sequence that is cut does not decode",
)
def _(f):
    garbled = "小明".encode().decode("latin-1")[:-1]
    assert f(garbled) == garbled, f"{garbled!r} became {f(garbled)!r}"


def _found(f, text):
    return [text[start:end] for start, end in f(text)]


@law(
    "quality.find_email", "finds an address in an English sentence", hint="something, @, something with a dot"
)
def _(f):
    got = _found(f, "Write to bob.smith+x@mail.example.com today, or to a@b.org.")
    assert got == ["bob.smith+x@mail.example.com", "a@b.org"], f"found {got}"


@law(
    "quality.find_email",
    "finds nothing where there is none",
    hint="both sides, and a dot with letters after it",
)
def _(f):
    for text in ("", "at 5 @ noon", "@home", "me@", "a@b", "x@1.2"):
        assert list(f(text)) == [], f"found {_found(f, text)} in {text!r}"


@law(
    "quality.find_email",
    "finds an address between Chinese characters",
    hint=r"name the letters that may occur, A-Z and a-z; \b and \w take 信 for one of them",
)
def _(f):
    for text in ("请写信到bob55@example.org，鲍勃会回复。", "邮箱bob55@example.org谢谢"):
        got = _found(f, text)
        assert got == ["bob55@example.org"], f"found {got} in {text}"


@law(
    "quality.find_email",
    "fifty thousand letters without @ take a moment",
    hint="a bound on each repetition, and a lookbehind so that a run is tried once",
)
def _(f):
    for text in ("a" * 50_000, "a." * 25_000, "a@" * 25_000, "a@a." * 12_500):
        start = time.process_time()
        f(text)
        assert time.process_time() - start < 0.3, f"more than 0.3 seconds on {text[:8]!r} …"
