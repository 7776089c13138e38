"""Pretraining as a run: how many steps fit, the model, the loop, its result."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import shutil
import statistics
from pathlib import Path
from typing import Any

import torch

from minillm.base.files import atomic_folder, clean_leftovers, need_disk, run_lock
from minillm.base.machine import fast_bfloat16, seed_everything
from minillm.base.processes import World
from minillm.hub.own import save_model
from minillm.kernels.matmul import tune_allocator, tune_matmul
from minillm.runs.data import _corpus, _held_out, _loader, _shards, _tokenizer, _verify_shards
from minillm.runs.engines import EngineConfig, make_engine
from minillm.runs.folder import Say, _empty, _quiet, _Run
from minillm.runs.keeper import TrainResult, train
from minillm.runs.recipes import RunConfig
from minillm.tokenizer import load_tokenizer
from minillm.train import bits_per_byte, evaluate_loss
from minillm.transformer import Transformer, count_parameters


def _estimate(model: Transformer, config: RunConfig, run: _Run) -> float:
    """Seconds that a training step takes, from some steps of a model that is thrown away; the same on all processes."""
    trial = dataclasses.replace(
        config.train, steps=12, compile="off", log_every=1, eval_every=0, save_every=0
    )
    engine = make_engine(model, trial, run.engine)
    metrics = train(model, _loader(run, config), trial, engine=engine, progress=False).metrics
    # Process 0 alone has the metrics of all.
    speed = statistics.median(line["tokens_per_s"] for line in metrics[2:]) if run.leads else 0.0
    return config.train.batch_size * config.train.seq_len / engine.total(speed)


def _steps_that_fit(config: RunConfig, step_seconds: float) -> int:
    """All steps of the recipe, or as many as a slower machine can make in `config.minutes`, in whole hundreds."""
    if not config.minutes:
        return config.train.steps
    fit = int(60 * config.minutes / step_seconds)
    return min(config.train.steps, max(100, fit - fit % 100))


def _fresh_model(run: _Run, config: RunConfig, device: torch.device) -> Transformer:
    """The model as training begins with it."""
    seed_everything(config.train.seed)
    # Little text may hold fewer tokens than were asked for.
    vocab_size = load_tokenizer(run.folder / "tokenizer.json").vocab_size
    return Transformer(dataclasses.replace(config.model, vocab_size=vocab_size)).to(device)


def _pretrain(run: _Run, device: torch.device, dtype: str) -> str:
    config = dataclasses.replace(run.config, train=dataclasses.replace(run.config.train, dtype=dtype))
    if run.leads:
        _verify_shards(run)
    run.world.wait()
    if "steps" not in run.done:
        model = _fresh_model(run, config, device)
        n_parameters, seconds = count_parameters(model.config).total, _estimate(model, config, run)
        del model
        gc.collect()  # an engine and its model know each other: their memory goes only now
        run.remember("steps", _steps_that_fit(config, seconds))
        where = f"{run.world.world_size} x {device.type}" if run.world.world_size > 1 else device.type
        run.say(
            f"[4/5] pretrain  {n_parameters / 1e6:.2f}M parameters, {run.done['steps']:,} steps on {where} in "
            f"{dtype}: about {_duration(run.done['steps'] * seconds)}, checkpoints of {12 * n_parameters / 1e6:,.0f} MB"
        )
        if run.done["steps"] < config.train.steps:
            run.say(
                f"      of {config.train.steps:,}: as many as fit in {config.minutes:g} minutes here; --minutes 0 makes all"
            )
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=run.done["steps"]))
    model = _fresh_model(run, config, device)
    n_parameters = count_parameters(model.config).total
    engine, held_out = make_engine(model, config.train, run.engine), _held_out(run, config)

    def evaluate(model: Transformer) -> dict[str, float]:
        shared = engine if engine.world_size > 1 else None
        loss = evaluate_loss(model, held_out.epoch_batches(), dtype=dtype, engine=shared)
        return {"held_out_nats": loss}

    result: TrainResult = train(
        model,
        _loader(run, config),
        config.train,
        run_dir=run.folder,
        eval_fn=evaluate,
        progress=run.progress,
        engine=engine,
    )
    weights = engine.tensors()["model"]  # all processes: an engine may have to collect them
    held = next((line["held_out_nats"] for line in reversed(result.metrics) if "held_out_nats" in line), None)
    if engine.total(float(run.leads and held is None)):  # somebody has removed the metrics
        with engine.evaluation():
            held = evaluate(model)["held_out_nats"]
    if not run.leads:
        return ""
    assert held is not None
    with atomic_folder(run.folder / "model") as folder:
        save_model(folder, model, weights)
        shutil.copyfile(run.folder / "tokenizer.json", folder / "tokenizer.json")
    counts = run.done["shards_counts"]["heldout"]
    run.done["training"] = {
        "held_out_nats": held,
        "bits_per_byte": bits_per_byte(held, counts["tokens"], counts["bytes"]),
        "tokens": result.tokens,
        "tokens_per_s": result.tokens / max(result.seconds, 1e-9),
        "seconds": result.seconds,
        "mfu": result.metrics[-1]["mfu"],
        "parameters": n_parameters,
        "dtype": dtype,
    }
    return f"held-out loss {held:.3f} nats a token, {run.done['training']['tokens_per_s']:,.0f} tokens/s"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def pretrain(
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
) -> _Run:
    """Corpus, tokenizer, shards, training: everything up to a model in `run_dir/model`.

    Stages that are done are not done again; training goes on from its newest undamaged checkpoint.

    Args:
        config: the whole run.
        run_dir: its folder.
        device: where to train.
        dtype: of the matrix products; by default bfloat16 where the device is fast at it, else float32.
        restart: throw away what the folder holds.
        say: receives a line per stage.
        progress: show bars.
        engine: who trains. It is no part of the run: another engine may take it up.
        world: this process among all that train together, from `runtime.process_group`. The first one does the stages before
            training, and the others wait. All must see the same `run_dir`.

    Raises:
        ValueError: the folder holds another run.
        RunLocked: another process works in it.
        PeerLost: another process of the run has ended.
        train.Interrupted: asked to stop; everything is saved.
    """
    folder, device = Path(run_dir), torch.device(device)
    who: dict[str, Any] = {"engine": engine, "world": world}
    with contextlib.ExitStack() as held:
        if world is None or world.rank == 0:
            held.enter_context(run_lock(folder))
            if restart:
                _empty(folder)
            for place in (folder, folder / "shards"):
                clean_leftovers(place)
            run = _Run(folder, config, say, progress, **who)
            run.keep_config()
            _need_checkpoints(run)
            run.stage(1, "corpus", lambda: _corpus(run))
            run.stage(2, "tokenizer", lambda: _tokenizer(run), "tokenizer.json")
            run.stage(3, "shards", lambda: _shards(run), "shards")
            run.world.wait()
        else:
            world.wait()
            run = _Run(folder, config, **who)
        tune_allocator()
        tune_matmul()
        if dtype is None:
            dtype = config.train.dtype if config.train.dtype != "float32" else _fast_dtype(device)
        run.stage(4, "pretrain", lambda: _pretrain(run, device, dtype), "model")
    return run


def _need_checkpoints(run: _Run) -> None:
    """Refuse a run whose checkpoints will not fit on the disk: before its first stage, not in its fourth."""
    if "pretrain" in run.done or (run.folder / "checkpoints").exists():
        return  # `train` counts what is there
    one, number = 12 * count_parameters(run.config.model).total, run.config.train.keep + 1
    need_disk(run.folder, number * one, f"{number} checkpoints of {one / 1e9:.2f} GB")


def _fast_dtype(device: torch.device) -> str:
    return "bfloat16" if fast_bfloat16(device) else "float32"
