"""Laws of chapter 04."""

import math
import random
import time

import numpy as np

from minillm.check import law


@law("detect.perplexity", "four equally likely tokens: 4", hint="the mean surprise, and exp of it")
def _(f):
    got = f([math.log(1 / 4)] * 7)
    assert abs(got - 4) < 1e-9, f"got {got} for seven tokens of probability 1/4, expected 4"


@law(
    "detect.perplexity", "the geometric mean of one over the probabilities", hint="the mean is of logarithms"
)
def _(f):
    got = f([math.log(0.5), math.log(0.125)])
    assert abs(got - 4) < 1e-9, f"got {got} for probabilities 1/2 and 1/8, expected 4"


@law("detect.perplexity", "a text said twice has the same", hint="a mean, not a sum")
def _(f):
    r = random.Random(0)
    for _ in range(20):
        log_probs = [math.log(r.uniform(0.01, 1)) for _ in range(r.randint(1, 20))]
        once, twice = f(log_probs), f(log_probs * 2)
        assert abs(once - twice) < 1e-9 * once, f"{once} once, {twice} twice"


@law("detect.auroc", "perfect, reversed and blind", hint="count the pairs in which the positive is above")
def _(f):
    for negative, positive, expected in (([1, 2], [3, 4], 1), ([3, 4], [1, 2], 0), ([1, 4], [2, 3], 0.5)):
        got = f(negative, positive)
        assert abs(got - expected) < 1e-9, f"got {got} for {negative}, {positive}; expected {expected}"


@law("detect.auroc", "ties count half", hint="a tie is half a pair")
def _(f):
    got = f([1, 2, 2], [2, 2])
    assert abs(got - 4 / 6) < 1e-9, f"got {got}, expected {4 / 6:.4f}"


@law("detect.auroc", "equals the share of pairs", hint="sort once, then look up where each score stands")
def _(f):
    r = random.Random(3)
    for _ in range(20):
        low, high = ([r.randint(0, 9) for _ in range(r.randint(1, 30))] for _ in range(2))
        pairs = sum((a < b) + (a == b) / 2 for a in low for b in high) / (len(low) * len(high))
        assert abs(f(low, high) - pairs) < 1e-9, f"got {f(low, high)}, expected {pairs}"


@law("detect.auroc", "three thousand scores take a moment", hint="no loop over pairs: sort, then search")
def _(f):
    r = random.Random(4)
    low, high = ([r.random() for _ in range(3_000)] for _ in range(2))
    start = time.process_time()
    f(low, high)
    assert time.process_time() - start < 0.5, "more than half a second"


@law("detect.logistic_step", "the step of the chapter", hint="w + 1/2, b stays")
def _(f):
    w, b = f(np.zeros(1), 0.0, np.array([[1.0], [-1.0]]), np.array([1.0, 0.0]), 1.0)
    assert max(abs(w[0] - 0.5), abs(b)) < 1e-9, f"got w={w}, b={b}; expected 0.5 and 0"


def _loss(w, b, x, y):
    p = 1 / (1 + np.exp(-(x @ w + b)))
    paid = -np.where(y == 1, np.log(p), np.log(1 - p))
    return (paid[y == 1].mean() + paid[y == 0].mean()) / 2


@law("detect.logistic_step", "both classes weigh one half", hint="divide by the number of texts of the class")
def _(f):
    x, y = np.array([[1.0], [-1.0], [-1.0], [-1.0]]), np.array([1.0, 0.0, 0.0, 0.0])
    w, b = f(np.zeros(1), 0.0, x, y, 1.0)
    assert max(abs(w[0] - 0.5), abs(b)) < 1e-9, f"one human text three times: got w={w}, b={b}"


@law("detect.logistic_step", "is the gradient of the loss", hint="error times input, at the weights given")
def _(f):
    r = np.random.default_rng(0)
    for _ in range(10):
        x, w, b = r.normal(size=(8, 3)), r.normal(size=3), float(r.normal())
        y = np.array([0.0, 1.0, *r.integers(0, 2, 6)])
        new_w, new_b = f(w.copy(), b, x, y, 0.1)
        for k, (new, old) in enumerate(zip([*new_w, new_b], [*w, b], strict=True)):
            nudge = np.zeros(4)
            nudge[k] = 1e-5
            up, down = (_loss(w + s * nudge[:3], b + s * nudge[3], x, y) for s in (1, -1))
            want = old - 0.1 * (up - down) / 2e-5
            assert abs(new - want) < 1e-6, f"place {k} went to {new}, the gradient leads to {want}"


@law(
    "detect.precision",
    "the case of the chapter",
    hint="of 1,000 documents, 9 found and 99 accused for nothing",
)
def _(f):
    got = f(0.01, 0.9, 0.1)
    assert abs(got - 9 / 108) < 1e-9, f"got {got}, expected {9 / 108:.4f}"


@law(
    "detect.precision",
    "a coin that accuses every second text is right at the base rate",
    hint="recall = false alarms",
)
def _(f):
    for rate in (0.001, 0.2, 0.7):
        assert abs(f(rate, 0.5, 0.5) - rate) < 1e-9, f"got {f(rate, 0.5, 0.5)} at a base rate of {rate}"


@law("detect.precision", "who accuses nobody is never wrong", hint="nothing over nothing counts as 1")
def _(f):
    assert f(0.3, 0.0, 0.0) == 1, f"got {f(0.3, 0.0, 0.0)}"
    assert f(0.0, 0.9, 0.1) == 0, f"got {f(0.0, 0.9, 0.1)} where there are no machines"
