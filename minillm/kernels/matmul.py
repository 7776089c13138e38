"""Matrix products and memory on CPUs: which library multiplies, and who allocates."""

from __future__ import annotations

import ctypes
import sys
import warnings
from typing import Any

import torch

from minillm.base.machine import mkl_idles


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
