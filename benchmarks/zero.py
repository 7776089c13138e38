"""One training step on two processes of this machine: our ZeRO, DistributedDataParallel, FSDP2 and DeepSpeed, in turns.

    python -m benchmarks.zero

writes `data/results/zero.json`. About two minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from minillm.batches import make_batch
from minillm.checkpoint import atomic_write
from minillm.runtime import describe_machine
from minillm.train import Engine, TrainConfig, batch_loss
from minillm.transformer import ModelConfig, Transformer, count_parameters
from minillm.zero import EngineConfig, make_engine, run_processes

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    times = (
        run_processes(measure, 1, args.rounds, args.rows)[0]
        | run_processes(measure, 2, args.rounds, args.rows, timeout_s=600)[0]
    )
    order = ["alone, all rows", *list(ENGINES)[:4], "torch, DDP", *list(ENGINES)[4:]]
    result = {
        "command": f"python -m benchmarks.zero --rounds {args.rounds} --rows {args.rows}",
        "parameters": count_parameters(SHAPE).total,
        "step_ms": {name: round(statistics.median(times[name]), 1) for name in order},
        "samples_ms": {name: [round(value, 1) for value in times[name]] for name in order},
        "machine": describe_machine(),
    }
    with atomic_write(RESULTS) as file:
        json.dump(result, file, indent=1)
    for name, value in result["step_ms"].items():
        print(f"{name:20} {value:8.1f} ms")


if __name__ == "__main__":
    main()
