"""The command line: `minillm speedrun | pretrain | corpus | clean | generate | tokenizer | convert | info`. Bad input exits with 2 and one line."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence

from minillm import __version__
from minillm.base.errors import Interrupted, MiniLLMError

HELP = f"""minillm {__version__}: build a language model piece by piece, then train it.

  minillm speedrun             raw text -> tokenizer -> model -> report, in minutes
  minillm pretrain             the same up to the trained model
  minillm corpus               write the project's own corpus, with planted defects
  minillm clean IN             raw text -> clean text, and a report of what went and why
  minillm generate PROMPT      continue a prompt, or talk, with a trained model
  minillm tokenizer COMMAND    train a vocabulary; encode and decode text with it
  minillm convert FOLDER OUT   a published model into ours, or ours into a published format
  minillm info NAME            parameters, memory and FLOPs of a recipe, a run or a published model
  minillm info --attention     which attention kernel is taken, and why
  minillm info --plan          what a model needs on how many GPUs, by ZeRO stage

`minillm COMMAND --help` shows every setting with its default."""

COMMANDS: dict[str, tuple[str, str]] = {  # the module and function of each: imported when it is called
    "speedrun": ("runs", "_speedrun"),
    "pretrain": ("runs", "_pretrain"),
    "corpus": ("text", "_corpus"),
    "clean": ("text", "_clean"),
    "generate": ("talk", "_generate"),
    "tokenizer": ("tokenizer", "_tokenizer"),
    "convert": ("models", "_convert"),
    "info": ("models", "_info"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for bad input, 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if argv[0] == "--version":
        print(f"minillm {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"minillm: error: no command {argv[0]!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        from minillm.base.machine import set_up_logging

        set_up_logging()
        module, function = COMMANDS[argv[0]]
        return getattr(importlib.import_module(f"minillm.cli.{module}"), function)(argv[1:])
    except BrokenPipeError:  # the reader of a pipe, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Interrupted as stop:
        print(f"minillm: {stop}", file=sys.stderr)
        return 128 + getattr(signal, stop.signal_name, signal.SIGINT)
    except (MiniLLMError, ValueError, OSError) as error:
        print(f"minillm: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("minillm: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
