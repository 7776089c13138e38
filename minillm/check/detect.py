"""Laws of chapter 04."""

import random
import time

from minillm.check import law


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
