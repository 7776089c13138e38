"""From raw text to a model that talks: corpus, tokenizer, shards, pretraining, scores, report. Each stage is kept and not done twice."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from minillm.base.machine import describe_machine
from minillm.runs.data import DATA_STAGES
from minillm.runs.exams import SCORE, Results
from minillm.runs.folder import Launch, RunFolder, do_stages, hold_run
from minillm.runs.metrics import read_metrics
from minillm.runs.pretrain import PRETRAIN, Training
from minillm.runs.recipes import RunConfig
from minillm.show.run import write_report

STAGES = (*DATA_STAGES, PRETRAIN, SCORE)


def pretrain(
    config: RunConfig, run_dir: str | Path, launch: Launch | None = None, *, restart: bool = False
) -> RunFolder:
    """Corpus, tokenizer, shards, training: everything up to a model in `run_dir/model`.

    Stages that are done are not done again; training goes on from its newest undamaged checkpoint.

    Args:
        config: the whole run.
        run_dir: its folder.
        launch: how it is worked on this time; by default on the CPU by this process, in silence.
        restart: throw away what the folder holds.

    Raises:
        ValueError: the folder holds another run.
        RunLocked: another process works in it.
        PeerLost: another process of the run has ended.
        Interrupted: asked to stop; everything is saved.
    """
    return do_stages(STAGES, config, run_dir, launch or Launch(), last="pretrain", restart=restart)


def speedrun(
    config: RunConfig, run_dir: str | Path, launch: Launch | None = None, *, restart: bool = False
) -> RunFolder:
    """`pretrain`, then questions, samples and `report.html`. The arguments and errors are those of `pretrain`."""
    launch = launch or Launch()
    with hold_run(run_dir, launch):  # of one hold, so that nobody comes in between
        run = do_stages(STAGES, config, run_dir, launch, last="score", restart=restart)
        if not launch.leads:
            return run
        _report(run)
    results = run.found(Results)
    for what, prompt, text in results.samples:
        run.say(f"\n{what}:\n  {(prompt + text).strip()}".replace("\n", "\n  ").replace("\n  \n", "\n"))
    run.say("")
    for mark in results.scores:
        run.say(f"{mark['name']:42} {mark['correct']:3} of {mark['n']:3}  {100 * mark['accuracy']:5.1f} %")
    return run


def _report(run: RunFolder) -> None:
    training, results = run.found(Training), run.found(Results)
    minutes = sum(stage.seconds for stage in run.done) / 60
    speed = f"{training.tokens_per_s:,.0f} tokens/s ({100 * training.mfu:.0f} % MFU)"
    write_report(
        run.path / "report.html",
        title=f"minillm {run.config.recipe}: {training.parameters / 1e6:.2f}M parameters",
        summary=[
            ("held-out loss", f"{training.held_out_nats:.3f} nats a token"),
            ("bits per byte, held out", f"{training.bits_per_byte:.3f}"),
            ("perplexity, held out", f"{math.exp(training.held_out_nats):.2f}"),
            ("tokens trained on", f"{training.tokens:,}"),
            ("training speed", speed),
            ("decoding speed, batch 1", f"{results.decode_tokens_per_s:,.0f} tokens/s"),
            ("peak memory", f"{results.peak_memory_bytes / 2**20:,.0f} MiB"),
            ("time in all", f"{minutes:.1f} min"),
        ],
        scores=results.scores,
        samples=[(what, prompt, text) for what, prompt, text in results.samples],
        metrics=read_metrics(run.path / "metrics.jsonl"),
        stages=[(stage.name, stage.what, stage.seconds) for stage in run.done],
        config=dataclasses.asdict(run.config),
        machine=describe_machine(run.device),
    )
