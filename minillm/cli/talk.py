"""`minillm generate`: a model, a prompt, and the text that follows."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from minillm.cli.parsing import parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateArgs:
    """Continue a prompt with a trained model; without a prompt, read prompts from the terminal, a line each."""

    prompt: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[PROMPT]")] = None
    """The text to continue."""
    model: Path = Path("runs/tiny")
    """A run's folder, or a model's: ours, or as LLaMA, ChatGLM and Baichuan were published."""
    max_new_tokens: int = 200
    """Stop after so many tokens, if the model does not stop before."""
    temperature: float = 0.7
    """0 is greedy; higher is more varied."""
    top_k: int | None = None
    """Choose among the k likeliest tokens only."""
    top_p: float | None = 0.95
    """Choose among the likeliest tokens that together have this probability."""
    min_p: float | None = None
    """Leave out tokens less likely than this share of the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that were there become less likely."""
    n: int = 1
    """How many continuations."""
    seed: int | None = None
    """The same seed gives the same text; by default each call differs."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


def _generate(argv: Sequence[str]) -> int:
    args = parse(GenerateArgs, prog="minillm generate", args=list(argv))
    from minillm.base.machine import pick_device
    from minillm.generate import Sampler, stream_text
    from minillm.hub import ModelFolder
    from minillm.kernels.matmul import tune_matmul
    from minillm.serving.fast import prepare

    sampler = Sampler(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
    )
    if args.n < 1 or args.max_new_tokens < 1:
        raise ValueError(f"n and max_new_tokens must be at least 1, got {args.n} and {args.max_new_tokens}")
    tune_matmul()
    folder = ModelFolder.open(args.model)
    tokenizer = folder.tokenizer()  # before the weights: a folder may lack one
    model = folder.model(device=pick_device(args.device)).eval()
    fast = prepare(model, args.max_new_tokens)

    def answer(prompt: str, seed: int | None) -> None:
        room = model.config.max_seq_len - len(tokenizer.encode(prompt))
        if room < 1:
            raise ValueError(
                f"the prompt fills the model's context of {model.config.max_seq_len} tokens: shorten it"
            )
        print(prompt, end="", flush=True)
        limit = min(args.max_new_tokens, room)
        for piece in stream_text(fast, tokenizer, prompt, max_new_tokens=limit, sampler=sampler, seed=seed):
            print(piece, end="", flush=True)
        print()

    if args.prompt is not None:
        if not args.prompt:
            raise ValueError("the prompt is empty: give at least one character to continue")
        for index in range(args.n):
            answer(args.prompt, None if args.seed is None else args.seed + index)
        return 0
    if sys.stdin.isatty():
        print(f"{args.model}: type the beginning of a text; an empty line or Ctrl-D ends.")
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        if not prompt:
            return 0
        answer(prompt, args.seed)
