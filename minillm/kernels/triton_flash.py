"""FlashAttention as Triton kernels, forward and backward."""

import inspect
import math
from collections.abc import Callable
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from minillm.base.errors import MiniLLMError

LOG2E = math.log2(math.e)  # exp(x) = 2^(x log2 e), and 2^x is what the hardware computes

tl: Any = None  # triton.language, which `kernels` puts in place: this module imports without Triton

KERNELS: dict[str, Callable] = {}


class constexpr(int):
    """Marks an argument that is fixed when a kernel is compiled; Triton knows it by this name."""


def kernel(function: Callable) -> Callable:
    """Mark a Triton function. It is compiled when it is first launched, not when this module is imported."""
    KERNELS[function.__name__] = inspect.unwrap(function)
    return function


@kernel
def load_rows(base, index, stride, d, limit, DH: constexpr):
    """A tile of vectors, zero beyond the last one and beyond the head's width."""
    return tl.load(base + index * stride + d, mask=(index < limit) & (d < DH), other=0.0)


@kernel
def store_rows(base, index, stride, d, limit, value, DH: constexpr):
    """Write a tile of vectors, rounded to the tensor's dtype."""
    tl.store(base + index * stride + d, value.to(base.dtype.element_ty), mask=(index < limit) & (d < DH))


@kernel
def add_product(total, x, y, WIDE: constexpr):
    """total + x y, summed in float32. WIDE: widen first, for the interpreter, whose bfloat16 products are wrong."""
    if WIDE:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, total, input_precision="ieee")


@kernel
def tile_sees(rows, columns, b, n_keys, prefix, documents, keys, CAUSAL: constexpr):
    """`visible` for one tile; rows and columns are column numbers, shaped to broadcast against each other."""
    seen = (columns < n_keys) & (rows < n_keys)
    if CAUSAL:
        below = columns <= rows
        if prefix is not None:
            below = below | (columns < tl.load(prefix + b))
        seen = seen & below
    if documents is not None:
        mine = tl.load(documents + b * n_keys + rows, mask=rows < n_keys, other=0)
        theirs = tl.load(documents + b * n_keys + columns, mask=columns < n_keys, other=0)
        seen = seen & (mine == theirs)
    if keys is not None:
        real = tl.load(keys + b * n_keys + columns, mask=columns < n_keys, other=0) != 0
        seen = (seen & real) | (columns == rows)
    return seen


@kernel
def tile_scores(
    x, y, zero, rows, columns, b, h, n_keys, slopes, prefix, documents, keys,
    CAUSAL: constexpr, MASKED: constexpr, WIDE: constexpr,
):  # fmt: skip
    """Unscaled scores of one tile, with ALiBi's penalty (in the same unit) and NEVER where a key is not seen."""
    scores = add_product(zero, x, y, WIDE)
    if slopes is not None:
        scores -= tl.load(slopes + h) * tl.abs(rows - columns).to(tl.float32)
    if MASKED:
        scores = tl.where(tile_sees(rows, columns, b, n_keys, prefix, documents, keys, CAUSAL), scores, -1e30)
    return scores


@kernel
def columns_for_rows(
    row, b, n_keys, prefix, first, last, keys, CAUSAL: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr
):
    """(start, full, stop): rows row … row + BLOCK_M see columns from start to stop, and all of those before full."""
    start, full, stop = 0, n_keys, n_keys
    if CAUSAL:
        full, stop = row + 1, tl.minimum(row + BLOCK_M, n_keys)
        if prefix is not None:
            read = tl.minimum(tl.load(prefix + b).to(tl.int32), n_keys)
            full, stop = tl.maximum(full, read), tl.maximum(stop, read)
    if first is not None:
        rows = b * n_keys + tl.minimum(row + tl.arange(0, BLOCK_M), n_keys - 1)
        start = tl.min(tl.load(first + rows), 0)
        stop = tl.minimum(stop, tl.max(tl.load(last + rows), 0) + 1)
    start = start // BLOCK_N * BLOCK_N
    if (first is not None) or (keys is not None):
        full = start
    return start, tl.maximum(full // BLOCK_N * BLOCK_N, start), stop


def document_edges(documents: Int[Tensor, "B S"]) -> tuple[Int[Tensor, "B S"], Int[Tensor, "B S"]]:
    """The first and the last column that has the same document as this one, as int32."""

    def first(ids: Tensor) -> Tensor:
        ordered, order = ids.sort(dim=1, stable=True)  # stable: a document's columns stay in order
        place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        starts = torch.ones_like(ids, dtype=torch.bool)
        starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        begin = torch.where(starts, place, 0).cummax(1).values
        return torch.empty_like(order).scatter_(1, order, order.gather(1, begin))

    last = documents.shape[1] - 1 - first(documents.flip(1)).flip(1)
    return first(documents).int(), last.int()


@kernel
def forward_columns(
    acc, total, top, q_tile, k, v, k_stride, v_stride, rows, b, h, start, stop, n_keys, slopes, prefix, documents, keys,
    scale, MASKED: constexpr, CAUSAL: constexpr, DH: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr,
    BLOCK_D: constexpr, WIDE: constexpr,
):  # fmt: skip
    """The online softmax over columns start to stop."""
    d = tl.arange(0, BLOCK_D)
    for at in range(start, stop, BLOCK_N):
        columns = at + tl.arange(0, BLOCK_N)
        k_tile = load_rows(k, columns[None, :], k_stride, d[:, None], n_keys, DH)
        zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        scores = tile_scores(
            q_tile, k_tile, zero, rows[:, None], columns[None, :], b, h, n_keys, slopes, prefix, documents, keys,
            CAUSAL, MASKED, WIDE,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        v_tile = load_rows(v, columns[:, None], v_stride, d[None, :], n_keys, DH)
        acc = add_product(acc * shrink[:, None], p.to(v_tile.dtype), v_tile, WIDE)
        top = higher
    return acc, total, top


@kernel
def forward_kernel(
    q, k, v, out, lse, slopes, prefix, documents, first, last, keys, q_strides, k_strides, v_strides, out_strides,
    n_heads, group, n_queries, n_keys, scale, bucket, CAUSAL: constexpr, DH: constexpr, BLOCK_D: constexpr,
    WIDE: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head. Writes the output and each query's log2 of the sum of 2^scores."""
    tile = (
        tl.num_programs(0) - 1 - tl.program_id(0)
    )  # the longest rows first, so that no long one is left at the end
    b, h = (tl.program_id(1) // n_heads).to(tl.int64), (tl.program_id(1) % n_heads).to(tl.int64)
    t, d = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    row = n_keys - n_queries + tile * BLOCK_M
    q += b * q_strides[0] + h * q_strides[1]
    k += b * k_strides[0] + (h // group) * k_strides[1]
    v += b * v_strides[0] + (h // group) * v_strides[1]
    q_tile = load_rows(q, t[:, None], q_strides[2], d[None, :], n_queries, DH)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total, top = tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), -1e30, tl.float32)
    start, full, stop = columns_for_rows(row, b, n_keys, prefix, first, last, keys, CAUSAL, BLOCK_M, BLOCK_N)
    rows = row + tl.arange(0, BLOCK_M)
    acc, total, top = forward_columns(
        acc, total, top, q_tile, k, v, k_strides[2], v_strides[2], rows, b, h, start, full, n_keys, slopes, prefix,
        documents, keys, scale, False, CAUSAL, DH, BLOCK_M, BLOCK_N, BLOCK_D, WIDE,
    )  # fmt: skip
    acc, total, top = forward_columns(
        acc, total, top, q_tile, k, v, k_strides[2], v_strides[2], rows, b, h, full, stop, n_keys, slopes, prefix,
        documents, keys, scale, True, CAUSAL, DH, BLOCK_M, BLOCK_N, BLOCK_D, WIDE,
    )  # fmt: skip
    out += b * out_strides[0] + h * out_strides[1]
    store_rows(out, t[:, None], out_strides[2], d[None, :], n_queries, acc / total[:, None], DH)
    tl.store(lse + tl.program_id(1).to(tl.int64) * n_queries + t, top + tl.log2(total), mask=t < n_queries)


@kernel
def delta_kernel(
    out, grad, delta, out_strides, grad_strides, n_heads, n_queries, DH: constexpr, BLOCK_D: constexpr,
    BLOCK_M: constexpr,
):  # fmt: skip
    """Each query's output times its gradient: what the softmax's gradient subtracts."""
    b, h = (tl.program_id(1) // n_heads).to(tl.int64), (tl.program_id(1) % n_heads).to(tl.int64)
    t, d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    out += b * out_strides[0] + h * out_strides[1]
    grad += b * grad_strides[0] + h * grad_strides[1]
    o_tile = load_rows(out, t[:, None], out_strides[2], d[None, :], n_queries, DH).to(tl.float32)
    g_tile = load_rows(grad, t[:, None], grad_strides[2], d[None, :], n_queries, DH).to(tl.float32)
    sums = tl.sum(o_tile * g_tile, 1)
    tl.store(delta + tl.program_id(1).to(tl.int64) * n_queries + t, sums, mask=t < n_queries)


@kernel
def query_columns(
    dq, q_tile, g_tile, lse, delta, k, v, k_stride, v_stride, rows, b, h, start, stop, n_keys, slopes, prefix, documents,
    keys, scale, MASKED: constexpr, CAUSAL: constexpr, DH: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr,
    BLOCK_D: constexpr, WIDE: constexpr,
):  # fmt: skip
    """Add to the queries' gradient what columns start to stop contribute."""
    d = tl.arange(0, BLOCK_D)
    for at in range(start, stop, BLOCK_N):
        columns = at + tl.arange(0, BLOCK_N)
        k_tile = load_rows(k, columns[None, :], k_stride, d[:, None], n_keys, DH)
        v_tile = load_rows(v, columns[None, :], v_stride, d[:, None], n_keys, DH)
        zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        scores = tile_scores(
            q_tile, k_tile, zero, rows[:, None], columns[None, :], b, h, n_keys, slopes, prefix, documents, keys,
            CAUSAL, MASKED, WIDE,
        )  # fmt: skip
        p = tl.exp2(scores * scale - lse[:, None])
        dp = add_product(zero, g_tile, v_tile, WIDE)
        ds = (p * (dp - delta[:, None])).to(k_tile.dtype)
        dq = add_product(dq, ds, tl.trans(k_tile), WIDE)
    return dq


@kernel
def query_kernel(
    q, k, v, grad, lse, delta, dq, slopes, prefix, documents, first, last, keys, q_strides, k_strides, v_strides,
    grad_strides, dq_strides, n_heads, group, n_queries, n_keys, scale, bucket, CAUSAL: constexpr, DH: constexpr,
    BLOCK_D: constexpr, WIDE: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr,
):  # fmt: skip
    """One program: the gradient of BLOCK_M queries of one head."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b, h = (tl.program_id(1) // n_heads).to(tl.int64), (tl.program_id(1) % n_heads).to(tl.int64)
    t, d = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    row = n_keys - n_queries + tile * BLOCK_M
    q += b * q_strides[0] + h * q_strides[1]
    k += b * k_strides[0] + (h // group) * k_strides[1]
    v += b * v_strides[0] + (h // group) * v_strides[1]
    grad += b * grad_strides[0] + h * grad_strides[1]
    dq += b * dq_strides[0] + h * dq_strides[1]
    q_tile = load_rows(q, t[:, None], q_strides[2], d[None, :], n_queries, DH)
    g_tile = load_rows(grad, t[:, None], grad_strides[2], d[None, :], n_queries, DH)
    place = tl.program_id(1).to(tl.int64) * n_queries + t
    row_lse = tl.load(lse + place, mask=t < n_queries, other=float("inf"))
    row_delta = tl.load(delta + place, mask=t < n_queries, other=0.0)
    start, full, stop = columns_for_rows(row, b, n_keys, prefix, first, last, keys, CAUSAL, BLOCK_M, BLOCK_N)
    rows, total = row + tl.arange(0, BLOCK_M), tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = query_columns(
        total, q_tile, g_tile, row_lse, row_delta, k, v, k_strides[2], v_strides[2], rows, b, h, start, full, n_keys,
        slopes, prefix, documents, keys, scale, False, CAUSAL, DH, BLOCK_M, BLOCK_N, BLOCK_D, WIDE,
    )  # fmt: skip
    total = query_columns(
        total, q_tile, g_tile, row_lse, row_delta, k, v, k_strides[2], v_strides[2], rows, b, h, full, stop, n_keys,
        slopes, prefix, documents, keys, scale, True, CAUSAL, DH, BLOCK_M, BLOCK_N, BLOCK_D, WIDE,
    )  # fmt: skip
    # ln 2 takes back the log2(e) in scale: what is left is 1 / sqrt(Dh)
    store_rows(dq, t[:, None], dq_strides[2], d[None, :], n_queries, total * (scale * 0.6931471805599453), DH)


@kernel
def rows_for_columns(
    column, b, n_queries, n_keys, prefix, first, last, keys, CAUSAL: constexpr, BLOCK_M: constexpr,
    BLOCK_N: constexpr,
):  # fmt: skip
    """(start, full, stop), counted in queries: from start on they see some of the columns, from full on all of them."""
    past = n_keys - n_queries
    start, full, stop = past, past, n_keys
    if CAUSAL:
        start, full = tl.maximum(column, past), tl.maximum(column + BLOCK_N - 1, past)
        if prefix is not None:
            read = tl.load(prefix + b).to(tl.int32)
            start = tl.where(read > column, past, start)
            full = tl.where(read >= tl.minimum(column + BLOCK_N, n_keys), past, full)
    if first is not None:
        columns = b * n_keys + tl.minimum(column + tl.arange(0, BLOCK_N), n_keys - 1)
        start = tl.maximum(start, tl.min(tl.load(first + columns), 0))
        stop = tl.minimum(stop, tl.max(tl.load(last + columns), 0) + 1)
    start, full, stop = (
        (start - past) // BLOCK_M * BLOCK_M,
        tl.cdiv(full - past, BLOCK_M) * BLOCK_M,
        stop - past,
    )
    if (first is not None) or (keys is not None):
        full = stop
    return start, tl.maximum(tl.minimum(full, stop), start), stop


@kernel
def key_rows(
    dk, dv, k_tile, v_tile, q, grad, lse, delta, q_stride, grad_stride, columns, b, h, start, stop, n_queries, n_keys,
    slopes, prefix, documents, keys, scale, MASKED: constexpr, CAUSAL: constexpr, DH: constexpr,
    BLOCK_M: constexpr, BLOCK_N: constexpr, BLOCK_D: constexpr, WIDE: constexpr,
):  # fmt: skip
    """Add to the keys' and values' gradients what queries start to stop contribute. Tiles stand transposed."""
    d = tl.arange(0, BLOCK_D)
    for at in range(start, stop, BLOCK_M):
        t = at + tl.arange(0, BLOCK_M)
        q_tile = load_rows(q, t[None, :], q_stride, d[:, None], n_queries, DH)
        g_tile = load_rows(grad, t[:, None], grad_stride, d[None, :], n_queries, DH)
        row_lse = tl.load(lse + t, mask=t < n_queries, other=float("inf"))
        row_delta = tl.load(delta + t, mask=t < n_queries, other=0.0)
        rows, zero = n_keys - n_queries + t, tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        scores = tile_scores(
            k_tile, q_tile, zero, rows[None, :], columns[:, None], b, h, n_keys, slopes, prefix, documents, keys,
            CAUSAL, MASKED, WIDE,
        )  # fmt: skip
        p = tl.exp2(scores * scale - row_lse[None, :])
        dv = add_product(dv, p.to(g_tile.dtype), g_tile, WIDE)
        dp = add_product(zero, v_tile, tl.trans(g_tile), WIDE)
        ds = (p * (dp - row_delta[None, :])).to(q_tile.dtype)
        dk = add_product(dk, ds, tl.trans(q_tile), WIDE)
    return dk, dv


@kernel
def key_kernel(
    q, k, v, grad, lse, delta, dk, dv, slopes, prefix, documents, first, last, keys, q_strides, k_strides, v_strides,
    grad_strides, dk_strides, dv_strides, n_heads, group, n_queries, n_keys, scale, bucket, CAUSAL: constexpr,
    DH: constexpr, BLOCK_D: constexpr, WIDE: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr,
):  # fmt: skip
    """One program: the gradients of BLOCK_N keys and values of one kv head, summed over the query heads it serves."""
    n_kv_heads, column = n_heads // group, tl.program_id(0) * BLOCK_N
    b, g = (tl.program_id(1) // n_kv_heads).to(tl.int64), (tl.program_id(1) % n_kv_heads).to(tl.int64)
    columns, d = column + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    k += b * k_strides[0] + g * k_strides[1]
    v += b * v_strides[0] + g * v_strides[1]
    k_tile = load_rows(k, columns[:, None], k_strides[2], d[None, :], n_keys, DH)
    v_tile = load_rows(v, columns[:, None], v_strides[2], d[None, :], n_keys, DH)
    dk_tile, dv_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    start, full, stop = rows_for_columns(
        column, b, n_queries, n_keys, prefix, first, last, keys, CAUSAL, BLOCK_M, BLOCK_N
    )
    for h in range(g * group, g * group + group):
        q_head, g_head = (
            q + b * q_strides[0] + h * q_strides[1],
            grad + b * grad_strides[0] + h * grad_strides[1],
        )
        place = (b * n_heads + h) * n_queries
        dk_tile, dv_tile = key_rows(
            dk_tile, dv_tile, k_tile, v_tile, q_head, g_head, lse + place, delta + place, q_strides[2], grad_strides[2],
            columns, b, h, start, full, n_queries, n_keys, slopes, prefix, documents, keys, scale, True, CAUSAL, DH,
            BLOCK_M, BLOCK_N, BLOCK_D, WIDE,
        )  # fmt: skip
        dk_tile, dv_tile = key_rows(
            dk_tile, dv_tile, k_tile, v_tile, q_head, g_head, lse + place, delta + place, q_strides[2], grad_strides[2],
            columns, b, h, full, stop, n_queries, n_keys, slopes, prefix, documents, keys, scale, False, CAUSAL, DH,
            BLOCK_M, BLOCK_N, BLOCK_D, WIDE,
        )  # fmt: skip
    dk += b * dk_strides[0] + g * dk_strides[1]
    dv += b * dv_strides[0] + g * dv_strides[1]
    # ln 2 takes back the log2(e) in scale: what is left is 1 / sqrt(Dh)
    store_rows(
        dk, columns[:, None], dk_strides[2], d[None, :], n_keys, dk_tile * (scale * 0.6931471805599453), DH
    )
    store_rows(dv, columns[:, None], dv_strides[2], d[None, :], n_keys, dv_tile, DH)


TILES = {  # kernel: (queries, keys, warps, pipeline stages) of a tile; the fastest is found on the GPU, at first use
    "forward_kernel": [
        (128, 128, 8, 3),
        (128, 64, 8, 3),
        (128, 64, 4, 3),
        (128, 64, 4, 4),
        (64, 64, 4, 3),
        (64, 32, 4, 2),
    ],
    "query_kernel": [(128, 64, 8, 3), (128, 64, 8, 2), (64, 128, 8, 2), (64, 64, 4, 3), (64, 32, 4, 2)],
    "key_kernel": [
        (64, 128, 8, 3),
        (64, 128, 8, 2),
        (32, 128, 8, 3),
        (32, 128, 8, 2),
        (64, 64, 8, 2),
        (32, 64, 4, 2),
    ],
}


@cache
def kernels(interpreted: bool = False) -> SimpleNamespace:
    """The Triton kernels, compiled for a GPU, or run by Triton's interpreter on any machine.

    Args:
        interpreted: the kernels run as Python, with fixed small tiles. Needs TRITON_INTERPRET=1 in the environment
            before anything imports Triton.

    Raises:
        MiniLLMError: Triton is not installed.
        ValueError: interpreted, but Triton was imported without TRITON_INTERPRET=1.
    """
    try:
        import triton
        from triton import knobs, language
    except ImportError as error:
        raise MiniLLMError(
            "Triton is not installed: it comes with PyTorch for CUDA; else pip install triton"
        ) from error
    if interpreted != knobs.runtime.interpret:
        raise ValueError(
            "on a CPU the kernels need TRITON_INTERPRET=1, on a GPU 0, set before Triton is imported"
        )
    scope = globals() | {"tl": language, "constexpr": language.constexpr}
    for (
        name,
        function,
    ) in KERNELS.items():  # the same code, over a scope in which `tl` and the helpers are Triton's
        copied = FunctionType(function.__code__, scope, name, function.__defaults__, function.__closure__)
        copied.__annotations__, copied.__module__ = function.__annotations__, function.__module__
        scope[name] = triton.jit(copied)
        if name in TILES and not interpreted:
            configs = [
                triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)
                for m, n, warps, stages in TILES[name]
            ]
            scope[name] = triton.autotune(configs, key=["bucket", "CAUSAL", "DH"])(scope[name])
    return SimpleNamespace(**{name: scope[name] for name in (*TILES, "delta_kernel")})


def launch(name: str, n_tokens: int, n_programs: int, arguments: tuple, q: Tensor, causal: bool) -> None:
    """Start one of the three big kernels: a program for each tile of n_tokens, n_programs times."""
    interpreted = q.device.type == "cpu"
    width = max(16, 1 << (q.shape[-1] - 1).bit_length())  # a tile's sides are powers of two, at least 16
    given = {"CAUSAL": causal, "DH": q.shape[-1], "BLOCK_D": width, "WIDE": interpreted}
    side = "BLOCK_N" if name == "key_kernel" else "BLOCK_M"
    if interpreted:
        given |= {"BLOCK_M": 16, "BLOCK_N": 32}

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return -(-n_tokens // meta[side]), n_programs

    getattr(kernels(interpreted), name)[grid](*arguments, **given)


@torch.library.custom_op("minillm::flash_forward", mutates_args=())
def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, prefix: Tensor | None, documents: Tensor | None,
    first: Tensor | None, last: Tensor | None, keys: Tensor | None, slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) by the Triton kernel, as an operator that torch.compile takes as it is. See `attend_triton`."""
    out, lse = _forward_shapes(q, k, v, causal, prefix, documents, first, last, keys, slopes)
    B, H, T, Dh = q.shape
    scale, bucket = LOG2E / math.sqrt(Dh), 1 << (T - 1).bit_length()
    strides = [x.stride()[:3] for x in (q, k, v, out)]
    arguments = (q, k, v, out, lse, slopes, prefix, documents, first, last, keys, *strides)
    sizes = (H, H // k.shape[1], T, k.shape[2], scale, bucket)
    launch("forward_kernel", T, B * H, (*arguments, *sizes), q, causal)
    return out, lse


def _forward_shapes(q, k, v, causal, prefix, documents, first, last, keys, slopes):
    B, H, T, Dh = q.shape
    out = q.new_empty(B, T, H, Dh).transpose(
        1, 2
    )  # heads side by side in memory: the output projection reads it so
    return out, q.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("minillm::flash_backward", mutates_args=())
def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, prefix: Tensor | None,
    documents: Tensor | None, first: Tensor | None, last: Tensor | None, keys: Tensor | None, slopes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) by three kernels: delta, then the keys' side, then the queries' side. No atomic additions."""
    B, H, T, Dh = q.shape
    K, S = k.shape[1:3]
    dq, dk, dv = _backward_shapes(grad, q, k, v)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    delta, width = torch.empty_like(lse), max(16, 1 << (Dh - 1).bit_length())
    kernels(q.device.type == "cpu").delta_kernel[(-(-T // 64), B * H)](
        out, grad, delta, out.stride()[:3], grad.stride()[:3], H, T, DH=Dh, BLOCK_D=width, BLOCK_M=64
    )
    scale, bucket = LOG2E / math.sqrt(Dh), 1 << (T - 1).bit_length()
    shared, sizes = (slopes, prefix, documents, first, last, keys), (H, H // K, T, S, scale, bucket)
    strides = [x.stride()[:3] for x in (q, k, v, grad)]
    arguments = (
        q,
        k,
        v,
        grad,
        lse,
        delta,
        dk,
        dv,
        *shared,
        *strides,
        dk.stride()[:3],
        dv.stride()[:3],
        *sizes,
    )
    launch("key_kernel", S, B * K, arguments, q, causal)
    arguments = (q, k, v, grad, lse, delta, dq, *shared, *strides, dq.stride()[:3], *sizes)
    launch("query_kernel", T, B * H, arguments, q, causal)
    return dq, dk, dv


def _backward_shapes(grad, q, k, v, *rest):
    return tuple(
        x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v)
    )


def _keep_for_backward(ctx, inputs, output):
    q, k, v, ctx.causal, *described = inputs
    ctx.save_for_backward(q, k, v, *output, *described)
    ctx.set_materialize_grads(False)


def _flash_gradient(ctx, grad, grad_lse):
    q, k, v, out, lse, *described = ctx.saved_tensors
    grads = flash_backward(grad, q, k, v, out, lse, ctx.causal, *described)
    return *grads, *[None] * 7


flash_forward.register_fake(_forward_shapes)

flash_backward.register_fake(_backward_shapes)

flash_forward.register_autograd(_flash_gradient, setup_context=_keep_for_backward)
