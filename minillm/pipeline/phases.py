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
from typing import Any

from minillm.corpus import Document


@dataclass(frozen=True)
class Phase:
    """Steps between two looks at the whole collection.

    `enter` applies what was decided about the collection, `steps` work document by document, `leave` makes the sketches
    for the next decision.
    """

    enter: Any
    steps: tuple[Any, ...]
    leave: Any

    @property
    def acting(self) -> tuple[Any, ...]:
        """The steps that change or drop documents here, in order."""
        return (*((self.enter,) if self.enter is not None else ()), *self.steps)


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
    phases, enter, plain = [], None, []
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
            phases.append(Phase(enter, tuple(plain), step))
            enter, plain = step, []
        else:
            plain.append(step)
    return [*phases, Phase(enter, tuple(plain), None)]


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


@dataclass(frozen=True)
class Rules:
    """How a run treats what goes wrong, and what it keeps."""

    on_error: str = "skip"
    keep_dropped: bool = False
    seconds_per_document: float = 60.0


Counted = tuple[Document, int]  # a document and its number of words
