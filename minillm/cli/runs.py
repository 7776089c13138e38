"""`minillm speedrun` and `minillm pretrain`: arguments of a run, and the run itself."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from minillm.cli.parsing import _parse, _say

if TYPE_CHECKING:
    from minillm.runs.engines import EngineConfig
    from minillm.runs.recipes import RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunArgs:
    """Where and how to run."""

    name: str | None = None
    """The run's folder in `runs`; by default the recipe's name."""
    runs: Path = Path("runs")
    """The folder that holds runs."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; auto takes bfloat16 where the hardware is fast at it."""
    restart: bool = False
    """Begin anew, and throw away what the run's folder holds."""
    quiet: bool = False
    """No progress bars."""


def _parse_run(
    command: str, description: str, argv: Sequence[str]
) -> tuple[RunArgs, RunConfig, EngineConfig]:
    """Two passes: the recipe first, since it gives every other setting its default."""
    from minillm.runs.engines import EngineConfig
    from minillm.runs.recipes import RunConfig, recipe

    name, argv = "tiny", ["--data.sources" if word == "--data" else word for word in argv]
    for index, word in enumerate(argv):
        if word == "--recipe" and index + 1 < len(argv):
            name = argv[index + 1]
        elif word.startswith("--recipe="):
            name = word.partition("=")[2]
    chosen = recipe(name)

    fields = [
        ("run", Annotated[RunArgs, tyro.conf.arg(name="")], dataclasses.field(default_factory=RunArgs)),
        (
            "config",
            Annotated[RunConfig, tyro.conf.arg(name="")],
            dataclasses.field(default_factory=lambda: chosen),
        ),
    ]
    fields.insert(
        1,
        (
            "engine",
            Annotated[EngineConfig, tyro.conf.arg(name="")],
            dataclasses.field(default=EngineConfig()),
        ),
    )
    every = dataclasses.make_dataclass("Args", fields)
    args: Any = _parse(every, prog=f"minillm {command}", description=description, args=argv)
    return args.run, args.config, args.engine


def _run(command: str, argv: Sequence[str]) -> int:
    descriptions = {
        "speedrun": "Corpus, tokenizer, shards, pretraining, scores and a report.html, in RUNS/NAME. Ctrl-C saves; the same "
        "command resumes. Then try `minillm generate`.",
        "pretrain": "Corpus, tokenizer, shards and pretraining, in RUNS/NAME. Ctrl-C saves; the same command resumes.",
    }
    run, config, engine = _parse_run(command, descriptions[command], argv)
    from minillm.base.machine import pick_device, pick_dtype
    from minillm.base.processes import process_group
    from minillm.runs.pretrain import pretrain
    from minillm.runs.speedrun import speedrun

    device = pick_device(run.device)
    dtype = str(pick_dtype(run.dtype, device)).removeprefix("torch.")
    folder = run.runs / (run.name or config.recipe)
    start = time.monotonic()
    work: Callable[..., Any] = speedrun if command == "speedrun" else pretrain
    settings = {"dtype": dtype, "restart": run.restart, "say": _say, "progress": not run.quiet}
    borrowed = engine.engine in ("fsdp2", "deepspeed")  # they want a group of processes, if only of one
    with process_group(device, timeout_s=engine.timeout_s, always=borrowed) as world:
        outcome = work(config, folder, device=device, engine=engine, world=world, **settings)
        world.wait()  # the first one may have more to do
    if world.rank > 0:
        return 0
    minutes = (time.monotonic() - start) / 60
    if command == "speedrun":
        training, results = outcome["training"], outcome["results"]
        _say(
            f"\nheld-out loss {training['held_out_nats']:.3f} nats a token, {training['bits_per_byte']:.3f} bits a byte; "
            f"training {training['tokens_per_s']:,.0f} tokens/s, decoding {results['decode_tokens_per_s']:,.0f} tokens/s"
        )
        _say(f"{minutes:.1f} minutes. Report: {outcome['report']}")
    _say(f'Talk to it: minillm generate --model {folder} "One day, "')
    return 0
