"""Attention by other people's kernels, which know causal or not, heads that share keys, and ALiBi, but no other mask.

Each takes q (B, H, T, Dh), k and v (B, K, S, Dh), whose queries are the last T of the S columns, and slopes (H,).
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


def flash_attn(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, slopes: Tensor | None) -> Tensor:
    """By the flash-attn package; bfloat16 or float16 on a GPU."""
    from flash_attn import flash_attn_func

    slopes = None if slopes is None else slopes.to(q.device, torch.float32)
    q, k, v = (
        x.transpose(1, 2) for x in (q, k, v)
    )  # it wants (B, T, H, Dh), and puts the queries last as we do
    return flash_attn_func(q, k, v, causal=causal, alibi_slopes=slopes).transpose(1, 2)


@cache
def compiled_flex() -> Callable[..., Any]:
    """flex_attention, compiled: uncompiled, it forms the T x S matrix. The first call takes some ten seconds."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flex(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, slopes: Tensor | None) -> Tensor:
    """By torch's flex_attention, forward only. (On a CPU torch 2.13 has no backward.)

    Raises:
        ValueError: a gradient is wanted.
    """
    if torch.is_grad_enabled() and q.requires_grad:
        raise ValueError("flex is for plain masks without gradients: use attend_tiled")
    past = k.shape[2] - q.shape[2]
    slopes = q.new_zeros(q.shape[1]) if slopes is None else slopes.to(q.device, q.dtype)

    def change(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        score = score - slopes[h] * (i + past - j).abs()
        return torch.where(j <= i + past, score, float("-inf")) if causal else score

    return compiled_flex()(q, k, v, score_mod=change, enable_gqa=q.shape[1] > k.shape[1])
