"""Judge an exercise by the laws that the package itself must obey.

    >>> from minillm.check import check
    >>> check("norm.rms_norm", my_rms_norm)      # doctest: +SKIP

A law is a short function that takes the thing under test and asserts one property of it. `minillm/check/<module>.py`
registers the laws of one chapter; `tests/` runs the same laws on the package's own code, and on wrong versions of it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Law", "Report", "check", "law", "laws"]

_LAWS: dict[str, list[Law]] = {}


@dataclass(frozen=True, kw_only=True)
class Law:
    """One property of one exercise. Calling it with a candidate raises where the property does not hold."""

    exercise: str
    name: str
    hint: str
    test: Callable[[Any], None]

    def __call__(self, candidate: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.test(candidate)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `check` found: the laws in order, each with None or the reason why it does not hold."""

    exercise: str
    reasons: dict[Law, str | None]

    @property
    def passed(self) -> bool:
        return not any(self.reasons.values())

    def _ipython_display_(self) -> None:
        """A notebook shows nothing more: `check` has printed the report."""

    def __str__(self) -> str:
        good = sum(reason is None for reason in self.reasons.values())
        lines = [f"{self.exercise}: {good} of {len(self.reasons)} laws hold"]
        for law, reason in self.reasons.items():
            lines.append(f"  {'yes' if reason is None else 'NO '}  {law.name}")
            if reason is not None:
                lines += [f"       {reason}", f"       hint: {law.hint}"]
                break  # the laws go from simple to subtle: the first broken one is the one to read
        return "\n".join(lines)


def law(exercise: str, name: str, *, hint: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register the decorated function as a law of `exercise` ("module.name"), after those that it already has."""

    def register(test: Callable[[Any], None]) -> Callable[[Any], None]:
        _LAWS.setdefault(exercise, []).append(Law(exercise=exercise, name=name, hint=hint, test=test))
        return test

    return register


def laws(exercise: str) -> list[Law]:
    """The laws of an exercise, from simple to subtle.

    Raises:
        ValueError: there is no such exercise; the message lists those of its chapter.
    """
    module = exercise.partition(".")[0]
    try:
        importlib.import_module(f"minillm.check.{module}")
    except ModuleNotFoundError as error:
        if error.name != f"minillm.check.{module}":
            raise
        raise ValueError(
            f"no exercises for chapter {module!r}; write check('norm.rms_norm', yours)"
        ) from None
    if exercise not in _LAWS:
        known = ", ".join(sorted(name for name in _LAWS if name.startswith(module + ".")))
        raise ValueError(f"no exercise {exercise!r}; chapter {module!r} has {known}")
    return list(_LAWS[exercise])


def check(exercise: str, candidate: Any, *, quiet: bool = False) -> Report:
    """Hold a candidate against every law of an exercise and print the first that it breaks, with a hint.

    Args:
        exercise: "module.name", as the chapter's exercise gives it.
        candidate: your function or class.
        quiet: return the report without printing it.

    Returns:
        The report; `report.passed` is True when every law holds.
    """
    reasons: dict[Law, str | None] = {}
    for rule in laws(exercise):
        try:
            rule(candidate)
            reasons[rule] = None
        except Exception as error:  # a candidate may fail in any way at all; the reader must see which
            text = (str(error).strip().splitlines() or [""])[0]
            reasons[rule] = (
                text if isinstance(error, AssertionError) and text else f"{type(error).__name__}: {text}"
            )
    report = Report(exercise=exercise, reasons=reasons)
    if not quiet:
        print(report)
    return report


def close(
    actual: Any, expected: torch.Tensor, *, rtol: float = 1e-4, atol: float = 1e-5, what: str = "value"
) -> None:
    """Assert that two tensors have one shape and one dtype and agree, with a message that a reader can use."""
    assert isinstance(actual, torch.Tensor), f"expected a tensor, got {type(actual).__name__}"
    assert actual.shape == expected.shape, (
        f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    if not torch.allclose(actual, expected, rtol=rtol, atol=atol, equal_nan=False):
        worst = (actual.double() - expected.double()).abs().max().item()
        raise AssertionError(f"{what}: largest difference {worst:.2g}")
