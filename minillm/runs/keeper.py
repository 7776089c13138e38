"""The keeper of a training run: its folder, metrics, evaluations, checkpoints, and what signals ask for (chapter 16)."""

import contextlib
import json
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.base.errors import CheckpointError, Interrupted, MiniLLMError
from minillm.base.files import clean_leftovers, folder_bytes, need_disk, run_lock
from minillm.base.machine import peak_flops, steady_bar
from minillm.batches import Batch
from minillm.runs.metrics import Interval, MetricsFile
from minillm.runs.signals import catch_signals
from minillm.storage.checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint, save_sharded
from minillm.storage.tensors import load_metadata, load_tensors, save_tensors
from minillm.train import Engine, Keeper, StepInfo, Stream, TrainConfig, TrainState
from minillm.transformer import Transformer, flops_per_token

log = logging.getLogger(__name__)

Evaluate = Callable[[Transformer], Mapping[str, float]]

FREE_SETTINGS = {  # they may change when a run goes on
    *("log_every", "eval_every", "save_every", "keep", "accumulation", "compile"),
    *("bad_step", "spike", "max_skips"),
}


class RunKeeper(Keeper):
    """Keeps a run of `train` in a folder, from which the same call goes on, to the bit, however it was stopped (chapter 16).

    Args:
        folder: receives `metrics.jsonl`, `checkpoints/` and `bad-steps/`; None keeps nothing.
        eval_fn: called every `eval_every` steps and at the end; its numbers join that step's line of metrics.
        on_step: called after every step.
        progress: show a bar, on process 0.

    Raises:
        Interrupted: from a step: SIGINT, SIGTERM or SIGHUP came; the step was finished and saved.
        CheckpointError: from `resume`: all checkpoints are damaged.
        ValueError: from `resume`: the newest undamaged checkpoint belongs to another run.
        RunLocked, NoSpace: from `resume`: another process writes to the folder, or the checkpoints will not fit there.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        eval_fn: Evaluate | None = None,
        on_step: Callable[[StepInfo], None] | None = None,
        progress: bool = True,
    ):
        super().__init__()
        self.folder = None if folder is None else Path(folder)
        self.checkpoints = None if folder is None else Path(folder) / "checkpoints"
        self.eval_fn, self.on_step, self.progress = eval_fn, on_step, progress
        self.held = contextlib.ExitStack()  # what must be given back at the end

    def resume(self, engine: Engine, loader: Stream, config: TrainConfig) -> TrainState:
        """Take the folder, and go to its newest undamaged checkpoint, as if the process had never stopped."""
        self.engine, self.loader, self.config = engine, loader, config
        self.model: Any = engine.model  # a Transformer, or what has its config and its `hidden`
        self.state, self.interval, self.saved_at = TrainState(), Interval(), -1
        writes = self.folder is not None and engine.rank == 0
        self.metrics = MetricsFile(
            self.folder / "metrics.jsonl" if self.folder and writes else None, self.lines
        )
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            if writes:
                self._take(self.folder, self.folder / "checkpoints")
        self.caught = self.held.enter_context(catch_signals())
        self.compiled = engine.compiles and should_compile(self.model, config)
        path = self._newest()
        if path is not None:
            self._load(path)
        self.metrics.truncate(-1 if path is None else self.state.step)
        self.bar = self.held.enter_context(
            steady_bar(
                total=config.steps,
                initial=self.state.step,
                disable=not (self.progress and engine.rank == 0),
                unit="step",
                desc="train",
                leave=False,
            )
        )
        self.held.enter_context(compiled(self.model, self.compiled))
        return self.state

    def record(self, info: StepInfo) -> str:
        """Write the batch of a step that was not made to `bad-steps/`, each process its own share; `load_batch` reads it."""
        if self.folder is None:
            return ""
        share = f"-rank-{self.engine.rank}" if self.engine.world_size > 1 else ""
        path = self.folder / "bad-steps" / f"step-{info.step:08d}{share}.safetensors"
        tensors = {name: value for name, value in vars(info.batch).items() if isinstance(value, Tensor)}
        rest = {name: value for name, value in vars(info.batch).items() if name not in tensors}
        names = ("step", "tokens", "loss_nats", "lr", "grad_norm", "reason")
        facts = {name: getattr(info, name) for name in names}
        try:
            save_tensors(path, tensors, {"batch": json.dumps(rest), "facts": json.dumps(facts)})
        except (OSError, MiniLLMError) as error:
            log.warning("the batch of step %d could not be recorded: %s", info.step, error)
            return ""
        return f"; its batch is in {path}"

    def after_step(self, info: StepInfo) -> None:
        """Metrics, evaluation and checkpoint, each when it is due; then stop, if a signal has come to any process."""
        config, last = self.config, info.step == self.config.steps
        self.interval.add(info)
        evaluate = self.eval_fn is not None and (last or _due(info.step, config.eval_every))
        if last or evaluate or _due(info.step, config.log_every):
            self._log(info, self.eval_fn if evaluate else None)
        self.bar.update()
        if self.on_step is not None:
            self.on_step(info)
        if last or _due(info.step, config.save_every):
            self.save()
        if self.engine.sum_over(float(len(self.caught))) and not last:  # all processes stop, or none
            first = next(name for names in self.engine.gather_objects(self.caught) for name in names)
            raise Interrupted(info.step, self.save(), first)

    def close(self) -> None:
        """Give back the folder, the signals and the model's uncompiled method."""
        self.held.close()

    def save(self) -> Path | None:
        """Write a checkpoint of this moment, once: weights, optimizer, loader, random numbers, counters."""
        if self.checkpoints is None:
            return None
        state, engine = self.state, self.engine
        path = self.checkpoints / f"step-{state.step:08d}"
        if self.saved_at == state.step:
            return path
        random, everything = self._random(), self._everything()
        where: dict[str, Any] = {"state": everything, "keep": self.config.keep}
        if engine.rank == 0:
            self.metrics.sync()
        if engine.sharded:
            shards = engine.shards() | ({"random": random} if engine.rank == 0 else {})
            everyone = {"rank": engine.rank, "everyone": engine.gather_objects}
            save_sharded(self.checkpoints, state.step, shards=shards, **where, **everyone)
        else:
            tensors = {**engine.tensors(), "random": random}  # all processes: an engine may have to collect
            if engine.rank == 0:
                save_checkpoint(self.checkpoints, state.step, tensors=tensors, **where)
        self.saved_at = state.step
        return path

    def _take(self, folder: Path, checkpoints: Path) -> None:
        """Keep the folder to this process, clean up after one that was killed in it, and see that there is room."""
        self.held.enter_context(run_lock(folder))
        checkpoints.mkdir(exist_ok=True)
        for place in (folder, checkpoints):
            clean_leftovers(place)
        with tempfile.TemporaryFile(dir=checkpoints):  # it can be written
            one = 3 * sum(
                p.numel() * p.element_size() for p in self.model.parameters()
            )  # AdamW has two means
            need_checkpoints(checkpoints, one, self.config.keep)

    def _newest(self) -> Path | None:
        """The newest undamaged checkpoint, None if there is none yet: for all processes the one that the first has found."""
        if self.checkpoints is None:
            return None
        found = latest_checkpoint(self.checkpoints) if self.engine.rank == 0 else None
        if name := self.engine.first(found and found.name):
            return self.checkpoints / name
        if damaged := sorted(path.name for path in self.checkpoints.glob("step-*")):
            raise CheckpointError(
                f"{self.checkpoints}: all checkpoints are damaged ({', '.join(damaged)}); to begin anew, move them away"
            )
        return None

    def _load(self, path: Path) -> None:
        """Go to the moment of a checkpoint. One of an older version has fewer counters."""
        groups, saved = load_checkpoint(path, self.engine.device)
        _check_same_run(saved, self._settings(), path)
        self.engine.load_tensors(groups)
        self.loader.load_state_dict(saved["loader"])
        self._set_random(groups["random"])
        for name in vars(self.state):
            setattr(self.state, name, saved.get(name, getattr(self.state, name)))
        self.interval = Interval(**saved.get("interval", {}))
        if self.config.compile == "auto" and self.engine.compiles:
            self.compiled = saved.get("compiled", self.compiled)
        self.saved_at = self.state.step
        log.info("resumed from %s", path)

    def _log(self, info: StepInfo, eval_fn: Evaluate | None) -> None:
        """Write a line of metrics, with the numbers of `eval_fn` if one is given; training does not notice."""
        model, device = self.model, self.engine.device
        flops = float(flops_per_token(model.config, self.config.seq_len, backward=True))
        peak = peak_flops(self.config.dtype, str(device)) * self.engine.world_size
        line = self.interval.line(info, flops, peak)
        self.interval = Interval()
        if eval_fn is not None:
            seeds = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
            with self.engine.evaluation(), seeds:
                line |= eval_fn(model)
            model.train()
        self.metrics.write(line)
        self.bar.set_postfix(loss=f"{line['loss_nats'] or math.nan:.3f}", tok_s=f"{line['tokens_per_s']:.0f}")

    def _settings(self) -> dict[str, Any]:
        """What must be the same when the run goes on: as JSON gives it back."""
        both = {"config": asdict(self.config), "model": asdict(self.model.config)}
        return json.loads(json.dumps(both))

    def _everything(self) -> dict[str, Any]:
        """The state of a checkpoint that is no tensor: settings, the loader's position, counters."""
        counters = {**vars(self.state), "interval": vars(self.interval), "compiled": self.compiled}
        order = ("step", "tokens", "seconds", "interval", "compiled", "skipped", "skips_in_a_row", "recent")
        return {
            **self._settings(),
            "loader": self.loader.state_dict(),
            **{name: counters[name] for name in order},
        }

    def _random(self) -> dict[str, Tensor]:
        """The states of the random generators of all processes; those of process 0 have no number."""
        mine = {"cpu": torch.get_rng_state()}
        if self.engine.device.type == "cuda":
            mine["cuda"] = torch.cuda.get_rng_state(self.engine.device)
        of_all = enumerate(self.engine.gather_objects(mine))
        return {f"{name}-{n}" if n else name: kept for n, each in of_all for name, kept in each.items()}

    def _set_random(self, stored: Mapping[str, Tensor]) -> None:
        """Take back what `_random` gave. A process that was not there before takes the state of the first one."""
        for name, kept in stored.items():
            mine = stored.get(f"{name}-{self.engine.rank}", kept).cpu()
            if name == "cpu":
                torch.set_rng_state(mine)
            elif name == "cuda" and self.engine.device.type == "cuda":
                torch.cuda.set_rng_state(mine, self.engine.device)


def need_checkpoints(checkpoints: Path, one_bytes: int, keep: int) -> None:
    """See that a folder has room for the checkpoints that will be kept, and for one more while it is written.

    Raises:
        NoSpace: it has not.
    """
    there = folder_bytes(checkpoints) if checkpoints.exists() else 0
    purpose = f"{keep + 1} checkpoints of {one_bytes / 1e9:.2f} GB"
    need_disk(checkpoints, (keep + 1) * one_bytes - there, purpose)


def load_batch(path: str | Path) -> tuple[Batch, dict[str, Any]]:
    """A batch that `RunKeeper.record` wrote, and the facts beside it: step, loss_nats, grad_norm, lr, reason."""
    kept = load_metadata(path)
    return Batch(**load_tensors(path), **json.loads(kept["batch"])), json.loads(kept["facts"])


def should_compile(model: Transformer, config: TrainConfig) -> bool:
    """Whether compiling pays. "auto": runs of more than about 30 minutes on a CPU or 3 on a GPU, where a compiler is.

    The estimate takes a nominal speed and measures nothing, so that a run that resumes decides as it did before.
    """
    device = model.embed.weight.device.type
    if config.compile != "auto":
        return config.compile == "on"
    if device == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        return False
    # FLOP/s that eager training reaches, roughly
    rates = {"cpu": 40e9 * torch.get_num_threads(), "cuda": 200e12}
    tokens = config.steps * config.batch_size * config.seq_len
    work = tokens * float(flops_per_token(model.config, config.seq_len, backward=True))
    return work / rates.get(device, math.inf) > (1800 if device == "cpu" else 180)


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


def _check_same_run(saved: Mapping[str, Any], settings: Mapping[str, Any], path: Path) -> None:
    """Refuse to continue a run with settings that would have made another run: the first that differs."""
    for group, values in settings.items():
        for name, value in values.items():
            before = saved[group].get(name)
            if name not in FREE_SETTINGS and before != value:
                raise ValueError(
                    f"{path} was trained with {group} {name}={before}, now {name}={value}; use another run_dir"
                )


def _due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens now; 0 is never."""
    return every > 0 and step % every == 0
