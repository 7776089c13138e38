"""`minillm speedrun` and `minillm pretrain`: arguments of a run, and the run itself."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from minillm.base.machine import pick_device, pick_dtype
from minillm.base.processes import process_group
from minillm.cli.parsing import parse_parts, say, value_of
from minillm.runs.engines import EngineConfig
from minillm.runs.exams import Results
from minillm.runs.folder import Launch, RunFolder
from minillm.runs.pretrain import Training
from minillm.runs.recipes import recipe
from minillm.runs.speedrun import pretrain, speedrun


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


def _speedrun(argv: Sequence[str]) -> int:
    start, description = (
        time.monotonic(),
        (
            "Corpus, tokenizer, shards, pretraining, scores and a report.html, in RUNS/NAME. Ctrl-C saves; the same "
            "command resumes. Then try `minillm generate`."
        ),
    )
    run = _run("speedrun", description, speedrun, argv)
    if run.launch.leads:
        training, results = run.found(Training), run.found(Results)
        say(
            f"\nheld-out loss {training.held_out_nats:.3f} nats a token, {training.bits_per_byte:.3f} bits a byte; "
            f"training {training.tokens_per_s:,.0f} tokens/s, decoding {results.decode_tokens_per_s:,.0f} tokens/s"
        )
        say(f"{(time.monotonic() - start) / 60:.1f} minutes. Report: {run.path / 'report.html'}")
    return _talk_to(run)


def _pretrain(argv: Sequence[str]) -> int:
    description = (
        "Corpus, tokenizer, shards and pretraining, in RUNS/NAME. Ctrl-C saves; the same command resumes."
    )
    return _talk_to(_run("pretrain", description, pretrain, argv))


def _run(command: str, description: str, work: Callable[..., RunFolder], argv: Sequence[str]) -> RunFolder:
    """Parse the words, gather the processes, and work on the run."""
    words = ["--data.sources" if word == "--data" else word for word in argv]
    args, engine, config = parse_parts(
        [RunArgs(), EngineConfig(), recipe(value_of("--recipe", words, "tiny"))],
        prog=f"minillm {command}",
        description=description,
        args=words,
    )
    device = pick_device(args.device)
    dtype = str(pick_dtype(args.dtype, device)).removeprefix("torch.")
    borrowed = engine.engine in ("fsdp2", "deepspeed")  # they want a group of processes, if only of one
    with process_group(device, timeout_s=engine.timeout_s, always=borrowed) as peers:
        launch = Launch(
            device=device, dtype=dtype, engine=engine, peers=peers, say=say, progress=not args.quiet
        )
        run = work(config, args.runs / (args.name or config.recipe), launch, restart=args.restart)
        peers.wait()  # the first one may have more to do
    return run


def _talk_to(run: RunFolder) -> int:
    if run.launch.leads:
        say(f'Talk to it: minillm generate --model {run.path} "One day, "')
    return 0
