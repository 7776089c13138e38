"""What a cleaning run does, in which order: steps that judge one document, and steps that need all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Phase:
    """Steps between two looks at the whole collection.

    `before` is the step that applies what was decided about the collection, `steps` work document by document, `after` is the
    step that makes the sketches for the next decision. Either may be None.
    """

    before: Any
    steps: tuple[Any, ...]
    after: Any

    @property
    def acting(self) -> tuple[Any, ...]:
        """The steps that change or drop documents here, in order."""
        return (*((self.before,) if self.before is not None else ()), *self.steps)


def is_corpus_step(step: Any) -> bool:
    """Whether a step needs the whole collection: it has `sketch`, `resolve` and `apply`."""
    return all(callable(getattr(step, name, None)) for name in ("sketch", "resolve", "apply"))


def is_step(step: Any) -> bool:
    """Whether something can be called with a document, or is a step for the whole collection."""
    return is_corpus_step(step) or callable(step)


def plan(steps: Sequence[Any]) -> list[Phase]:
    """Cut a list of steps into phases.

    Raises:
        ValueError: something in the list is no step, or two steps have one name.
    """
    phases, before, plain = [], None, []
    names = Counter(getattr(step, "name", None) for step in steps)
    for step in steps:
        if not (isinstance(getattr(step, "name", None), str) and is_step(step)):
            raise ValueError(
                f"{step!r} is no step: it needs a name, and __call__ or sketch, resolve and apply"
            )
        if names[step.name] > 1:
            raise ValueError(
                f"two steps are named {step.name!r}: the report could not tell them apart; rename one"
            )
        if is_corpus_step(step):
            phases.append(Phase(before, tuple(plain), step))
            before, plain = step, []
        else:
            plain.append(step)
    return [*phases, Phase(before, tuple(plain), None)]


def describe(step: Any) -> dict[str, Any]:
    """A step and its settings as JSON: what makes two runs the same run. Large values stand as a digest."""
    name = step.name
    if dataclasses.is_dataclass(step):
        settings = {f.name: getattr(step, f.name) for f in dataclasses.fields(step)}
    else:
        settings = {key: value for key, value in vars(step).items() if not key.startswith("_")}
    settings.pop("name", None)
    return {"step": name, "kind": type(step).__name__, **{k: _plain(v) for k, v in settings.items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    try:
        text = json.dumps(value, ensure_ascii=False)
        if len(text) < 2000:
            return json.loads(text)
        data = text.encode("utf-8", "surrogatepass")
    except (TypeError, ValueError):
        if isinstance(value, (frozenset, set)):
            return _plain(sorted(value))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return _plain({f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)})
        if isinstance(value, (list, tuple)):
            return _plain([_plain(part) for part in value])
        if callable(value) and hasattr(value, "__qualname__"):
            return f"{value.__module__}.{value.__qualname__}"
        data = pickle.dumps(value, protocol=4)
    return f"blake2b:{hashlib.blake2b(data, digest_size=8).hexdigest()}"


@dataclass(frozen=True, kw_only=True)
class FailurePolicy:
    """What a run does with documents on which something fails, and with those that it drops."""

    on_error: Literal["skip", "raise"] = "skip"
    """skip counts what cannot be read, names it with file and line, and goes on; raise stops at it."""
    keep_dropped: bool = False
    """Keep what was dropped, with step and reason, in dropped.jsonl.gz."""
    seconds_per_document: float = 60.0
    """A step that works longer on one document drops it; 0 for no limit."""

    def __post_init__(self) -> None:
        if self.on_error not in ("skip", "raise"):
            raise ValueError(f"on_error={self.on_error!r} must be 'skip' or 'raise'")
        if not 0 <= self.seconds_per_document < float("inf"):
            seconds = self.seconds_per_document
            raise ValueError(f"seconds_per_document={seconds} must be a number that is not negative")
