"""One command, at most eight minutes, on any GPU: training MFU, decoding, attention, memory, into data/results/gpu-<name>.json.

python -m benchmarks.gpu
python -m benchmarks.gpu --device cpu --smoke      # the same code on toy sizes, in seconds; stores nothing in data/
"""

import gc
import math
import re
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.store import Store
from minillm.attention import Mask
from minillm.base.machine import describe_machine, peak_flops, peak_memory_bytes, pick_device
from minillm.flash import BACKENDS, INSTALLED
from minillm.generate import Sampler, generate
from minillm.runs.keeper import compiled
from minillm.train import Engine, TrainConfig, autocast, linear_cross_entropy, model_flops_utilization
from minillm.transformer import ModelConfig, Transformer, count_parameters, flops_per_token, kv_cache_bytes

# LLaMA shapes; hidden widths are LLaMA's rule, two thirds of 4 D rounded up.
MODELS = {
    "125M": ModelConfig(vocab_size=32000, dim=768, n_layers=12, n_heads=12, n_kv_heads=12, hidden_dim=2048, max_seq_len=2048),
    "350M": ModelConfig(vocab_size=32000, dim=1024, n_layers=24, n_heads=16, n_kv_heads=16, hidden_dim=2816, max_seq_len=2048),
    "1.3B": ModelConfig(vocab_size=32000, dim=2048, n_layers=24, n_heads=16, n_kv_heads=16, hidden_dim=5504, max_seq_len=2048),
    "7B": ModelConfig(vocab_size=32000, dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, hidden_dim=11008, max_seq_len=4096),
}  # fmt: skip
SMOKE = ModelConfig(vocab_size=64, dim=32, n_layers=1, n_heads=2, n_kv_heads=2, hidden_dim=64, max_seq_len=64)
BATCH = {"125M": 32, "350M": 16, "1.3B": 8, "7B": 1}  # rows of 2,048 tokens; halved until they fit


@dataclass(frozen=True, kw_only=True)
class Args:
    """Measure this GPU."""

    device: str = "cuda"
    """cuda, cuda:1 …; cpu for a smoke test."""
    smoke: bool = False
    """Toy sizes, one step each, nothing stored in data/results."""
    budget_min: float = 8.0
    """No measurement begins that would probably end after so many minutes."""
    only: str = ""
    """Only measurements whose name contains this."""
    resume: bool = False
    """Keep what an unfinished run has measured already."""
    out: Path | None = None
    """The result file; by default named after the GPU."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the measurements share."""

    device: torch.device
    smoke: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until everything that was asked of the device is done."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object], *, rounds: int, warm_up: int = 2) -> list[float]:
        """Wall-clock seconds of each round, the device idle before and after."""
        times = []
        for number in range(warm_up + rounds):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            if number >= warm_up:
                times.append(time.perf_counter() - start)
        return times

    def fresh(self) -> None:
        """Free what the last measurement left, and count memory from here."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def model(self, name: str, dtype: torch.dtype) -> Transformer:
        config = SMOKE if self.smoke else MODELS[name]
        with torch.device(self.device):
            return Transformer(config).to(dtype)


def matmul(setting: Setting) -> dict[str, Any]:
    """What the card does at best: bf16 products of square matrices, and copies."""
    n = 128 if setting.smoke else 8192
    a, b = (torch.randn(n, n, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    products = setting.seconds(lambda: a @ b, rounds=20, warm_up=5)
    source = torch.empty(2**20 if setting.smoke else 2**30, device=setting.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copies = setting.seconds(lambda: target.copy_(source), rounds=10)
    return {
        "bf16_flops_per_s": 2 * n**3 / statistics.median(products),
        "copy_bytes_per_s": 2 * source.nbytes / statistics.median(copies),
        "samples_s": {"product": products, "copy": copies},
    }


def training_batch(setting: Setting, model: Transformer, batch: int, mode: str) -> dict[str, Any]:
    """Steps of bf16 training at one batch size: forward, loss, backward, clipping, AdamW."""
    seq_len = min(2048, model.config.max_seq_len)
    tokens = torch.randint(model.config.vocab_size, (batch, seq_len + 1), device=setting.device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    engine = Engine(model, TrainConfig(steps=1, batch_size=batch, seq_len=seq_len, dtype="bfloat16"))

    def step() -> None:
        with autocast(setting.device, "bfloat16"):
            loss = linear_cross_entropy(model.hidden(x), model.head.weight, y, n_targets=y.numel())
        engine.backward(loss)
        engine.step(1e-4)

    start = time.perf_counter()
    with compiled(model, True) if mode == "compiled" and not setting.smoke else nullcontext():
        step()
        setting.wait()
        first = time.perf_counter() - start
        times = setting.seconds(step, rounds=1 if setting.smoke else 8)
    return {"batch": batch, "seq_len": seq_len, "first_step_s": first, "samples_s": times}


def training(setting: Setting, name: str, mode: str) -> dict[str, Any]:
    """Tokens a second, MFU and memory of training, at the largest batch up to BATCH that fits."""
    batch = 2 if setting.smoke else BATCH[name]
    while True:
        setting.fresh()
        model = setting.model(name, torch.float32)
        try:
            result = training_batch(setting, model, batch, mode)
            break
        except torch.cuda.OutOfMemoryError:
            if batch == 1:
                raise
        del model
        batch //= 2
    tokens_per_s = result["batch"] * result["seq_len"] / statistics.median(result["samples_s"])
    flops = float(flops_per_token(model.config, result["seq_len"], backward=True))
    peak = peak_flops("bfloat16", str(setting.device))
    return result | {
        "parameters": count_parameters(model.config).total,
        "tokens_per_s": tokens_per_s,
        "mfu": model_flops_utilization(tokens_per_s, flops, peak),
        "peak_flops": peak,
        "peak_bytes": peak_memory_bytes(setting.device),
    }


def decoding(setting: Setting, name: str, batch: int) -> dict[str, Any]:
    """Greedy decoding in bf16 after a prompt of 128, and the share of the bandwidth that reading weights and cache takes."""
    setting.fresh()
    model = setting.model(name, torch.bfloat16).eval()
    prompt_len, new = (8, 4) if setting.smoke else (128, 128)
    prompt = torch.randint(1, model.config.vocab_size, (batch, prompt_len), device=setting.device)

    def decode(n: int) -> None:
        generate(model, prompt, max_new_tokens=n, sampler=Sampler.greedy())

    whole = setting.seconds(lambda: decode(new), rounds=1 if setting.smoke else 3, warm_up=1)
    first = setting.seconds(lambda: decode(1), rounds=1 if setting.smoke else 3, warm_up=1)
    step_s = (statistics.median(whole) - statistics.median(first)) / (new - 1)
    weights = sum(p.nbytes for p in model.parameters()) - model.embed.weight.nbytes
    cache = kv_cache_bytes(model.config, prompt_len + new // 2, batch_size=batch)
    return {
        "batch": batch,
        "prompt": prompt_len,
        "new_tokens": new,
        "tokens_per_s": batch / step_s if step_s > 0 else math.nan,
        "bytes_per_s": (weights + cache) / step_s if step_s > 0 else math.nan,
        "peak_bytes": peak_memory_bytes(setting.device),
        "samples_s": {"whole": whole, "first": first},
    }


def attention(setting: Setting, backend: str) -> dict[str, Any]:
    """One kernel of chapter 12, causal, bf16, forward and backward: FLOP/s, half the square counted."""
    setting.fresh()
    B, H, T, Dh = (1, 2, 32, 16) if setting.smoke else (4, 16, 4096, 128)
    shape = (B, H, T, Dh)
    q, k, v = (
        torch.randn(shape, device=setting.device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    upstream, mask = torch.randn(shape, device=setting.device, dtype=torch.bfloat16), Mask()

    def forward() -> torch.Tensor:
        return BACKENDS[backend](q, k, v, mask)

    def both() -> None:
        torch.autograd.grad(forward(), (q, k, v), upstream)

    rounds = 1 if setting.smoke else 10
    with torch.no_grad():
        alone = setting.seconds(forward, rounds=rounds)
    together = setting.seconds(both, rounds=rounds)
    flops = 4 * B * H * T * T * Dh / 2
    return {
        "shape": shape,
        "forward_flops_per_s": flops / statistics.median(alone),
        "both_flops_per_s": 3.5 * flops / statistics.median(together),
        "samples_s": {"forward": alone, "both": together},
    }


def plan(setting: Setting) -> dict[str, tuple[float, Callable[[], dict[str, Any]]]]:
    """What is measured, the most telling first, each with a guess of its minutes."""
    works: dict[str, tuple[float, Callable[[], dict[str, Any]]]] = {"matmul": (0.2, lambda: matmul(setting))}
    for name, minutes in (("125M", 1.0), ("350M", 1.7), ("1.3B", 2.0)):
        works[f"train {name} compiled"] = minutes, lambda name=name: training(setting, name, "compiled")
    kernels = (
        ["sdpa", "triton"] + ["flash-attn"] * INSTALLED["flash_attn"] if setting.on_gpu else ["sdpa", "tiled"]
    )
    for backend in kernels:  # the Triton kernels are tuned at their first call
        minutes = 0.6 if backend == "triton" else 0.1
        works[f"attention {backend}"] = minutes, lambda backend=backend: attention(setting, backend)
    for name, batch in (("125M", 1), ("1.3B", 1), ("1.3B", 16), ("7B", 1)):
        works[f"decode {name} batch {batch}"] = (
            0.35,
            lambda name=name, batch=batch: decoding(setting, name, batch),
        )
    for name in ("125M", "1.3B"):
        works[f"train {name} eager"] = 0.5, lambda name=name: training(setting, name, "eager")
    return works


def told(result: dict[str, Any]) -> str:
    """The figures of a result, without its samples."""
    return ", ".join(
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items() if k != "samples_s"
    )


def run(args: Args) -> Path:
    """Measure, store each result at once, and return the file."""
    start, setting = time.monotonic(), Setting(device=pick_device(args.device), smoke=args.smoke)
    if not (setting.on_gpu or setting.smoke):
        raise SystemExit("this measures a GPU; without one, --device cpu --smoke tries the script")
    machine = describe_machine(setting.device)
    name = re.sub(r"[^a-z0-9]+", "-", machine.get("gpu", "smoke").lower()).strip("-")
    path = args.out or Path("build/bench" if args.smoke else "data/results") / f"gpu-{name}.json"
    store = Store(path, command="python -m benchmarks.gpu", machine=machine, resume=args.resume)
    store.note(models={name: asdict(config) for name, config in MODELS.items()})
    for name, (minutes, work) in plan(setting).items():
        if args.only not in name or store.has(name):
            continue
        if (time.monotonic() - start) / 60 + minutes > args.budget_min:
            print(f"{name:22} left out: about {minutes} minutes, which the budget no longer has", flush=True)
            continue
        try:
            result = work()
        except (torch.cuda.OutOfMemoryError, RuntimeError) as error:
            result = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        store.put(name, result)
        print(f"{name:22} {told(result)}", flush=True)
    return path


if __name__ == "__main__":
    print(f"written: {run(tyro.cli(Args, description=__doc__))}")
