"""Ctrl-C, SIGTERM and SIGHUP: a run that is told to stop saves first."""

import contextlib
import logging
import signal
from collections.abc import Iterator
from typing import Any

log = logging.getLogger(__name__)


@contextlib.contextmanager
def catch_signals() -> Iterator[list[str]]:
    """Collect SIGINT, SIGTERM and SIGHUP in a list instead of dying; a second one acts as if nobody caught it.

    A signal that the process was told to ignore, as `nohup` does with SIGHUP, stays ignored.
    """
    caught: list[str] = []
    old: dict[int, Any] = {}

    def handle(number: int, frame: Any) -> None:
        caught.append(signal.Signals(number).name)
        for each, handler in old.items():
            signal.signal(each, handler)

    numbers = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)}
    try:
        for number in sorted(numbers):
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN:
                signal.signal(number, handle)
                old[number] = before or signal.SIG_DFL  # None: a handler that is not Python's
    except ValueError:  # not the main thread: Python delivers signals only there
        log.debug("signals are not caught outside the main thread")
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
