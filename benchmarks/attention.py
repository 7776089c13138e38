"""Attention by every backend of this machine: time, TFLOP/s and peak memory, both passes, 512 to 32K tokens, causal.

python -m benchmarks.attention                   # at most eight minutes; writes data/results/attention-<device>.json
python -m benchmarks.attention --minutes 4 --device cuda
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import psutil
import torch

from benchmarks.packing import RESULTS
from minillm.attention import Mask
from minillm.base.files import atomic_write
from minillm.base.machine import describe_machine, peak_bytes, pick_device, seed_everything
from minillm.flash import BACKENDS, INSTALLED
from minillm.kernels.matmul import tune_allocator

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
HEAD_DIMS = (64, 128)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement. TFLOP/s count the causal half only: 2 products forward, 5 backward."""

    head_dim: int
    backend: str
    length: int
    batch_size: int
    n_heads: int
    forward_ms: float
    backward_ms: float
    forward_tflops: float
    backward_tflops: float
    peak_mib: float
    repeats: int


def shape(device: torch.device, length: int, head_dim: int) -> tuple[int, int]:
    """Batch size and heads: on a GPU 16K tokens and a width of 2,048, as the FlashAttention papers measure; else one."""
    return (max(1, 16384 // length), 2048 // head_dim) if device.type == "cuda" else (1, 1)


def free_bytes(device: torch.device) -> int:
    """Memory that nobody uses."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def naive_bytes(length: int, head_dim: int, device: torch.device, itemsize: int) -> int:
    """At the peak of the backward pass: the weights, their gradient, that of the scores, and one between them."""
    B, H = shape(device, length, head_dim)
    return 4 * B * H * length**2 * itemsize


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call; on a GPU between two events."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start_event.record()
    run()
    end_event.record()
    torch.cuda.synchronize(device)
    return start_event.elapsed_time(end_event) / 1000


def measure(
    name: str, length: int, head_dim: int, device: torch.device, dtype: torch.dtype, allowed: float
) -> Row:
    """Median times of both passes, from as many repeats as fit into `allowed` seconds, at most 20; one if it takes long."""
    B, H = shape(device, length, head_dim)
    q, k, v, grad = (torch.randn(B, H, length, head_dim, device=device, dtype=dtype) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out: list[torch.Tensor] = []

    def forward() -> None:
        out[:] = [BACKENDS[name](*inputs, Mask())]

    def backward() -> None:
        torch.autograd.grad(out.pop(), inputs, grad)

    start = time.perf_counter()
    peak = peak_bytes(lambda: (forward(), backward()), device) / 2**20  # warms up, and compiles
    least = 1 if time.perf_counter() - start > 5 else 3
    samples, start = [], time.perf_counter()
    while len(samples) < 20 and (len(samples) < least or time.perf_counter() - start < allowed):
        samples.append((seconds(forward, device), seconds(backward, device)))
    times = [statistics.median(side) for side in zip(*samples)]
    product = B * H * length * length * head_dim  # 2 n² d operations, half of them seen
    return Row(
        head_dim=head_dim, backend=name, length=length, batch_size=B, n_heads=H, forward_ms=1000 * times[0],
        backward_ms=1000 * times[1], forward_tflops=2 * product / times[0] / 1e12,
        backward_tflops=5 * product / times[1] / 1e12, peak_mib=peak, repeats=len(samples),
    )  # fmt: skip


def backends(device: torch.device) -> list[str]:
    """Those that this machine has for causal attention with gradients."""
    if device.type != "cuda":
        return ["naive", "tiled", "sdpa"]
    optional = {"triton": "triton", "flash-attn": "flash_attn"}
    return ["naive", "sdpa", *(name for name, module in optional.items() if INSTALLED[module])]


def run(device: torch.device, minutes: float) -> dict:
    """All cases from short to long, until the time is up; a case that would not fit is left out and noted."""
    end, dtype = time.monotonic() + 60 * minutes, torch.bfloat16 if device.type == "cuda" else torch.float32
    rows: list[Row] = []
    left_out: list[dict] = []
    for length in LENGTHS:
        for head_dim in HEAD_DIMS:
            for name in backends(device):
                last = [row for row in rows if (row.head_dim, row.backend) == (head_dim, name)][-1:]
                once = sum(4 * (row.forward_ms + row.backward_ms) / 1000 for row in last)
                took = once * (2.2 if once > 5 else 4)  # the warm-up, and at least one sample or three
                why = None
                needed = naive_bytes(length, head_dim, device, dtype.itemsize) if name == "naive" else 0
                if needed > 0.8 * free_bytes(device):
                    why = "too much memory"
                elif time.monotonic() + took > end or (length > LENGTHS[0] and not last):
                    why = "too long"
                if why:
                    left_out.append({"head_dim": head_dim, "backend": name, "length": length, "why": why})
                    continue
                rows.append(measure(name, length, head_dim, device, dtype, allowed=minutes / 4))
                row = rows[-1]
                print(
                    f"{name:10} Dh {head_dim:3} {length:6,} tokens: {row.forward_ms:9.2f} + {row.backward_ms:9.2f} ms, "
                    f"{row.forward_tflops:7.3f} and {row.backward_tflops:7.3f} TFLOP/s, {row.peak_mib:8.1f} MiB",
                    flush=True,
                )
    return {
        "command": "python -m benchmarks.attention",
        "machine": describe_machine(device),
        "dtype": str(dtype).removeprefix("torch."),
        "mask": "causal",
        "rows": [asdict(row) for row in rows],
        "left_out": left_out,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--minutes", type=float, default=7.0, help="begin nothing that would end later than this"
    )
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    seed_everything(0)
    tune_allocator()
    result = run(device, args.minutes)
    path = RESULTS.parent / f"attention-{device.type}.json"
    with atomic_write(path) as file:
        json.dump(result, file, indent=1)
    print(path.name, "written;", f"{len(result['left_out'])} cases left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
