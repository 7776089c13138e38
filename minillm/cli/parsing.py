"""How the command line reads its words and says its lines."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Any

import tyro


def _parse(kind: Any, **options: Any) -> Any:
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


def _say(line: str) -> None:
    print(line, flush=True)
