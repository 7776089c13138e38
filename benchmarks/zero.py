"""One training step on two processes of this machine: our ZeRO, DistributedDataParallel, FSDP2 and DeepSpeed, in turns;
and what each process holds of the model's states in it.

    python -m benchmarks.zero

writes `data/results/zero.json`. About five minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from minillm.base.files import atomic_write
from minillm.base.machine import describe_machine, held_bytes
from minillm.base.processes import run_processes
from minillm.batches import make_batch
from minillm.runs.engines import EngineConfig, make_engine
from minillm.train import Engine, TrainConfig, batch_loss
from minillm.transformer import ModelConfig, Transformer, count_parameters

RESULTS = Path(__file__).parents[1] / "data" / "results" / "zero.json"
SHAPE = ModelConfig(
    vocab_size=512, dim=256, n_layers=4, n_heads=8, n_kv_heads=4, hidden_dim=704, max_seq_len=128, tied=True
)
ENGINES = {
    "ours, stage 0": EngineConfig(engine="zero", zero_stage=0),
    "ours, stage 1": EngineConfig(engine="zero", zero_stage=1),
    "ours, stage 2": EngineConfig(engine="zero", zero_stage=2),
    "ours, stage 3": EngineConfig(engine="zero", zero_stage=3),
    "torch, FSDP2 (2)": EngineConfig(engine="fsdp2", zero_stage=2),
    "torch, FSDP2 (3)": EngineConfig(engine="fsdp2", zero_stage=3),
    "DeepSpeed, stage 2": EngineConfig(engine="deepspeed", zero_stage=2),
    "DeepSpeed, stage 3": EngineConfig(engine="deepspeed", zero_stage=3),
}


class Distributed(Engine):
    """`torch.nn.parallel.DistributedDataParallel` and torch's AdamW, for comparison."""

    def __init__(self, model: Transformer, config: TrainConfig):
        super().__init__(model, config)
        self.world_size = dist.get_world_size()

        class Loss(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, batch: Any, n_targets: int) -> torch.Tensor:
                return batch_loss(self.model, batch, n_targets)

        self.parallel = nn.parallel.DistributedDataParallel(Loss(), gradient_as_bucket_view=True)

    def loss(self, loss_fn: Any, batch: Any, n_targets: int) -> torch.Tensor:
        return self.parallel(batch, n_targets)

    def backward(self, loss: torch.Tensor) -> None:
        (loss * self.world_size).backward()


def batch_of(rows: int, seed: int) -> Any:
    tokens = torch.randint(512, (rows, 129), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(128).expand(rows, -1)
    return make_batch(tokens[:, :-1], tokens[:, 1:], torch.zeros(rows, 128, dtype=torch.long), positions)


def measure(rounds: int, rows: int) -> dict[str, list[float]]:
    """Milliseconds of each step, by engine; everyone waits for everyone before a step."""
    world_size = dist.get_world_size()
    config = TrainConfig(steps=rounds, batch_size=rows, seq_len=128)
    batch = batch_of(rows // world_size, dist.get_rank())
    engines: dict[str, Engine] = {}
    if world_size == 1:
        engines["alone, all rows"] = Engine(Transformer(SHAPE), config)
    else:
        for name, settings in ENGINES.items():
            engines[name] = make_engine(Transformer(SHAPE), config, settings)
        engines["torch, DDP"] = Distributed(Transformer(SHAPE), config)
    times: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(rounds + 2):
        for name, engine in engines.items():
            dist.barrier()
            start = time.perf_counter()
            engine.backward(engine.loss(batch_loss, batch, rows * 128))
            engine.step(1e-3)
            dist.barrier()
            if number >= 2:
                times[name].append(1000 * (time.perf_counter() - start))
    return times


HELD = {name: settings for name, settings in ENGINES.items() if settings.engine != "deepspeed"} | {
    f"DeepSpeed, stage {stage}": EngineConfig(engine="deepspeed", zero_stage=stage) for stage in range(4)
}


def held(settings: EngineConfig, shape: ModelConfig = SHAPE) -> dict[str, int]:
    """Bytes that an engine holds on this process in its second step, when AdamW has its state; each memory counted once.

    "whole": parameters that are whole at the end of the forward pass. Then, between backward pass and update:
    "parameters"; "gradients"; "optimizer", AdamW's state and the float32 copies that it updates; "other", all other
    tensors that came with the engine. "update": all of it, at its largest, whenever AdamW is called.
    """
    rows, world_size = 2, dist.get_world_size()
    config = TrainConfig(steps=2, batch_size=rows * world_size, seq_len=128, dtype=settings.parameters)
    batch = batch_of(rows, dist.get_rank())
    before = held_bytes()
    engine: Any = make_engine(Transformer(shape), config, settings)
    outer = engine.deepspeed.optimizer if settings.engine == "deepspeed" else engine
    optimizers = getattr(engine, "optimizers", None) or [getattr(outer, "optimizer", outer)]
    found = {"update": 0}

    def look(*_: Any) -> None:
        found["update"] = max(found["update"], held_bytes() - before)

    def parts() -> Iterator[tuple[str, Any]]:
        owners = [*engine.model.parameters(), *getattr(engine, "units", ())]
        slices = [getattr(owner, name, None) for owner in owners for name in ("ds_tensor", "shard")]
        yield "parameters", [*(p.data for p in engine.model.parameters()), *slices]
        yield "gradients", [*(owner.grad for owner in owners), getattr(outer, "averaged_gradients", None)]
        yield "optimizer", [(p.data, state) for adam in optimizers for p, state in adam.state.items()]

    hook = register_optimizer_step_pre_hook(look)
    for _ in range(2):
        loss = engine.loss(batch_loss, batch, rows * world_size * 128)
        # A parameter with a `_local_tensor` is FSDP2's slice of it.
        found["whole"] = held_bytes(
            [p.data for p in engine.model.parameters() if not hasattr(p, "_local_tensor")]
        )
        engine.backward(loss)
        if settings.engine == "zero":
            engine.settle()
        del loss
        reached: list[Any] = []
        for name, things in parts():
            counted = held_bytes(reached)
            reached.append(things)
            found[name] = held_bytes(reached) - counted
            del things
        found["other"] = held_bytes() - before - held_bytes(reached)
        del reached
        engine.step(1e-3)
    hook.remove()
    return found


def held_by_all() -> dict[str, dict[str, list[dict[str, int]]]]:
    """What `held` finds on each of two processes, by engine and dtype of the parameters; new processes for each."""
    return {
        name: {
            dtype: run_processes(held, 2, replace(settings, parameters=dtype))
            for dtype in ("float32", "bfloat16")
            if (name, dtype) != ("DeepSpeed, stage 0", "bfloat16")  # which `make_engine` refuses
        }
        for name, settings in HELD.items()
    }


def step_times(rounds: int, rows: int) -> dict[str, Any]:
    """Median and all times of a step by engine, with the command and the machine."""
    times = (
        run_processes(measure, 1, rounds, rows)[0] | run_processes(measure, 2, rounds, rows, timeout_s=600)[0]
    )
    order = ["alone, all rows", *list(ENGINES)[:4], "torch, DDP", *list(ENGINES)[4:]]
    return {
        "command": f"python -m benchmarks.zero --rounds {rounds} --rows {rows}",
        "parameters": count_parameters(SHAPE).total,
        "step_ms": {name: round(statistics.median(times[name]), 1) for name in order},
        "samples_ms": {name: [round(value, 1) for value in times[name]] for name in order},
        "machine": describe_machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--bytes", action="store_true", help="only the bytes; the times of the file are kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = json.loads(RESULTS.read_text()) if args.bytes else step_times(args.rounds, args.rows)
    result["held_bytes"] = held_by_all()
    with atomic_write(RESULTS) as file:
        json.dump(result, file, indent=1)
    for name, value in result["step_ms"].items():
        print(f"{name:20} {value:8.1f} ms")
    for name, by_dtype in result["held_bytes"].items():
        for dtype, ranks in by_dtype.items():
            each = {part: round(value / result["parameters"], 2) for part, value in ranks[0].items()}
            print(f"{name:20} {dtype:9} bytes a parameter on process 0: {each}")


if __name__ == "__main__":
    main()
