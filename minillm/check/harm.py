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


@law("harm.luhn_valid", "the example of ISO/IEC 7812-1", hint="double every second digit, from the right")
def _(f):
    assert f("79927398713"), "79927398713 is valid"
    for digit in "012456789":
        assert not f(f"7992739871{digit}"), f"7992739871{digit} is not valid"


@law("harm.luhn_valid", "a doubled 5 is 1", hint="take 9 off what exceeds 9")
def _(f):
    for number in ("59", "4012888888881881", "5555555555554444", "0"):
        assert f(number), f"{number} is valid"


@law("harm.luhn_valid", "one wrong digit is always seen", hint="count from the right, whatever the length")
def _(f):
    r = random.Random(5)
    for _ in range(60):
        start = "".join(str(r.randint(0, 9)) for _ in range(r.randint(1, 18)))
        valid = [d for d in "0123456789" if f(start + d)]
        assert len(valid) == 1, f"{start}: {len(valid)} last digits are valid, expected one"
        place = r.randrange(len(start))
        other = str((int(start[place]) + r.randint(1, 9)) % 10)
        wrong = start[:place] + other + start[place + 1 :] + valid[0]
        assert not f(wrong), f"{wrong} differs in one digit from {start + valid[0]}, and passes"


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


def _moved(place):
    return None if place is None else tuple(place)


@law("harm.moved", "the case of the chapter", hint="15 characters become 7")
def _(f):
    got = _moved(f((43, 46), [(9, 24, 7)]))
    assert got == (35, 38), f"got {got}, expected (35, 38)"


@law("harm.moved", "what lies before a span stays", hint="only spans that end before the answer move it")
def _(f):
    for answer in ((0, 4), (5, 9)):
        got = _moved(f(answer, [(9, 24, 7)]))
        assert got == answer, f"{answer} went to {got}"


@law(
    "harm.moved",
    "what lost a character is gone",
    hint="two spans overlap if each starts before the other ends",
)
def _(f):
    for answer in ((9, 12), (8, 10), (23, 30), (0, 40), (12, 13)):
        got = _moved(f(answer, [(9, 24, 7)]))
        assert got is None, f"{answer} overlaps [9, 24) and went to {got}"


@law(
    "harm.moved", "the text at the new place is the old one", hint="add up the shifts of all spans before it"
)
def _(f):
    r = random.Random(6)
    for _ in range(50):
        text = "".join(r.choice("abcdefgh ") for _ in range(60))
        cuts = sorted(r.sample(range(61), 6))
        spans = [(cuts[k], cuts[k + 1], r.randint(2, 9)) for k in (0, 2, 4)]
        out, at = "", 0
        for first, last, n in spans:
            out, at = out + text[at:first] + "#" * n, last
        out += text[at:]
        start, end = sorted(r.sample(range(61), 2))
        if all(last <= start or end <= first for first, last, _ in spans):
            new = _moved(f((start, end), spans))
            assert new is not None, f"{(start, end)} lost nothing to {spans}"
            assert out[slice(*new)] == text[start:end], f"{(start, end)} went to {new} with {spans}"


@law("harm.swap_gap", "a scorer that is blind to the word has none", hint="put each word at the {}")
def _(f):
    got = f(lambda text: 0.25 * ("door" in text), "A {} man opened the door.", ["tall", "quiet"])
    assert got == 0, f"got {got}"


@law("harm.swap_gap", "the largest difference, in any order", hint="the largest score less the smallest")
def _(f):
    scores = {"a": 0.5, "b": 0.1, "c": 0.7}
    for words in (["a", "b", "c"], ["c", "b", "a"], ["b", "c", "a"]):
        got = f(lambda text: scores[text.split()[1]], "The {} sang.", words)
        assert abs(got - 0.6) < 1e-9, f"got {got} for scores {[scores[w] for w in words]}, expected 0.6"


@law("harm.swap_gap", "every {} of the sentence is filled", hint="replace all of them")
def _(f):
    seen = []
    f(lambda text: seen.append(text) or 0.0, "The {} met a {}.", ["fox", "cat"])
    assert sorted(seen) == ["The cat met a cat.", "The fox met a fox."], f"the scorer was asked about {seen}"
