"""How the command line reads its words and says its lines."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro


def parse(kind: Any, **options: Any) -> Any:
    """`tyro.cli`, except that a value which a dataclass refuses is an error of ours: one line."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(kind, **options)
    except SystemExit as stop:
        cause: BaseException | None = stop
        while cause is not None and not isinstance(cause, ValueError):
            cause = cause.__context__
        if isinstance(cause, ValueError):
            raise cause from None
        sys.stderr.write(printed.getvalue())
        raise


def parse_parts(parts: Sequence[Any], **options: Any) -> list[Any]:
    """The settings of several dataclasses from one line of words, as if they were one.

    Args:
        parts: a dataclass each, whose values are the defaults; a sub-config of one is named by its field, as `--train.steps`.
        options: of `tyro.cli`.

    Returns:
        The parts again, with what the words say.
    """
    fields = [
        (
            f"part{number}",
            Annotated[type(part), tyro.conf.arg(name="")],
            dataclasses.field(default_factory=lambda part=part: part),
        )
        for number, part in enumerate(parts)
    ]
    found = parse(dataclasses.make_dataclass("Args", fields), **options)
    return [getattr(found, name) for name, _, _ in fields]


def value_of(option: str, words: Sequence[str], default: str) -> str:
    """The value of an option, looked up before the words are parsed: it decides about the defaults of the others."""
    value = default
    for index, word in enumerate(words):
        if word == option and index + 1 < len(words):
            value = words[index + 1]
        elif word.startswith(f"{option}="):
            value = word.partition("=")[2]
    return value


def say(line: str) -> None:
    """Print a line at once, through a pipe too."""
    print(line, flush=True)
