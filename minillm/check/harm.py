"""Laws of chapter 05."""

import random
import time

from minillm.check import law


@law("harm.identity_check", "the standard's own example ends in X", hint="weights are 2^(18-k) modulo 11")
def _(f):
    assert f("11010519491231002") == "X", f"got {f('11010519491231002')!r}"


@law(
    "harm.identity_check",
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


@law("harm.identity_check", "reads only the first 17 characters", hint="a whole number may be given")
def _(f):
    assert f("110105194912310021") == "X", "the eighteenth character has no part in it"


def _found(f, text):
    return [text[start:end] for start, end in f(text)]


@law("harm.find_email", "finds an address in an English sentence", hint="something, @, something with a dot")
def _(f):
    got = _found(f, "Write to bob.smith+x@mail.example.com today, or to a@b.org.")
    assert got == ["bob.smith+x@mail.example.com", "a@b.org"], f"found {got}"


@law(
    "harm.find_email",
    "finds nothing where there is none",
    hint="both sides, and a dot with letters after it",
)
def _(f):
    for text in ("", "at 5 @ noon", "@home", "me@", "a@b", "x@1.2"):
        assert list(f(text)) == [], f"found {_found(f, text)} in {text!r}"


@law(
    "harm.find_email",
    "finds an address between Chinese characters",
    hint=r"name the letters that may occur, A-Z and a-z; \b and \w take 信 for one of them",
)
def _(f):
    for text in ("请写信到bob55@example.org，鲍勃会回复。", "邮箱bob55@example.org谢谢"):
        got = _found(f, text)
        assert got == ["bob55@example.org"], f"found {got} in {text}"


@law(
    "harm.find_email",
    "fifty thousand letters without @ take a moment",
    hint="a bound on each repetition, and a lookbehind so that a run is tried once",
)
def _(f):
    for text in ("a" * 50_000, "a." * 25_000, "a@" * 25_000, "a@a." * 12_500):
        start = time.process_time()
        f(text)
        assert time.process_time() - start < 0.3, f"more than 0.3 seconds on {text[:8]!r} …"
