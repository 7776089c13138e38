"""FlashAttention as Triton kernels, forward and backward; chapter 12 writes a small one by hand and says what `tl.` does."""

# Importing this module imports Triton, which decides then whether kernels are compiled for a GPU or interpreted:
# `operators.triton_kernels` imports it when a kernel is first asked for. A program is one run of a kernel: it owns a tile of
# queries (or of keys) of one head and walks over the tiles of the other side. Scores are in units of log2, since 2^x is what
# the hardware computes: log2(e) is folded into the scale, and taken back from the gradients.
# pyright: reportGeneralTypeIssues=false
# (Triton types a call of one kernel from another as one that never returns.)

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

INTERPRETED = knobs.runtime.interpret  # the kernels run as Python, on a CPU, with small tiles
TILES = {  # kernel: (queries, keys, warps, pipeline stages) of a tile; the fastest is found on the GPU, at first use
    "forward_kernel": [(128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 3), (128, 64, 4, 4), (64, 64, 4, 3), (64, 32, 4, 2)],
    "key_kernel": [(64, 128, 8, 3), (64, 128, 8, 2), (32, 128, 8, 3), (32, 128, 8, 2), (64, 64, 8, 2), (32, 64, 4, 2)],
    "query_kernel": [(128, 64, 8, 3), (128, 64, 8, 2), (64, 128, 8, 2), (64, 64, 4, 3), (64, 32, 4, 2)],
}  # fmt: skip


class Masks(NamedTuple):
    """Who sees whom, as the kernels read it: None where a rule is not in force."""

    prefix: Tensor | None  # (B,) columns below it are seen by every query
    documents: Tensor | None  # (B, S) a document's number
    first: Tensor | None  # (B, S) the first column of a column's document
    last: Tensor | None  # (B, S) and the last
    keys: Tensor | None  # (B, S) 0 where a column is padding
    slopes: Tensor | None  # (H,) ALiBi's penalty, in the unit of unscaled scores


class Sizes(NamedTuple):
    """How many there are of what."""

    heads: int
    group: int  # query heads that share a kv head
    queries: int
    keys: int


class Tensors(NamedTuple):
    """What the kernels read and write: (B, H or K, T or S, Dh), and (B, H, T) in float32 for lse and delta."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    grad: Any = None
    delta: Any = None
    dq: Any = None
    dk: Any = None
    dv: Any = None


def tuned(kernel: Any) -> Any:
    """Take the fastest of the kernel's TILES, measured once for each length, mask, head width and dtype (`case`)."""
    tiles = [(16, 32, 4, 2)] if INTERPRETED else TILES[kernel.__name__]
    configs = [
        triton.Config({"BLOCK_M": queries, "BLOCK_N": keys}, num_warps=warps, num_stages=stages)
        for queries, keys, warps, stages in tiles
    ]
    return triton.autotune(configs, key=["case", "CAUSAL", "DH"])(kernel)


@triton.jit
def head_of(x, strides, b, h):
    """Where the rows of a head begin."""
    return x + b * strides[0] + h * strides[1]


@triton.jit
def tile_of_queries(sizes, BLOCK_M: tl.constexpr):
    """(pair, b, h, t, row): the program's pair of batch row and head, its queries, and the first one's column number."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first: none is left at the end
    pair = tl.program_id(1).to(tl.int64)
    t = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    return pair, pair // sizes.heads, pair % sizes.heads, t, sizes.keys - sizes.queries + tile * BLOCK_M


@triton.jit
def load_rows(x, index, strides, d, limit, DH: tl.constexpr):
    """A tile of vectors, zero beyond the last one and beyond the head's width."""
    return tl.load(x + index * strides[2] + d, mask=(index < limit) & (d < DH), other=0.0)


@triton.jit
def store_rows(x, index, strides, d, limit, value, DH: tl.constexpr):
    """Write a tile of vectors, rounded to the tensor's dtype."""
    tl.store(x + index * strides[2] + d, value.to(x.dtype.element_ty), mask=(index < limit) & (d < DH))


@triton.jit
def product(x, y, WIDE: tl.constexpr, total=None):
    """x y, added to total, in float32. WIDE: widen first, for the interpreter, whose bfloat16 products are wrong."""
    if WIDE:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, total, input_precision="ieee")


@triton.jit
def tile_sees(rows, columns, b, masks, n_keys, CAUSAL: tl.constexpr):
    """`Mask.dense` for one tile; rows and columns are column numbers, shaped to broadcast against each other."""
    seen = (columns < n_keys) & (rows < n_keys)
    if CAUSAL:
        below = columns <= rows
        if masks.prefix is not None:
            below = below | (columns < tl.load(masks.prefix + b))
        seen = seen & below
    if masks.documents is not None:
        mine = tl.load(masks.documents + b * n_keys + rows, mask=rows < n_keys, other=0)
        theirs = tl.load(masks.documents + b * n_keys + columns, mask=columns < n_keys, other=0)
        seen = seen & (mine == theirs)
    if masks.keys is not None:
        real = tl.load(masks.keys + b * n_keys + columns, mask=columns < n_keys, other=0) != 0
        seen = (seen & real) | (columns == rows)
    return seen


@triton.jit
def tile_scores(
    x, y, rows, columns, b, h, masks, n_keys, CAUSAL: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr
):
    """Unscaled scores of one tile, with ALiBi's penalty (in the same unit) and -1e30 where a key is not seen."""
    scores = product(x, y, WIDE)
    if masks.slopes is not None:
        scores -= tl.load(masks.slopes + h) * tl.abs(rows - columns).to(tl.float32)
    if MASKED:
        scores = tl.where(tile_sees(rows, columns, b, masks, n_keys, CAUSAL), scores, -1e30)
    return scores


@triton.jit
def columns_for_rows(
    row, b, masks, n_keys, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """(start, full, stop): rows row … row + BLOCK_M see columns from start to stop, and all of those before full."""
    start, full, stop = 0, n_keys, n_keys
    if CAUSAL:
        full, stop = row + 1, tl.minimum(row + BLOCK_M, n_keys)
        if masks.prefix is not None:
            read = tl.minimum(tl.load(masks.prefix + b).to(tl.int32), n_keys)
            full, stop = tl.maximum(full, read), tl.maximum(stop, read)
    if masks.first is not None:
        rows = b * n_keys + tl.minimum(row + tl.arange(0, BLOCK_M), n_keys - 1)
        start = tl.min(tl.load(masks.first + rows), 0)
        stop = tl.minimum(stop, tl.max(tl.load(masks.last + rows), 0) + 1)
    start = start // BLOCK_N * BLOCK_N
    if (masks.first is not None) or (masks.keys is not None):
        full = start
    return start, tl.maximum(full // BLOCK_N * BLOCK_N, start), stop


@triton.jit
def rows_for_columns(
    column, b, masks, sizes, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """(start, full, stop), counted in queries: from start on they see some of the columns, from full on all of them."""
    past = sizes.keys - sizes.queries
    start, full, stop = past, past, sizes.keys
    if CAUSAL:
        start, full = tl.maximum(column, past), tl.maximum(column + BLOCK_N - 1, past)
        if masks.prefix is not None:
            read = tl.load(masks.prefix + b).to(tl.int32)
            start = tl.where(read > column, past, start)
            full = tl.where(read >= tl.minimum(column + BLOCK_N, sizes.keys), past, full)
    if masks.first is not None:
        columns = b * sizes.keys + tl.minimum(column + tl.arange(0, BLOCK_N), sizes.keys - 1)
        start = tl.maximum(start, tl.min(tl.load(masks.first + columns), 0))
        stop = tl.minimum(stop, tl.max(tl.load(masks.last + columns), 0) + 1)
    start, stop = (start - past) // BLOCK_M * BLOCK_M, stop - past
    full = tl.cdiv(full - past, BLOCK_M) * BLOCK_M
    if (masks.first is not None) or (masks.keys is not None):
        full = stop
    return start, tl.maximum(tl.minimum(full, stop), start), stop


@tuned
@triton.jit(do_not_specialize=["case"])
def forward_kernel(
    tensors, strides, masks, sizes, scale, case, CAUSAL: tl.constexpr, DH: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head. Writes the output and each query's log2 of the sum of 2^scores."""
    pair, b, h, t, row = tile_of_queries(sizes, BLOCK_M)
    rows, d = row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q, k = head_of(tensors.q, strides.q, b, h), head_of(tensors.k, strides.k, b, h // sizes.group)
    v, out = head_of(tensors.v, strides.v, b, h // sizes.group), head_of(tensors.out, strides.out, b, h)
    q_tile = load_rows(q, t[:, None], strides.q, d[None, :], sizes.queries, DH)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total, top = tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), -1e30, tl.float32)
    bounds = columns_for_rows(row, b, masks, sizes.keys, CAUSAL, BLOCK_M, BLOCK_N)
    for masked in tl.static_range(2):  # the columns that every row sees, then those that need a mask
        for at in range(bounds[masked], bounds[masked + 1], BLOCK_N):
            columns = at + tl.arange(0, BLOCK_N)
            k_tile = load_rows(k, columns[None, :], strides.k, d[:, None], sizes.keys, DH)
            scores = tile_scores(
                q_tile, k_tile, rows[:, None], columns[None, :], b, h, masks, sizes.keys, CAUSAL, masked == 1, WIDE
            )  # fmt: skip
            higher = tl.maximum(top, tl.max(scores, 1) * scale)
            p = tl.exp2(scores * scale - higher[:, None])
            shrink = tl.exp2(top - higher)
            total = total * shrink + tl.sum(p, 1)
            v_tile = load_rows(v, columns[:, None], strides.v, d[None, :], sizes.keys, DH)
            acc = product(p.to(v_tile.dtype), v_tile, WIDE, acc * shrink[:, None])
            top = higher
    store_rows(out, t[:, None], strides.out, d[None, :], sizes.queries, acc / total[:, None], DH)
    tl.store(tensors.lse + pair * sizes.queries + t, top + tl.log2(total), mask=t < sizes.queries)


@triton.jit
def delta_kernel(tensors, strides, sizes, DH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr):
    """Each query's output times its gradient: what the softmax's gradient subtracts."""
    pair, b, h, t, _ = tile_of_queries(sizes, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    out, grad = head_of(tensors.out, strides.out, b, h), head_of(tensors.grad, strides.grad, b, h)
    o_tile = load_rows(out, t[:, None], strides.out, d[None, :], sizes.queries, DH).to(tl.float32)
    g_tile = load_rows(grad, t[:, None], strides.grad, d[None, :], sizes.queries, DH).to(tl.float32)
    tl.store(tensors.delta + pair * sizes.queries + t, tl.sum(o_tile * g_tile, 1), mask=t < sizes.queries)


@tuned
@triton.jit(do_not_specialize=["case"])
def query_kernel(
    tensors, strides, masks, sizes, scale, case, CAUSAL: tl.constexpr, DH: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of BLOCK_M queries of one head."""
    pair, b, h, t, row = tile_of_queries(sizes, BLOCK_M)
    rows, d = row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q, k = head_of(tensors.q, strides.q, b, h), head_of(tensors.k, strides.k, b, h // sizes.group)
    v, grad = head_of(tensors.v, strides.v, b, h // sizes.group), head_of(tensors.grad, strides.grad, b, h)
    q_tile = load_rows(q, t[:, None], strides.q, d[None, :], sizes.queries, DH)
    g_tile = load_rows(grad, t[:, None], strides.grad, d[None, :], sizes.queries, DH)
    lse = tl.load(tensors.lse + pair * sizes.queries + t, mask=t < sizes.queries, other=float("inf"))
    delta = tl.load(tensors.delta + pair * sizes.queries + t, mask=t < sizes.queries, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    bounds = columns_for_rows(row, b, masks, sizes.keys, CAUSAL, BLOCK_M, BLOCK_N)
    for masked in tl.static_range(2):
        for at in range(bounds[masked], bounds[masked + 1], BLOCK_N):
            columns = at + tl.arange(0, BLOCK_N)
            k_tile = load_rows(k, columns[None, :], strides.k, d[:, None], sizes.keys, DH)
            v_tile = load_rows(v, columns[None, :], strides.v, d[:, None], sizes.keys, DH)
            scores = tile_scores(
                q_tile, k_tile, rows[:, None], columns[None, :], b, h, masks, sizes.keys, CAUSAL, masked == 1, WIDE
            )  # fmt: skip
            p = tl.exp2(scores * scale - lse[:, None])
            ds = (p * (product(g_tile, v_tile, WIDE) - delta[:, None])).to(k_tile.dtype)
            dq = product(ds, tl.trans(k_tile), WIDE, dq)
    # ln 2 takes back the log2(e) in scale: what is left is 1 / sqrt(Dh)
    dq *= scale * 0.6931471805599453
    out = head_of(tensors.dq, strides.dq, b, h)
    store_rows(out, t[:, None], strides.dq, d[None, :], sizes.queries, dq, DH)


@tuned
@triton.jit(do_not_specialize=["case"])
def key_kernel(
    tensors, strides, masks, sizes, scale, case, CAUSAL: tl.constexpr, DH: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of BLOCK_N keys and values of one kv head, summed over the query heads it serves."""
    n_kv_heads, column = sizes.heads // sizes.group, tl.program_id(0) * BLOCK_N
    b, g = (tl.program_id(1) // n_kv_heads).to(tl.int64), (tl.program_id(1) % n_kv_heads).to(tl.int64)
    columns, d = column + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    k, v = head_of(tensors.k, strides.k, b, g), head_of(tensors.v, strides.v, b, g)
    k_tile = load_rows(k, columns[:, None], strides.k, d[None, :], sizes.keys, DH)
    v_tile = load_rows(v, columns[:, None], strides.v, d[None, :], sizes.keys, DH)
    dk, dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    bounds = rows_for_columns(column, b, masks, sizes, CAUSAL, BLOCK_M, BLOCK_N)
    for h in range(g * sizes.group, g * sizes.group + sizes.group):
        q, grad = head_of(tensors.q, strides.q, b, h), head_of(tensors.grad, strides.grad, b, h)
        place = (b * sizes.heads + h) * sizes.queries
        for plain in tl.static_range(2):  # the queries that see some of the columns, then those that see all
            for at in range(bounds[plain], bounds[plain + 1], BLOCK_M):  # tiles stand transposed
                t = at + tl.arange(0, BLOCK_M)
                rows = sizes.keys - sizes.queries + t
                q_tile = load_rows(q, t[None, :], strides.q, d[:, None], sizes.queries, DH)
                g_tile = load_rows(grad, t[:, None], strides.grad, d[None, :], sizes.queries, DH)
                lse = tl.load(tensors.lse + place + t, mask=t < sizes.queries, other=float("inf"))
                delta = tl.load(tensors.delta + place + t, mask=t < sizes.queries, other=0.0)
                scores = tile_scores(
                    k_tile, q_tile, rows[None, :], columns[:, None], b, h, masks, sizes.keys, CAUSAL, plain == 0, WIDE
                )  # fmt: skip
                p = tl.exp2(scores * scale - lse[None, :])
                dv = product(p.to(g_tile.dtype), g_tile, WIDE, dv)
                dp = product(v_tile, tl.trans(g_tile), WIDE)
                ds = (p * (dp - delta[None, :])).to(q_tile.dtype)
                dk = product(ds, tl.trans(q_tile), WIDE, dk)
    dk *= scale * 0.6931471805599453  # ln 2, as in query_kernel
    dk_out = head_of(tensors.dk, strides.dk, b, g)
    store_rows(dk_out, columns[:, None], strides.dk, d[None, :], sizes.keys, dk, DH)
    dv_out = head_of(tensors.dv, strides.dv, b, g)
    store_rows(dv_out, columns[:, None], strides.dv, d[None, :], sizes.keys, dv, DH)


def launch(
    kernel: Any, side: str, n_tokens: int, n_programs: int, tensors: Tensors, masks: Masks, causal: bool
) -> None:
    """Start one of the three big kernels: a program for each tile of n_tokens (its size is `side`), n_programs times."""
    T, Dh = tensors.q.shape[2:]
    kinds = sum(2**i for i, rule in enumerate(masks) if rule is not None)
    alike = (T - 1).bit_length()  # lengths up to the same power of two share a tile
    case = (alike * 16 + tensors.q.element_size()) * 64 + kinds
    scale = math.log2(math.e) / math.sqrt(Dh)
    kernel[lambda tile: (triton.cdiv(n_tokens, tile[side]), n_programs)](
        tensors, strides_of(tensors), masks, sizes_of(tensors), scale, case, CAUSAL=causal, DH=Dh,
        BLOCK_D=padded(Dh), WIDE=INTERPRETED,
    )  # fmt: skip


def strides_of(tensors: Tensors) -> Tensors:
    """(batch, head, token) of each; the last dimension is dense."""
    return Tensors(*(None if x is None else x.stride()[:3] for x in tensors))  # type: ignore[arg-type]


def sizes_of(tensors: Tensors) -> Sizes:
    """How many heads and tokens there are."""
    (_, H, T, _), (K, S) = tensors.q.shape, tensors.k.shape[1:3]
    return Sizes(H, H // K, T, S)


def padded(head_dim: int) -> int:
    """The width of a tile: a power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def forward(tensors: Tensors, masks: Masks, causal: bool) -> None:
    """Write `out` and `lse`."""
    B, H, T, _ = tensors.q.shape
    launch(forward_kernel, "BLOCK_M", T, B * H, tensors, masks, causal)


def backward(tensors: Tensors, masks: Masks, causal: bool) -> None:
    """Write `delta`, then the keys' side, `dk` and `dv`, then the queries', `dq`: no two programs add to one place."""
    (B, H, T, Dh), (K, S) = tensors.q.shape, tensors.k.shape[1:3]
    fixed: Any = {"DH": Dh, "BLOCK_D": padded(Dh), "BLOCK_M": 64}
    delta_kernel[triton.cdiv(T, 64), B * H](tensors, strides_of(tensors), sizes_of(tensors), **fixed)
    launch(key_kernel, "BLOCK_N", S, B * K, tensors, masks, causal)
    launch(query_kernel, "BLOCK_M", T, B * H, tensors, masks, causal)
