"""Laws of chapter 00."""

import math

from minillm.check import law


def _near(actual, expected, what, tolerance=1e-6):
    assert isinstance(actual, (int, float)), f"{what}: expected a number, got {type(actual).__name__}"
    assert math.isclose(actual, expected, rel_tol=tolerance, abs_tol=tolerance), (
        f"{what}: {actual:.6g}, expected {expected:.6g}"
    )


@law("evolution.gain", "no change is no gain", hint="return two numbers: points, percent")
def _(f):
    for value in f(40.0, 40.0):
        _near(value, 0.0, "gain(40, 40)")


@law("evolution.gain", "points are a difference", hint="points: after - before")
def _(f):
    _near(f(40.63, 47.86)[0], 7.23, "points of 40.63 -> 47.86")
    _near(f(50.0, 40.0)[0], -10.0, "points of 50 -> 40")


@law(
    "evolution.gain",
    "percent are a ratio",
    hint="percent: the difference divided by where it started, times 100",
)
def _(f):
    _near(f(50.0, 75.0)[1], 50.0, "percent of 50 -> 75")
    _near(f(4.82, 32.37)[1], 100 * 27.55 / 4.82, "percent of 4.82 -> 32.37")


@law(
    "evolution.gain",
    "percent are not symmetric",
    hint="divide by the first number, not by the second or the mean",
)
def _(f):
    _near(f(20.0, 40.0)[1], 100.0, "percent of 20 -> 40")
    _near(f(40.0, 20.0)[1], -50.0, "percent of 40 -> 20")


@law(
    "evolution.above_chance",
    "guessing is worth nothing",
    hint="subtract the score of guessing: 100 / n_choices",
)
def _(f):
    _near(f(25.0, 4), 0.0, "25 % of four choices")
    _near(f(50.0, 2), 0.0, "50 % of two choices")


@law(
    "evolution.above_chance",
    "a perfect score is worth 100",
    hint="divide by what is left above chance, times 100",
)
def _(f):
    for n_choices in (2, 4, 5):
        _near(f(100.0, n_choices), 100.0, f"100 % of {n_choices} choices")


@law("evolution.above_chance", "is linear between", hint="(score - chance) / (100 - chance), times 100")
def _(f):
    _near(f(62.5, 4), 50.0, "62.5 % of four choices, half of the way from 25 to 100")
    _near(f(47.86, 4), 100 * 22.86 / 75, "47.86 % of four choices")


@law("evolution.above_chance", "worse than guessing is negative", hint="do not clip")
def _(f):
    assert f(10.0, 4) < 0, f"10 % of four choices is worth {f(10.0, 4):.3g}, expected a negative number"


@law(
    "evolution.standard_error",
    "one certain answer has none",
    hint="the variance of a right-or-wrong answer is p (1 - p)",
)
def _(f):
    _near(f(0.0, 100), 0.0, "standard error of 0 %")
    _near(f(100.0, 100), 0.0, "standard error of 100 %")


@law(
    "evolution.standard_error",
    "is in points",
    hint="score and result are in percent: p = score / 100, and back times 100",
)
def _(f):
    _near(f(50.0, 100), 5.0, "standard error of 50 % of 100 questions")


@law("evolution.standard_error", "falls with the root of the number", hint="sqrt(p (1 - p) / n)")
def _(f):
    _near(f(30.0, 400), f(30.0, 100) / 2, "four times the questions")
    _near(
        f(32.37, 1319), 100 * math.sqrt(0.3237 * 0.6763 / 1319), "standard error of 32.37 % of 1319 questions"
    )
