"""From raw text to a model that talks: corpus, tokenizer, shards, pretraining, scores, report. Each stage is kept and not done twice."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from minillm.base.files import atomic_write, run_lock
from minillm.base.machine import describe_machine, peak_memory_bytes
from minillm.base.processes import World
from minillm.generate import Sampler
from minillm.generate import generate as generate_tokens
from minillm.hub.folder import load_run
from minillm.runs.engines import EngineConfig
from minillm.runs.exams import _prompts, sample, score
from minillm.runs.folder import Say, _quiet, _Run
from minillm.runs.pretrain import pretrain
from minillm.runs.recipes import RunConfig
from minillm.serving.fast import prepare
from minillm.show.run import read_metrics, write_report


def _finish(run: _Run, device: torch.device) -> str:
    model, tokenizer = load_run(run.folder, device)
    model.eval()
    scores = [] if run.config.data.sources else score(model, tokenizer, run.config, progress=run.progress)
    samples = sample(model, tokenizer, _prompts(run))
    start, n = time.perf_counter(), 128
    prompt = tokenizer.encode(samples[0][1])
    n = min(n, model.config.max_seq_len - len(prompt))
    generate_tokens(prepare(model, n), [prompt], max_new_tokens=n, sampler=Sampler.greedy())
    run.done["results"] = {
        "scores": scores,
        "samples": samples,
        "decode_tokens_per_s": n / (time.perf_counter() - start),
        "peak_memory_bytes": peak_memory_bytes(device),
    }
    with atomic_write(run.folder / "scores.json") as file:
        json.dump(
            {"training": run.done["training"], **run.done["results"]}, file, indent=1, ensure_ascii=False
        )
    return f"{len(scores)} exams, {len(samples)} samples" if scores else f"{len(samples)} samples"


def _report(run: _Run, device: torch.device) -> Path:
    training, results = run.done["training"], run.done["results"]
    path = run.folder / "report.html"
    total = sum(stage.seconds for stage in run.stages)
    write_report(
        path,
        title=f"minillm {run.config.recipe}: {training['parameters'] / 1e6:.2f}M parameters",
        summary=[
            ("held-out loss", f"{training['held_out_nats']:.3f} nats a token"),
            ("bits per byte, held out", f"{training['bits_per_byte']:.3f}"),
            ("perplexity, held out", f"{math.exp(training['held_out_nats']):.2f}"),
            ("tokens trained on", f"{training['tokens']:,}"),
            (
                "training speed",
                f"{training['tokens_per_s']:,.0f} tokens/s ({100 * training['mfu']:.0f} % MFU)",
            ),
            ("decoding speed, batch 1", f"{results['decode_tokens_per_s']:,.0f} tokens/s"),
            ("peak memory", f"{results['peak_memory_bytes'] / 2**20:,.0f} MiB"),
            ("time in all", f"{total / 60:.1f} min"),
        ],
        scores=results["scores"],
        samples=[tuple(s) for s in results["samples"]],
        metrics=read_metrics(run.folder / "metrics.jsonl"),
        stages=[(s.name, s.what, s.seconds) for s in run.stages],
        config=dataclasses.asdict(run.config),
        machine=describe_machine(device),
    )
    return path


def speedrun(
    config: RunConfig,
    run_dir: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: str | None = None,
    restart: bool = False,
    say: Say = _quiet,
    progress: bool = False,
    engine: EngineConfig | None = None,
    world: World | None = None,
) -> dict[str, Any]:
    """`pretrain`, then questions, samples and `report.html`. The arguments and errors are those of `pretrain`.

    Returns:
        What the stages found: `training` and `results` as in `scores.json`, and the `report`'s path; on process 0 only.
    """
    device = torch.device(device)
    leads = world is None or world.rank == 0
    options: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "restart": restart,
        "say": say,
        "progress": progress,
    }
    with (
        run_lock(run_dir) if leads else contextlib.nullcontext()
    ):  # of one hold, so that nobody comes in between
        run = pretrain(config, run_dir, engine=engine, world=world, **options)
        if not leads:
            return {}
        run.stage(5, "score", lambda: _finish(run, device))
        report = _report(run, device)
    results = run.done["results"]
    for what, prompt, text in results["samples"]:
        run.say(f"\n{what}:\n  {(prompt + text).strip()}".replace("\n", "\n  ").replace("\n  \n", "\n"))
    run.say("")
    for record in results["scores"]:
        run.say(
            f"{record['name']:42} {record['correct']:3} of {record['n']:3}  {100 * record['accuracy']:5.1f} %"
        )
    return {"training": run.done["training"], "results": results, "report": report}
