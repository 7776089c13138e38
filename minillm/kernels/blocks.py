"""Attention by blocks of queries on a CPU, forward and backward."""

# A block of queries at a time, with some heads and rows of the batch, so few that their weights fit into the processor's
# cache; plain matrix products do the work, and under a causal mask the keys after the block are never touched. The scores
# stay exact: products of 16-bit queries and keys round only what comes in. Weights are at most 1, and what they go into are
# sums: those products take 16 bits in and out. For the gradient the weights are computed a second time.

import contextlib
import math
from collections.abc import Iterator
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from minillm.base.machine import fast_bfloat16


def by_token(x: Float[Tensor, "B H T Dh"], n_kv_heads: int) -> Float[Tensor, "B K T G Dh"]:
    """A view in which each token's heads that share a kv head, G = H / K, lie beside each other."""
    return x.unflatten(1, (n_kv_heads, -1)).transpose(2, 3)


def weights_by_block(
    q: Float[Tensor, "B H T Dh"],
    k: Float[Tensor, "B K S Dh"],
    v: Float[Tensor, "B K S Dh"],
    bias: Float[Tensor, "..."] | None,
    causal: bool,
) -> Iterator[
    tuple[
        tuple[slice, slice, slice],
        Float[Tensor, "N R Dh"],
        Float[Tensor, "N E Dh"],
        Float[Tensor, "N E Dh"],
        Float[Tensor, "N R E"],
    ]
]:
    """The softmax weights of some rows of the batch, some kv heads, and one block of queries at a time.

    Args:
        q, k, v: as in `attend` (chapter 11).
        bias: what is added to the scores, (1 or B, 1 or H, T, S).
        causal: no query sees a later column, whatever the bias says: those keys are left out.

    Yields:
        Where the block is in (B, K, T, H / K); and for each of its N pairs of row and kv head the R queries of the
        group's heads, the E keys they may see, divided by sqrt(Dh), their values, and the weights. Queries, keys
        and weights are in float32 at least.
    """
    (B, H, T, Dh), (K, S), wide = q.shape, k.shape[1:3], torch.promote_types(q.dtype, torch.float32)
    group = H // K
    # Measured: tall products for 16-bit units, but some blocks, so that causality saves work; 2 MiB of weights.
    size = 64 if q.dtype == wide else max(16, min(max(64, T // 4), 256 // group))
    fit = max(1, 2**19 // (group * size * S))
    n_rows, n_heads = max(1, fit // K), min(K, fit)
    future = torch.full((size, size), -math.inf, dtype=wide, device=q.device).triu_(1)[:, None]
    q = by_token(q, K)
    if bias is not None:
        bias = by_token(bias, K if bias.shape[1] > 1 else 1).expand(B, K, -1, -1, -1)
    for row, head in product(range(0, B, n_rows), range(0, K, n_heads)):
        rows, heads = slice(row, row + n_rows), slice(head, head + n_heads)
        keys, values = (x[rows, heads].contiguous().flatten(0, 1) for x in (k, v))
        keys = keys.to(wide) * Dh**-0.5
        for start in range(0, T, size):
            block = slice(start, min(start + size, T))
            n_queries, seen = block.stop - start, S - T + block.stop if causal else S
            at = rows, heads, block
            queries = q[at].contiguous().to(wide).view(len(keys), -1, Dh)
            scores = torch.bmm(queries, keys[:, :seen].transpose(1, 2))
            by_head = scores.view(*q[at].shape[:-1], seen)
            if bias is not None:
                by_head += bias[at][..., :seen]
            elif causal:
                by_head[..., seen - n_queries :] += future[:n_queries, :, :n_queries]
            yield at, queries, keys[:, :seen], values[:, :seen], scores.softmax(-1)


@contextlib.contextmanager
def products_in(dtype: torch.dtype) -> Iterator[None]:
    """Inside, float32 products on a CPU round their inputs to `dtype` where that is bfloat16 and the processor has units for it."""
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    if dtype == torch.bfloat16:
        setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def product_dtype(x: Tensor) -> torch.dtype:
    """In what weights are multiplied with values: bfloat16 where x is and the device is fast at it, else float32 at least."""
    fast = x.dtype == torch.bfloat16 and fast_bfloat16(x.device)
    return x.dtype if fast else torch.promote_types(x.dtype, torch.float32)


@torch.library.custom_op("minillm::blocks_forward", mutates_args=())
def blocks_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    """The output (B, H, T, Dh), block by block; arguments as in `weights_by_block`. For the gradient it keeps them, and no weights."""
    out, dtype = _blocks_output(q, k, v, bias, causal), product_dtype(q)
    answers = by_token(out, k.shape[1])
    with products_in(q.dtype):
        for at, _, _, values, p in weights_by_block(q, k, v, bias, causal):
            answers[at] = torch.bmm(p.to(dtype), values.to(dtype)).view(answers[at].shape)
    return out


def _blocks_output(q, k, v, bias, causal):
    B, H, T, Dh = q.shape
    return q.new_empty(B, T, H, Dh).transpose(1, 2)


@torch.library.custom_op("minillm::blocks_backward", mutates_args=())
def blocks_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) for the output's gradient (B, H, T, Dh), block by block; the other arguments as in `weights_by_block`."""
    K, dtype, wide = k.shape[1], product_dtype(q), torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = torch.empty_like(q), *(k.new_zeros(k.shape, dtype=wide) for _ in range(2))
    grad, dq_by_token = by_token(grad, K), by_token(dq, K)
    with products_in(q.dtype):
        for at, queries, keys, values, p in weights_by_block(q, k, v, bias, causal):
            seen = *at[:2], slice(keys.shape[1])
            do = grad[at].contiguous().to(dtype).view(queries.shape)
            dp = torch.bmm(do, values.to(dtype).transpose(1, 2)).to(wide)
            ds = torch._softmax_backward_data(dp, p, -1, wide).to(dtype)
            dq_by_token[at] = torch.bmm(ds, keys.to(dtype)).view(grad[at].shape)
            dk[seen] += torch.bmm(ds.transpose(1, 2), queries.to(dtype)).view(dk[seen].shape)
            dv[seen] += torch.bmm(p.to(dtype).transpose(1, 2), do).view(dv[seen].shape)
    return dq, dk.mul_(q.shape[3] ** -0.5).to(k.dtype), dv.to(v.dtype)


def _keep_for_backward(ctx, inputs, output):
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors)


def _blocks_gradient(ctx, grad):
    return *blocks_backward(grad, *ctx.saved_tensors, ctx.causal), None, None


blocks_forward.register_fake(_blocks_output)

blocks_backward.register_fake(
    lambda grad, q, k, v, *_: (torch.empty_like(q), k.new_empty(k.shape), v.new_empty(v.shape))
)

blocks_forward.register_autograd(_blocks_gradient, setup_context=_keep_for_backward)


def blocks_pay(device_type: str, dtype: torch.dtype, n_queries: int, n_keys: int) -> bool:
    """Whether blocks of queries are taken to be faster than torch's own kernel: on a CPU, at a middling length.

    In short rows calls cost more than products; long ones need tiles of keys too. The limits are measured.
    """
    least, most = (128, 1024) if dtype.itemsize > 2 else (64, 8192)
    return device_type == "cpu" and least <= n_queries and n_keys <= most
