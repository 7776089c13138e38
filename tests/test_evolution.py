import math

import pytest

from minillm.check import check, laws


def gain(before, after):
    return after - before, 100 * (after / before - 1)


def above_chance(score, n_choices):
    chance = 100 / n_choices
    return 100 * (score - chance) / (100 - chance)


def standard_error(score, n):
    return 100 * math.sqrt(score / 100 * (1 - score / 100) / n)


SOLUTIONS = {
    "evolution.gain": gain,
    "evolution.above_chance": above_chance,
    "evolution.standard_error": standard_error,
}


@pytest.mark.parametrize(
    ("exercise", "law"), [(name, law) for name in SOLUTIONS for law in laws(name)], ids=str
)
def test_solutions_obey_their_laws(exercise, law):
    law(SOLUTIONS[exercise])


@pytest.mark.parametrize(
    ("exercise", "wrong", "broken"),
    [
        ("gain", lambda a, b: (1.0, 0.0), "no change is no gain"),
        ("gain", lambda a, b: (a - b, 100 * (b / a - 1)), "points are a difference"),
        ("gain", lambda a, b: (b - a, b - a), "percent are a ratio"),
        (
            "gain",
            lambda a, b: (b - a, 100 * (b / a - 1) if b > a else 100 * (1 - a / b)),
            "percent are not symmetric",
        ),
        ("above_chance", lambda s, n: s, "guessing is worth nothing"),
        ("above_chance", lambda s, n: s - 100 / n, "a perfect score is worth 100"),
        ("above_chance", lambda s, n: 100 * ((s - 100 / n) / (100 - 100 / n)) ** 3, "is linear between"),
        ("above_chance", lambda s, n: max(0.0, above_chance(s, n)), "worse than guessing is negative"),
        ("standard_error", lambda s, n: 1.0, "one certain answer has none"),
        ("standard_error", lambda s, n: standard_error(s, n) / 100, "is in points"),
        (
            "standard_error",
            lambda s, n: standard_error(s, n) * 10 / n**0.5,
            "falls with the root of the number",
        ),
    ],
)
def test_check_names_the_broken_law(exercise, wrong, broken):
    report = check(f"evolution.{exercise}", wrong, quiet=True)
    assert next(rule.name for rule, reason in report.reasons.items() if reason is not None) == broken
