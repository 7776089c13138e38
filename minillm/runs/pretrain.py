"""Pretraining as a stage: how many steps fit, the model, the loop, its result."""

from __future__ import annotations

import dataclasses
import gc
import shutil
import statistics
from typing import ClassVar

import torch

from minillm.base.files import atomic_folder
from minillm.base.machine import fast_bfloat16, seed_everything
from minillm.hub.own import save_model
from minillm.runs.data import ShardCounts, held_out_loader, run_tokenizer, train_loader, verify_shards
from minillm.runs.engines import make_engine
from minillm.runs.folder import Record, RunFolder, Stage
from minillm.runs.keeper import RunKeeper, need_checkpoints
from minillm.runs.recipes import RunConfig
from minillm.train import TrainResult, bits_per_byte, evaluate_loss, train
from minillm.transformer import Transformer, count_parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedSteps(Record):
    """How many steps this run makes. It is decided once: the schedule of the learning rate hangs on it."""

    key: ClassVar[str] = "steps"
    steps: int

    def to_json(self) -> int:
        """The bare number."""
        return self.steps

    @classmethod
    def from_json(cls, value: int) -> PlannedSteps:
        """From the bare number."""
        return cls(steps=value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Record):
    """What training came to: losses in nats a token, time in seconds, `mfu` between 0 and 1."""

    key: ClassVar[str] = "training"
    held_out_nats: float
    bits_per_byte: float
    tokens: int
    tokens_per_s: float
    seconds: float
    mfu: float
    parameters: int
    dtype: str


def steps_that_fit(config: RunConfig, step_seconds: float) -> int:
    """All steps of the recipe, or as many as a slower machine can make in `config.minutes`, in whole hundreds."""
    if not config.minutes:
        return config.train.steps
    fit = int(60 * config.minutes / step_seconds)
    return min(config.train.steps, max(100, fit - fit % 100))


def _need_checkpoints(run: RunFolder) -> None:
    """Refuse a run whose checkpoints will not fit on the disk: before its first stage, not in its fourth."""
    if run.recall(Training) is not None or (run.path / "checkpoints").exists():
        return  # the keeper counts what is there
    one = 12 * count_parameters(run.config.model).total  # weights and AdamW's two means, in float32
    need_checkpoints(run.path / "checkpoints", one, run.config.train.keep)


def _pretrain(run: RunFolder) -> str:
    dtype = run.launch.dtype or _usual_dtype(run)
    config = _with(run.config, dtype=dtype)
    if run.launch.leads:
        verify_shards(run)
    run.launch.peers.wait()
    planned = run.recall(PlannedSteps) or _plan(run, config)
    return _train(run, _with(config, steps=planned.steps))


def _with(config: RunConfig, **settings: object) -> RunConfig:
    """A run with other settings of training."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **settings))


def _usual_dtype(run: RunFolder) -> str:
    if run.config.train.dtype != "float32":
        return run.config.train.dtype
    return "bfloat16" if fast_bfloat16(run.device) else "float32"


def _plan(run: RunFolder, config: RunConfig) -> PlannedSteps:
    """Time some steps, decide how many there will be, and say what they will take."""
    model = _fresh_model(run, config)
    n_parameters, seconds = count_parameters(model.config).total, _step_seconds(model, config, run)
    del model
    gc.collect()  # an engine and its model know each other: their memory goes only now
    planned = PlannedSteps(steps=steps_that_fit(config, seconds))
    run.remember(planned)
    kind, n = run.device.type, run.launch.peers.world_size
    where = f"{n} x {kind}" if n > 1 else kind
    run.announce(
        f"{n_parameters / 1e6:.2f}M parameters, {planned.steps:,} steps on {where} in {config.train.dtype}: about "
        f"{_duration(planned.steps * seconds)}, checkpoints of {12 * n_parameters / 1e6:,.0f} MB"
    )
    if planned.steps < config.train.steps:
        run.say(
            f"      of {config.train.steps:,}: as many as fit in {config.minutes:g} minutes here; --minutes 0 makes all"
        )
    return planned


def _step_seconds(model: Transformer, config: RunConfig, run: RunFolder) -> float:
    """Seconds that a training step takes, from some steps of a model that is thrown away; the same on all processes."""
    trial = dataclasses.replace(
        config.train, steps=12, compile="off", log_every=1, eval_every=0, save_every=0
    )
    engine = make_engine(model, trial, run.launch.engine)
    keeper = RunKeeper(progress=False)
    metrics = train(model, train_loader(run, config), trial, engine=engine, keeper=keeper).metrics
    speed = engine.first(statistics.median(line["tokens_per_s"] for line in metrics[2:]))
    return config.train.batch_size * config.train.seq_len / speed


def _fresh_model(run: RunFolder, config: RunConfig) -> Transformer:
    """The model as training begins with it, with the vocabulary that there is."""
    seed_everything(config.train.seed)
    vocab_size = run_tokenizer(run).vocab_size
    return Transformer(dataclasses.replace(config.model, vocab_size=vocab_size)).to(run.device)


def _train(run: RunFolder, config: RunConfig) -> str:
    """Train from the newest checkpoint to the last step, and keep the model."""
    model = _fresh_model(run, config)
    engine, held_out = make_engine(model, config.train, run.launch.engine), held_out_loader(run, config)

    def evaluate(model: Transformer) -> dict[str, float]:
        shared = engine if engine.world_size > 1 else None
        loss = evaluate_loss(model, held_out.epoch_batches(), dtype=config.train.dtype, engine=shared)
        return {"held_out_nats": loss}

    keeper = RunKeeper(run.path, eval_fn=evaluate, progress=run.launch.progress)
    result = train(model, train_loader(run, config), config.train, engine=engine, keeper=keeper)
    weights = engine.tensors()["model"]  # all processes: an engine may have to collect them
    held = next((line["held_out_nats"] for line in reversed(result.metrics) if "held_out_nats" in line), None)
    if engine.first(held is None):  # somebody has removed the metrics
        with engine.evaluation():
            held = evaluate(model)["held_out_nats"]
    if not run.launch.leads:
        return ""
    assert held is not None
    return _keep(run, config, model, weights, result, held)


def _keep(
    run: RunFolder,
    config: RunConfig,
    model: Transformer,
    weights: dict[str, torch.Tensor],
    result: TrainResult,
    held_out_nats: float,
) -> str:
    """Write the model beside its tokenizer, and remember what training came to."""
    with atomic_folder(run.path / "model") as folder:
        save_model(folder, model, weights)
        shutil.copyfile(run.path / "tokenizer.json", folder / "tokenizer.json")
    counts = run.found(ShardCounts).heldout
    training = Training(
        held_out_nats=held_out_nats,
        bits_per_byte=bits_per_byte(held_out_nats, counts.tokens, counts.bytes),
        tokens=result.tokens,
        tokens_per_s=result.tokens / max(result.seconds, 1e-9),
        seconds=result.seconds,
        mfu=result.metrics[-1]["mfu"],
        parameters=count_parameters(model.config).total,
        dtype=config.train.dtype,
    )
    run.remember(training)
    return f"held-out loss {held_out_nats:.3f} nats a token, {training.tokens_per_s:,.0f} tokens/s"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


PRETRAIN = Stage(name="pretrain", work=_pretrain, makes="model", check=_need_checkpoints, together=True)
