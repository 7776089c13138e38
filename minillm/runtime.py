"""The machine under a run: device, dtype, threads, seed, memory allocator, log, and what to write beside a result."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import functools
import logging
import os
import platform
import random
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from minillm.checkpoint import MiniLLMError

__all__ = [
    "NoSpace",
    "PeerLost",
    "RunLocked",
    "World",
    "describe_machine",
    "fast_bfloat16",
    "folder_bytes",
    "mkl_idles",
    "need_disk",
    "peak_memory_bytes",
    "pick_device",
    "pick_dtype",
    "process_group",
    "run_lock",
    "seed_everything",
    "set_up_logging",
    "steady_bar",
    "tune_allocator",
    "tune_matmul",
]

log = logging.getLogger(__name__)


class RunLocked(MiniLLMError):
    """Another process is writing to the same run folder."""


class PeerLost(MiniLLMError):
    """Another process of the run has ended, or has not answered in time."""


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of a run, and which of them this one is. `local_rank` counts those of one machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    patient: Any = None

    def wait(self) -> None:
        """Until all processes are here, for as long as it takes: one of them may be preparing data. Returns at once if alone."""
        if self.world_size > 1:
            import torch.distributed as dist

            with _lost_peers(self.rank):
                dist.barrier(self.patient)


@contextlib.contextmanager
def _lost_peers(rank: int) -> Iterator[None]:
    """Say what a failed collective means. torch raises a plain RuntimeError for gloo, a DistError for NCCL."""
    import torch.distributed as dist

    try:
        yield
    except RuntimeError as error:
        text = str(error)
        words = ("gloo", "Gloo", "Timed out", "Application timeout caused pair closure")
        if not isinstance(error, dist.DistError) and not any(word in text for word in words):
            raise
        reason = text.strip().splitlines()[0]
        raise PeerLost(
            f"process {rank} has lost another process of the run, which has failed or hangs; its own message says more. "
            f"The same command goes on from the last checkpoint ({reason})"
        ) from error


@contextlib.contextmanager
def process_group(
    device: torch.device | str = "cpu",
    *,
    timeout_s: float = 600.0,
    always: bool = False,
    init_method: str = "env://",
) -> Iterator[World]:
    """Join the other processes of a run, and leave them in good order; a World of one if nobody launched several.

    torchrun, deepspeed and Slurm's srun with torchrun tell a process who it is by RANK, WORLD_SIZE, LOCAL_RANK,
    MASTER_ADDR and MASTER_PORT: that is their protocol, and the only place in the package that reads the environment.

    Args:
        device: GPUs talk through NCCL, everything else through gloo.
        timeout_s: how long a collective waits for the others before it gives up; while they connect, up to five times as long.
        always: make a group of one too, which FSDP2 and DeepSpeed need.
        init_method: where the processes find each other, in place of MASTER_ADDR and MASTER_PORT.

    Raises:
        PeerLost: from within: another process has ended or did not answer in time.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    if world_size == 1 and not always:
        yield World()
        return
    import torch.distributed as dist

    options: dict[str, Any] = {"init_method": init_method}
    if world_size == 1 and init_method == "env://" and "MASTER_ADDR" not in os.environ:
        options = {"store": dist.HashStore()}
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if torch.device(device).type == "cuda" else "gloo"
    with _lost_peers(rank):
        timeout = datetime.timedelta(seconds=timeout_s)
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout, **options)
        try:
            patient: Any = dist.new_group(backend="gloo", timeout=timeout)
            # Only now: a process that dies while the group is made would let the others wait for days.
            dist.distributed_c10d._set_pg_timeout(datetime.timedelta(days=7), patient)
            yield World(rank=rank, world_size=world_size, local_rank=local_rank, patient=patient)
            dist.barrier()  # a process that leaves early would look like one that died
        finally:
            dist.destroy_process_group()


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


def tune_allocator() -> bool:
    """Let glibc keep freed memory instead of giving it back to the kernel. Returns whether it could.

    A training step frees and takes the same large tensors again and again. By default glibc maps and unmaps each of
    them, and the kernel zeroes every page anew: about a tenth of an eager CPU step. Call it before training.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has no mallopt
        return False
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX in malloc.h
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1) and mallopt(top_pad, 64 << 20))


def mkl_idles() -> bool:
    """Whether MKL, which multiplies float32 matrices for torch, leaves half of this processor idle where oneDNN does not.

    MKL takes 256-bit instructions on AMD processors, also on those that have 512 bits; oneDNN, which torch has for 16-bit
    products, takes what there is. Measured on one core of an EPYC: 107 and 240 GFLOP/s.
    """
    name = _cpu_name()
    amd = name.startswith("AMD ") or "AuthenticAMD" in name
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return amd and wide and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


_kernels: list[torch.library.Library] = []  # an override lasts as long as the library that made it


def tune_matmul(*, force: bool = False) -> bool:
    """Let oneDNN multiply float32 matrices where MKL leaves half of the processor idle (`mkl_idles`). Returns whether it does.

    This replaces the CPU kernels of `mm` and `addmm` for the whole process, so that every linear layer and its gradient
    profit. Both libraries sum in float32. Call it before training, or before reading long prompts.

    Args:
        force: also on other processors.
    """
    if _kernels:
        return True
    able = torch.backends.mkldnn.is_available() and hasattr(torch.library, "get_kernel")  # torch >= 2.10
    if not able or not (force or mkl_idles()):
        return False
    product = torch.ops.mkldnn._linear_pointwise.default

    def fits(a: torch.Tensor, b: torch.Tensor, other: torch.Tensor | None = None) -> bool:
        # Less than eight rows are a matter of reading the weights, which MKL does as fast.
        if len(a) < 8 or a.shape[-1] != b.shape[0] or not (a.numel() and b.numel()):
            return False
        return a.dtype == b.dtype == torch.float32 and (other is None or other.dtype == torch.float32)

    def dense(b: torch.Tensor) -> torch.Tensor:
        # For a matrix with gaps between its rows oneDNN has nothing but plain loops: a thousand times as slow as a copy.
        return b.t() if b.is_contiguous() or b.t().is_contiguous() else b.t().contiguous()

    def mm(keys: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if fits(a, b):
            return product(a, dense(b), None, "none", [], "")
        return mkl["mm"].call_boxed(keys, a, b)

    def mm_out(keys: Any, a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        if fits(a, b, out) and out.shape == (a.shape[0], b.shape[1]):
            return out.copy_(product(a, dense(b), None, "none", [], ""))
        return mkl["mm.out"].call_boxed(keys, a, b, out=out)

    def addmm(
        keys: Any, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta=1, alpha=1
    ) -> torch.Tensor:
        if beta == alpha == 1 and bias.shape == b.shape[1:] and fits(a, b, bias):
            return product(a, dense(b), bias, "none", [], "")
        return mkl["addmm"].call_boxed(keys, bias, a, b, beta=beta, alpha=alpha)

    mkl = {name: torch.library.get_kernel(f"aten::{name}", "CPU") for name in ("mm", "mm.out", "addmm")}
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a kernel is overridden: so it is
        for name, kernel in (("mm", mm), ("mm.out", mm_out), ("addmm", addmm)):
            library.impl(name, kernel, "CPU", with_keyset=True, allow_override=True)
    _kernels.append(library)
    return True


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


_held: dict[Path, int] = {}  # folders that this process has locked, and the thread that did


@contextlib.contextmanager
def run_lock(folder: str | Path) -> Iterator[None]:
    """Hold a run folder for this process; released when the process ends, however it ends.

    The thread that holds it may take it again. A child process does not inherit it, so that a worker which outlives a
    killed run does not keep the next one out.

    Raises:
        RunLocked: another process or thread holds it.
        OSError: the folder cannot be written.
    """
    path = Path(folder).resolve() / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    thread = threading.get_ident()
    if _held.get(path) == thread:
        yield
        return
    if path in _held:  # opening the file again, and closing it, would release it
        raise RunLocked(f"{folder}: another thread of this process writes here; choose another folder")
    with open(path, "a+", encoding="utf-8") as file:
        try:
            import fcntl
        except ImportError:  # Windows has no such lock: two runs in one folder are then the user's care
            yield
            return
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise RunLocked(
                f"{folder}: another run ({file.read().strip() or 'unknown'}) writes here; wait for it or choose another --name"
            ) from None
        except OSError as error:  # some network file systems have no locks
            log.warning(
                "%s: this file system has no locks (%s); make sure that no other run writes here",
                folder,
                error,
            )
        _held[path] = thread
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
            file.flush()
            yield
        finally:
            del _held[path]


class NoSpace(MiniLLMError):
    """A run would fill the disk."""


def need_disk(folder: str | Path, n_bytes: int, purpose: str) -> None:
    """Make sure that a folder's disk has room for so much more, before the work that will write it.

    Args:
        folder: where it will be written; need not be there yet.
        n_bytes: how much will be added to what is there.
        purpose: of what, for the message: "3 checkpoints of 1.5 GB".

    Raises:
        NoSpace: it does not fit.
    """
    there = Path(folder).resolve()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if n_bytes > free:
        raise NoSpace(
            f"{folder}: {purpose} need {n_bytes / 1e9:.2f} GB more and {free / 1e9:.2f} GB are free: make room, keep fewer "
            "checkpoints (--train.keep), or write elsewhere (--runs)"
        )


def folder_bytes(folder: str | Path) -> int:
    """The size of all files in a folder."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def steady_bar(**options: Any) -> tqdm:
    """A progress bar that goes by a clock that nobody sets: a computer's date may jump in a long run, and back."""
    bar = tqdm(**options)
    vars(bar)["_time"] = time.monotonic  # tqdm takes time.time, and offers no choice
    bar.start_t = bar.last_print_t = time.monotonic()
    return bar
