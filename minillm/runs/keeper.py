"""The keeper of a training run: metrics, checkpoints, resume, bad steps, signals."""

import contextlib
import json
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.base.errors import CheckpointError, MiniLLMError
from minillm.base.files import clean_leftovers, folder_bytes, need_disk, run_lock
from minillm.base.machine import peak_flops, steady_bar
from minillm.batches import Batch
from minillm.runs.metrics import MetricsFile
from minillm.runs.signals import Interrupted, catch_signals
from minillm.storage.checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint, save_sharded
from minillm.storage.tensors import load_metadata, load_tensors, save_tensors
from minillm.train import (
    Engine,
    Stream,
    TrainConfig,
    TrainingDiverged,
    autocast,
    batch_loss,
    leap_limit,
    learning_rate,
    model_flops_utilization,
)
from minillm.transformer import Transformer, flops_per_token

log = logging.getLogger(__name__)


def should_compile(model: Transformer, config: TrainConfig) -> bool:
    """Whether compiling pays. "auto": runs of more than about 30 minutes on a CPU or 3 on a GPU, where a compiler is.

    The estimate takes a nominal speed and measures nothing, so that a run that resumes decides as it did before.
    """
    device = model.embed.weight.device.type
    if config.compile != "auto":
        return config.compile == "on"
    if device == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        return False
    rates = {
        "cpu": 40e9 * torch.get_num_threads(),
        "cuda": 200e12,
    }  # FLOP/s that eager training reaches, roughly
    tokens = config.steps * config.batch_size * config.seq_len
    seconds = (
        tokens * flops_per_token(model.config, config.seq_len, backward=True) / rates.get(device, math.inf)
    )
    return seconds > (1800 if device == "cpu" else 180)


@contextlib.contextmanager
def compiled(model: Transformer, on: bool) -> Iterator[None]:
    """Inside, `model.hidden` is its compiled version, if `on`."""
    if on:
        model.hidden = torch.compile(model.hidden)
    try:
        yield
    finally:
        if on:
            del model.hidden  # the method of the class shows again


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run says of itself. `metrics` are the lines of metrics.jsonl."""

    steps: int
    tokens: int
    loss_nats: float
    seconds: float
    metrics: list[dict[str, Any]]


class Run:
    """One run of `train`: what it works on, how far it is, and where it writes."""

    def __init__(
        self,
        model: Transformer,
        loader: Stream,
        config: TrainConfig,
        run_dir: Path | None = None,
        engine: Engine | None = None,
    ):
        if (loader.batch_size, loader.seq_len) != (config.batch_size, config.seq_len):
            raise ValueError(
                f"the loader has batch_size {loader.batch_size} and seq_len {loader.seq_len}, "
                f"the config {config.batch_size} and {config.seq_len}"
            )
        self.model, self.loader, self.config = model, loader, config
        self.engine = Engine(model, config) if engine is None else engine
        if getattr(loader, "world_size", self.engine.world_size) != self.engine.world_size:
            raise ValueError(
                f"the loader cuts batches for {getattr(loader, 'world_size', 1)} processes, the engine has "
                f"{self.engine.world_size}: give Loader the engine's rank and world_size"
            )
        self.device = model.embed.weight.device
        self.folder, self.checkpoints = run_dir, None if run_dir is None else run_dir / "checkpoints"
        self.metrics = MetricsFile(None if run_dir is None or self.engine.rank else run_dir / "metrics.jsonl")
        self.step, self.tokens, self.seconds, self.saved_at = 0, 0, 0.0, -1
        self.skipped, self.skips_in_a_row = 0, 0
        self.recent: dict[str, list[float]] = {"loss_nats": [], "grad_norm": []}
        self.interval = {"loss": 0.0, "targets": 0, "seconds": 0.0}
        self.compiled = self.engine.compiles and should_compile(model, config)
        self.flops = float(flops_per_token(model.config, config.seq_len, backward=True))
        self.peak = peak_flops(config.dtype, str(self.device)) * self.engine.world_size

    def count(self, loss_nats: float, n_targets: int, seconds: float) -> None:
        """Book a finished step; a skipped one has no targets."""
        self.step, self.tokens, self.seconds = self.step + 1, self.tokens + n_targets, self.seconds + seconds
        loss = loss_nats * n_targets if n_targets else 0.0
        for key, value in (("loss", loss), ("targets", n_targets), ("seconds", seconds)):
            self.interval[key] += value

    def line(self, info: dict[str, Any]) -> dict[str, Any]:
        """A line of metrics: the mean loss and speed since the last one. What is no number is None, as JSON has it."""
        speed, targets = (
            self.interval["targets"] / max(self.interval["seconds"], 1e-9),
            self.interval["targets"],
        )
        line = {
            **info,
            "loss_nats": self.interval["loss"] / targets if targets else None,
            "grad_norm": info["grad_norm"] if math.isfinite(info["grad_norm"]) else None,
            "tokens_per_s": round(speed, 1),
            "mfu": round(model_flops_utilization(speed, self.flops, self.peak), 4),
        }
        self.interval = {"loss": 0.0, "targets": 0, "seconds": 0.0}
        return line

    def settings(self) -> dict[str, Any]:
        """What must be the same when the run goes on: as JSON gives it back."""
        both = {"config": asdict(self.config), "model": asdict(self.model.config)}
        return json.loads(json.dumps(both))


COUNTERS = ("step", "tokens", "seconds", "interval", "compiled", "skipped", "skips_in_a_row", "recent")

FREE_SETTINGS = {  # they may change when a run goes on
    *("log_every", "eval_every", "save_every", "keep", "accumulation", "compile"),
    *("bad_step", "spike", "max_skips"),
}


def check_same_run(saved: Mapping[str, Any], settings: Mapping[str, Any], path: Path) -> None:
    """Refuse to continue a run with settings that would have made another run.

    Args:
        saved: the state of a checkpoint.
        settings: `Run.settings` of now.
        path: the checkpoint.

    Raises:
        ValueError: the first setting that differs.
    """
    for group, values in settings.items():
        for name, value in values.items():
            before = saved[group].get(name)
            if name not in FREE_SETTINGS and before != value:
                raise ValueError(
                    f"{path} was trained with {group} {name}={before}, now {name}={value}; use another run_dir"
                )


def save_run(run: Run) -> Path | None:
    """Write a checkpoint of this moment, once: weights, optimizer, loader, random state, counters."""
    if run.checkpoints is None:
        return None
    path = run.checkpoints / f"step-{run.step:08d}"
    if run.saved_at == run.step:
        return path
    mine = {"cpu": torch.get_rng_state()}
    if run.device.type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state(run.device)
    of_all = enumerate(run.engine.gather_objects(mine))
    random = {f"{name}-{n}" if n else name: kept for n, each in of_all for name, kept in each.items()}
    counters = {name: getattr(run, name) for name in COUNTERS}
    state = {**run.settings(), "loader": run.loader.state_dict(), **counters}
    if run.engine.rank == 0:
        run.metrics.sync()
    if run.engine.sharded:
        shards = {**run.engine.shards(), "random": random} if run.engine.rank == 0 else run.engine.shards()
        everyone = {"rank": run.engine.rank, "everyone": run.engine.gather_objects}
        save_sharded(run.checkpoints, run.step, shards=shards, state=state, keep=run.config.keep, **everyone)
    else:
        tensors = {**run.engine.tensors(), "random": random}  # all processes: an engine may have to collect
        if run.engine.rank == 0:
            save_checkpoint(run.checkpoints, run.step, tensors=tensors, state=state, keep=run.config.keep)
    run.saved_at = run.step
    return path


def find_checkpoint(run: Run) -> Path | None:
    """The newest undamaged checkpoint, None if there is none yet. All processes take the one that the first has found.

    Raises:
        CheckpointError: there are some, and all are damaged.
    """
    if run.checkpoints is None:
        return None
    path = latest_checkpoint(run.checkpoints) if run.engine.rank == 0 else None
    step = run.engine.total(float(path.name.removeprefix("step-")) + 1.0 if path else 0.0) - 1.0
    if step >= 0:
        return run.checkpoints / f"step-{int(step):08d}"
    if damaged := sorted(path.name for path in run.checkpoints.glob("step-*")):
        raise CheckpointError(
            f"{run.checkpoints}: all checkpoints are damaged ({', '.join(damaged)}); to begin anew, move them away"
        )
    return None


def resume_run(run: Run) -> None:
    """Go to the newest undamaged checkpoint, as if the process had never stopped; without one, seed and begin."""
    torch.manual_seed(run.config.seed)
    path = find_checkpoint(run)
    if path is None:
        run.metrics.truncate(-1)
        return
    groups, state = load_checkpoint(path, run.device)
    check_same_run(state, run.settings(), path)
    run.engine.load_tensors(groups)
    run.loader.load_state_dict(state["loader"])
    stored = groups["random"]  # a process that was not there before takes the state of the first one
    random = {
        name: stored.get(f"{name}-{run.engine.rank}", kept)
        for name, kept in stored.items()
        if "-" not in name
    }
    torch.set_rng_state(random["cpu"].cpu())
    if "cuda" in random and run.device.type == "cuda":
        torch.cuda.set_rng_state(random["cuda"].cpu(), run.device)
    chosen = run.compiled
    for name in COUNTERS:
        setattr(run, name, state.get(name, getattr(run, name)))  # a checkpoint of an older version has fewer
    if run.config.compile != "auto" or not run.engine.compiles:
        run.compiled = chosen
    run.saved_at = run.step
    run.metrics.truncate(run.step)
    log.info("resumed from %s", path)


def check_disk(run: Run) -> None:
    """Refuse a run whose checkpoints will not fit: now, and not when the first is written. One more is there while it is written.

    Raises:
        NoSpace: how much is needed, and how much is free.
    """
    if run.checkpoints is None or run.engine.rank > 0:
        return
    one = 3 * sum(
        p.numel() * p.element_size() for p in run.model.parameters()
    )  # weights and AdamW's two means
    number = run.config.keep + 1
    more = number * one - folder_bytes(run.checkpoints)
    need_disk(run.checkpoints, more, f"{number} checkpoints of {one / 1e9:.2f} GB")


@contextlib.contextmanager
def hold_folder(run: Run) -> Iterator[None]:
    """Keep the run's folder to this process, and clean up after one that was killed in it."""
    if run.folder is None or run.checkpoints is None or run.engine.rank > 0:
        yield
        return
    with run_lock(run.folder):
        run.checkpoints.mkdir(exist_ok=True)
        for folder in (run.folder, run.checkpoints):
            clean_leftovers(folder)
        with tempfile.TemporaryFile(dir=run.checkpoints):
            check_disk(run)  # it can be written, and there is room
        yield


def record_batch(run: Run, batch: Any, facts: Mapping[str, Any]) -> Path | None:
    """Write the batch of a bad step to `bad-steps/` in the run's folder, each process its own share; None without a folder.

    Args:
        run: before the step is booked.
        batch: a dataclass with tensors.
        facts: what to write beside it.
    """
    if run.folder is None:
        return None
    share = f"-rank-{run.engine.rank}" if run.engine.world_size > 1 else ""
    path = run.folder / "bad-steps" / f"step-{run.step + 1:08d}{share}.safetensors"
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    rest = {name: value for name, value in vars(batch).items() if name not in tensors}
    try:
        save_tensors(path, tensors, {"batch": json.dumps(rest), "facts": json.dumps(dict(facts))})
    except (OSError, MiniLLMError) as error:
        log.warning("the batch of step %d could not be recorded: %s", run.step + 1, error)
        return None
    return path


def load_batch(path: str | Path) -> tuple[Batch, dict[str, Any]]:
    """A batch that `record_batch` wrote, and the facts beside it: step, loss_nats, grad_norm, lr, reason."""
    kept = load_metadata(path)
    return Batch(**load_tensors(path), **json.loads(kept["batch"])), json.loads(kept["facts"])


def bad_step(run: Run, batch: Any, info: dict[str, Any], reason: str) -> None:
    """Record the batch of a step that was not made; then stop or count it, as the config says.

    Raises:
        TrainingDiverged: the policy is "stop", or there were too many in a row.
    """
    config, run.skipped, run.skips_in_a_row = run.config, run.skipped + 1, run.skips_in_a_row + 1
    path = record_batch(run, batch, {**info, "reason": reason})
    where = f"; its batch is in {path}" if path else ""
    said = f"step {run.step + 1}: {reason}: loss {info['loss_nats']:.4g}, gradient norm {info['grad_norm']:.4g}{where}"
    if config.bad_step == "skip" and run.skips_in_a_row <= config.max_skips:
        log.warning("%s; step skipped", said)
        return
    row = f" ({run.skips_in_a_row} in a row)" if config.bad_step == "skip" else ""
    raise TrainingDiverged(
        f"{said}{row}; the parameters are those of step {run.step}. Lower max_lr ({config.max_lr}), lengthen warmup_steps, look at "
        "the batch, or resume with bad_step='skip'"
    )


def train_step(run: Run, loss_fn: Callable[..., Tensor] = batch_loss) -> dict[str, Any]:
    """One optimizer step; returns its loss, learning rate, gradient norm, and how many steps have been skipped so far.

    Raises:
        TrainingDiverged: a bad step and the policy "stop"; the parameters are still those of the step before.
    """
    start, config = time.perf_counter(), run.config
    batch = next(run.loader)
    n_targets = int(run.engine.total(float(batch.n_targets)))
    loss = torch.zeros((), device=run.device)
    for part in batch.split(
        config.accumulation
    ):  # all of them: a process that skips one would leave the others waiting
        with autocast(run.device, config.dtype):
            part_loss = run.engine.loss(loss_fn, part.to(run.device), n_targets)
        run.engine.backward(part_loss)
        loss += part_loss.detach()
    loss_nats = run.engine.total(loss.item())
    lr, limit = (
        learning_rate(run.step + 1, config),
        {name: leap_limit(run.recent[name], config.spike) for name in run.recent},
    )
    usual = math.isfinite(loss_nats) and loss_nats < limit["loss_nats"]
    run.engine.norm_limit = limit["grad_norm"] if usual else -1.0  # no norm is below -1
    norm = run.engine.step(lr)
    info = {"step": run.step + 1, "tokens": run.tokens, "loss_nats": loss_nats, "lr": lr, "grad_norm": norm}
    if norm < run.engine.norm_limit:
        run.skips_in_a_row, info["tokens"] = 0, run.tokens + n_targets
        for name, values in run.recent.items():
            values[:] = [*values[-99:], info[name]]
    else:
        finite = math.isfinite(loss_nats) and math.isfinite(norm)
        bad_step(run, batch, info, "a leap" if finite else "not a finite number")
        n_targets = 0
    run.count(loss_nats, n_targets, time.perf_counter() - start)
    return {**info, "skipped": run.skipped}


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens now; 0 is never."""
    return every > 0 and step % every == 0


def evaluate_and_log(
    run: Run, info: dict[str, Any], eval_fn: Callable[[Transformer], Mapping[str, float]] | None
) -> dict[str, Any]:
    """Write a line of metrics, with the numbers of `eval_fn` if one is given; training does not notice."""
    line = run.line(info)
    if eval_fn is not None:
        with (
            run.engine.evaluation(),
            torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []),
        ):
            line |= eval_fn(run.model)
        run.model.train()
    run.metrics.write(line)
    return line


def run_loop(
    run: Run,
    caught: list[str],
    eval_fn: Callable[[Transformer], Mapping[str, float]] | None,
    on_step: Callable[[dict[str, Any]], None] | None,
    loss_fn: Callable[..., Tensor],
    progress: bool,
) -> None:
    """Steps, metrics, evaluations and checkpoints, to the end or to a signal; see `train`."""
    config = run.config
    bar = steady_bar(
        total=config.steps, initial=run.step, disable=not progress, unit="step", desc="train", leave=False
    )
    with bar, compiled(run.model, run.compiled):
        while run.step < config.steps:
            info = train_step(run, loss_fn)
            last = run.step == config.steps
            evaluate = eval_fn is not None and (last or due(run.step, config.eval_every))
            if last or evaluate or due(run.step, config.log_every):
                line = evaluate_and_log(run, info, eval_fn if evaluate else None)
                bar.set_postfix(
                    loss=f"{line['loss_nats'] or math.nan:.3f}", tok_s=f"{line['tokens_per_s']:.0f}"
                )
            bar.update()
            if on_step is not None:
                on_step(info)
            if last or due(run.step, config.save_every):
                save_run(run)
            if run.engine.total(float(len(caught))) and not last:  # all processes stop, or none
                first = next(name for names in run.engine.gather_objects(caught) for name in names)
                raise Interrupted(run.step, save_run(run), first)


def train(
    model: Transformer,
    loader: Stream,
    config: TrainConfig,
    *,
    run_dir: str | Path | None = None,
    eval_fn: Callable[[Transformer], Mapping[str, float]] | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = True,
    engine: Engine | None = None,
    loss_fn: Callable[..., Tensor] = batch_loss,
) -> TrainResult:
    """Train to `config.steps`, from the newest undamaged checkpoint in `run_dir` if there is one.

    Args:
        model: trained in place, on its device.
        loader: with the batch size and row length of `config`.
        run_dir: receives `metrics.jsonl` and `checkpoints/`; None keeps nothing.
        eval_fn: called every `eval_every` steps and at the end; its numbers join that step's line of metrics.
        on_step: called after every step with step, tokens, loss_nats, lr, grad_norm, skipped.
        progress: show a bar.
        engine: who owns gradients and optimizer; by default this process.
        loss_fn: `loss_fn(model, batch, n_targets)`: the sum of a batch's losses divided by `n_targets`.

    Raises:
        Interrupted: SIGINT, SIGTERM or SIGHUP came; the step was finished and saved.
        TrainingDiverged: a loss or gradient is not finite, or leaps; nothing was saved since.
        ValueError: loader and config disagree, or the checkpoint belongs to another run.
        RunLocked, NoSpace: another process writes to `run_dir`, or the checkpoints will not fit there.
    """
    folder = None if run_dir is None else Path(run_dir)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    run = Run(model, loader, config, folder, engine)
    with hold_folder(run), catch_signals() as caught:
        resume_run(run)
        model.train()
        run_loop(run, caught, eval_fn, on_step, loss_fn, progress and run.engine.rank == 0)
    loss = run.metrics.lines[-1]["loss_nats"] if run.metrics.lines else None
    return TrainResult(
        steps=run.step,
        tokens=run.tokens,
        loss_nats=math.nan if loss is None else loss,
        seconds=run.seconds,
        metrics=run.metrics.lines,
    )
