"""The machine under a run: device, dtype, threads, seed, memory allocator, log, and what to write beside a result."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import math
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm


def peak_bytes(run: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """The most memory that tensors made by `run` take at once, by torch's own count."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    held = peak = 0
    results: Any = record.profiler and record.profiler.kineto_results
    for event in results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def pick_device(name: str = "auto") -> torch.device:
    """The device of a name, checked to exist; "auto" takes a GPU when there is one.

    Raises:
        ValueError: the name is unknown, or this machine has no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda, cuda:0 … or mps, got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} is not there: {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps' is not there; use --device cpu")
    return device


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products run faster than float32 ones on this device."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Without AMX or AVX512_BF16 a CPU emulates bfloat16, slower than float32.
    return device.type == "cpu" and (
        torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    )


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name; "auto" takes bfloat16 where it is fast.

    Raises:
        ValueError: the name is not auto, float32 or bfloat16.
    """
    if name not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"dtype must be auto, float32 or bfloat16, got {name!r}")
    if name == "auto":
        return torch.bfloat16 if fast_bfloat16(device) else torch.float32
    return getattr(torch, name)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's random generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def mkl_idles() -> bool:
    """Whether MKL, which multiplies float32 matrices for torch, leaves half of this processor idle where oneDNN does not.

    MKL takes 256-bit instructions on AMD processors, also on those that have 512 bits; oneDNN, which torch has for 16-bit
    products, takes what there is. Measured on one core of an EPYC: 107 and 240 GFLOP/s.
    """
    name = _cpu_name()
    amd = name.startswith("AMD ") or "AuthenticAMD" in name
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return amd and wide and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def set_up_logging(verbose: bool = False) -> None:
    """Send the package's log to standard error, one line a record."""
    logger = logging.getLogger("minillm")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING)


@functools.cache
def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_machine(device: torch.device | None = None) -> dict[str, Any]:
    """What belongs beside a measured figure: processor, threads, device, versions. No names of hosts or paths."""
    described: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "os": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": "cpu" if device is None else device.type,
    }
    if device is not None and device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
        described["cuda"] = torch.version.cuda
    return described


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: on the GPU for a CUDA device, else resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def steady_bar(**options: Any) -> tqdm:
    """A progress bar that goes by a clock that nobody sets: a computer's date may jump in a long run, and back."""
    bar = tqdm(**options)
    vars(bar)["_time"] = time.monotonic  # tqdm takes time.time, and offers no choice
    bar.start_t = bar.last_print_t = time.monotonic()
    return bar


# Dense bfloat16 FLOP/s without sparsity, from NVIDIA's data sheets: H100/H200 SXM 989.4e12, A100 312e12, L40S 362e12,
# L4 121e12, RTX 4090 165.2e12 (float32 accumulation).
PEAK_FLOPS = {
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
}


@lru_cache(maxsize=8)
def peak_flops(dtype: str = "float32", device: str = "cpu") -> float:
    """FLOP/s that matrix products can reach: from the data sheet for a known GPU in bfloat16, otherwise measured.

    Measured: the best of some products of 1024 × 1024 matrices with the current number of threads.
    """
    if device.startswith("cuda") and dtype == "bfloat16":
        name = torch.cuda.get_device_name(device)
        for key, value in PEAK_FLOPS.items():
            if key in name:
                return value
    n = 1024 if device == "cpu" else 8192
    dice = torch.Generator(
        device
    )  # of its own: a run that measures draws the same numbers as one that does not
    a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype), generator=dice)
    best = math.inf
    for _ in range(12):
        start = time.perf_counter()
        a @ a
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def held_bytes(*roots: Any) -> int:
    """Bytes of all tensors that can be reached from `roots`, each piece of memory counted once.

    Without `roots`: of all tensors that are alive in this process, whoever holds them.
    """
    storages: dict[int, int] = {}
    seen: set[int] = set()
    if not roots:
        gc.collect()
        roots = tuple(thing for thing in gc.get_objects() if issubclass(type(thing), Tensor))
    left: list[Any] = list(roots)
    while left:
        thing = left.pop()
        if id(thing) in seen or isinstance(thing, type):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            local = getattr(
                thing, "_local_tensor", thing
            )  # a tensor of FSDP2 says the size of the whole, and holds a slice
            if local.device.type != "meta":
                storages[local.untyped_storage()._cdata] = local.untyped_storage().nbytes()
            left.append(thing.grad if thing.is_leaf else None)
        elif isinstance(thing, Mapping):
            left += [*thing.keys(), *thing.values()]
        elif isinstance(thing, list | tuple | set):
            left += thing
        elif hasattr(thing, "__dict__") and type(thing).__module__.startswith(("minillm", "torch")):
            left += vars(thing).values()
    return sum(storages.values())
