"""Decoding as fast as the machine reads weights: packed, fused, one buffer for everything."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from minillm.attention import Attention, KVCache
from minillm.base.machine import fast_bfloat16, mkl_idles
from minillm.mlp import SwiGLU
from minillm.norm import RMSNorm
from minillm.position import ALiBi, Position, RoPE
from minillm.transformer import NormHead, Transformer, flat_layout


def pack_weight(weight: Float[Tensor, "E D"]) -> Tensor:
    """A copy of a weight in the order in which this processor multiplies fastest, for `packed_product` only."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())


def packed_product(
    x: Float[Tensor, "B D"], packed: Tensor, bias: Float[Tensor, "E"] | None = None
) -> Float[Tensor, "B E"]:
    """x Wᵀ + b, with W packed by `pack_weight`."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def packing_pays(weight: Float[Tensor, "E D"]) -> bool:
    """Whether packing pays: in bfloat16 with instructions for it, in float32 where MKL leaves half a processor idle."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return fast_bfloat16(weight.device)
    return weight.dtype == torch.float32 and mkl_idles()


class Projection:
    """x Wᵀ + b with W laid out as a CPU multiplies a thin x fastest, and a norm's scale folded in (chapter 17).

    Args:
        weights: (out, in) matrices with one input; their outputs stand side by side.
        biases: one per weight, or None.
        scale: multiplies the input channels.
        dtype: of the copy.
    """

    def __init__(
        self,
        weights: list[Tensor],
        biases: list[Tensor | None],
        scale: Float[Tensor, "D"] | None,
        dtype: torch.dtype,
    ):
        weight = torch.cat([w.detach() for w in weights]).to(dtype)
        weight = weight if scale is None else weight * scale
        self.packed = packing_pays(weight)
        self.weight = pack_weight(weight) if self.packed else weight.t().contiguous()
        self.bias = (
            None if biases[0] is None else torch.cat([b.detach() for b in biases if b is not None]).to(dtype)
        )

    def __call__(self, x: Float[Tensor, "B D"], out: Float[Tensor, "B E"]) -> None:
        """Write to `out`."""
        if self.packed:
            out.copy_(packed_product(x, self.weight, self.bias))
        elif self.bias is None:
            torch.mm(x, self.weight, out=out)
        else:
            torch.addmm(self.bias, x, self.weight, out=out)

    def add(self, x: Float[Tensor, "B D"], out: Float[Tensor, "B E"]) -> None:
        """Add to `out`."""
        if self.packed:
            out.add_(packed_product(x, self.weight, self.bias))
            return
        out.addmm_(x, self.weight)
        if self.bias is not None:
            out.add_(self.bias)


class RotationMatrices:
    """The position encoding as matrices: `x @ turns(t)` is `position(x)` at position t, for any x of the head's width (chapter 17).

    Args:
        position: rotary, or one that turns nothing (ALiBi, None).
        head_dim: width Dh of a head.
        dtype: of the matrices.
        device: where they live.
    """

    block = 64  # matrices made at once; all of them would fill memory, one at a time would take longer than its use

    def __init__(self, position: Position | None, head_dim: int, dtype: torch.dtype, device: torch.device):
        self.position, self.eye, self.start = position, torch.eye(head_dim, dtype=dtype, device=device), -1

    def __call__(self, t: int) -> Float[Tensor, "Dh Dh"]:
        if self.position is None:
            return self.eye
        start = t - t % self.block
        if start != self.start:
            positions = torch.arange(start, start + self.block, device=self.eye.device)[None]
            basis = self.eye[None, :, None].expand(
                -1, -1, self.block, -1
            )  # head i holds the basis vector e_i
            turned = self.position(basis, self.position.angles(positions))
            self.start, self.matrices = start, turned[0].transpose(0, 1).contiguous()
        return self.matrices[t - start]


class ScoreBias:
    """What is added to the scores of one decoding step: ALiBi's slopes, -inf at padding, or nothing at all: None (chapter 17)."""

    def __init__(
        self,
        slopes: Float[Tensor, "H"] | None,
        real: Bool[Tensor, "B S"],
        n_kv_heads: int,
        dtype: torch.dtype,
    ):
        B, S = real.shape
        self.padding = self.slopes = None
        if not bool(real.all()):
            minus = torch.zeros(B, S, dtype=dtype, device=real.device).masked_fill(~real, -math.inf)
            self.padding = minus.repeat_interleave(n_kv_heads, 0)[:, None]  # (B K) 1 S
        if slopes is not None:
            distance = torch.arange(S - 1, -1, -1, dtype=dtype, device=real.device)  # from the last column
            self.slopes = (-slopes.to(dtype).view(n_kv_heads, -1, 1) * distance).repeat(B, 1, 1)  # (B K) G S

    def __call__(self, n_keys: int) -> Tensor | None:
        padding = None if self.padding is None else self.padding[..., :n_keys]
        slopes = None if self.slopes is None else self.slopes[..., -n_keys:]
        if padding is None or slopes is None:
            return slopes if padding is None else padding
        return padding + slopes


class HalfProjection(Projection):
    """A `Projection` whose weights stay in 16 bits, for models too large for a wider copy; the sums around it are wide (chapter 17)."""

    def __init__(
        self,
        weights: list[Tensor],
        biases: list[Tensor | None],
        scale: Float[Tensor, "D"] | None,
        dtype: torch.dtype,
    ):
        self.weight = torch.cat([w.detach() for w in weights])
        self.bias = None if biases[0] is None else torch.cat([b.detach() for b in biases if b is not None])
        self.scale, self.packed = scale, packing_pays(self.weight)
        self.emulated = self.weight.dtype == torch.bfloat16 and not fast_bfloat16(self.weight.device)
        if self.packed:
            self.weight = pack_weight(self.weight)

    def product(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B E"]:
        x = (x if self.scale is None else x * self.scale).to(self.weight.dtype)
        if self.packed:
            return packed_product(x, self.weight, self.bias)
        if self.emulated and len(x) == 1:
            y = torch.mv(self.weight, x[0])[None]
            return y if self.bias is None else y + self.bias
        return F.linear(x, self.weight, self.bias)

    def __call__(self, x: Float[Tensor, "B D"], out: Float[Tensor, "B E"]) -> None:
        out.copy_(self.product(x))

    def add(self, x: Float[Tensor, "B D"], out: Float[Tensor, "B E"]) -> None:
        out.add_(self.product(x))


class PreparedLayer(NamedTuple):
    """The four matrix products of a block (chapter 17)."""

    qkv: Projection
    out: Projection
    gate_up: Projection
    down: Projection


def obstacle(model: Transformer) -> str | None:
    """Why `Prepared` cannot hold this model, or None when it can."""
    config = model.config
    if (config.norm, config.mlp, config.residual) != ("rms", "swiglu", "pre"):
        return f"it has norm={config.norm!r}, mlp={config.mlp!r}, residual={config.residual!r}"
    if model.layout is not flat_layout or not isinstance(model.position, RoPE | ALiBi | None):
        return "it places its tokens by rules of its own"
    linear = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down", "head")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'it'} has a forward hook"
        if name.rpartition(".")[2] in linear and type(module) not in (nn.Linear, NormHead):
            return f"{name} is a {type(module).__name__}, not a plain linear layer"
    return None


class Prepared:
    """A snapshot of a model's weights, laid out for decoding; later training does not reach it (chapter 17).

    Args:
        model: of the LLaMA kind: RMSNorm, SwiGLU, rotary, ALiBi or no positions, plain linear layers.
        projection: how each matrix is kept. By default `Projection`, in float32 at least, or `HalfProjection` where
            the weights are in 16 bits and would take more than `wide_bytes` in 32.

    Raises:
        ValueError: the model is of another kind.
    """

    wide_bytes = 128 * 2**20  # what a large cache holds; beyond it reading half as many bytes wins

    def __init__(self, model: Transformer, *, projection: type[Projection] | None = None):
        reason = obstacle(model)
        if reason is not None:
            raise ValueError(f"cannot prepare this model: {reason}; pass the model itself")
        self.model, config, weight = model, model.config, model.embed.weight
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        n_bytes = sum(p.numel() for p in model.parameters()) * self.dtype.itemsize
        if projection is None:
            keep = weight.dtype != self.dtype and n_bytes > self.wide_bytes
            projection = HalfProjection if keep else Projection
        root = math.sqrt(config.dim)

        def project(*linears: nn.Linear, norm: nn.Module | None = None) -> Projection:
            scale = None if norm is None else cast(RMSNorm, norm).weight.detach().to(self.dtype) * root
            rows = [F.normalize(p.weight, dim=-1) if isinstance(p, NormHead) else p.weight for p in linears]
            return projection(rows, [p.bias for p in linears], scale, self.dtype)

        self.embed = weight.detach().clone()
        self.layers: list[PreparedLayer] = []
        for block in model.blocks:
            attn, mlp = cast(Attention, block.attn), cast(SwiGLU, block.mlp)
            self.layers.append(
                PreparedLayer(
                    project(attn.wq, attn.wk, attn.wv, norm=cast(RMSNorm, block.attn_norm)),
                    project(attn.wo),
                    project(mlp.w_gate, mlp.w_up, norm=cast(RMSNorm, block.mlp_norm)),
                    project(mlp.w_down),
                )
            )
        self.head = project(model.head, norm=model.norm)

    def session(self, cache: KVCache, real: Bool[Tensor, "B S"]) -> FastSession:
        """Decoding after `generate.prefill` has filled the cache; `real` as in `generate.Session`."""
        return FastSession(self, cache, real)


class FastSession:
    """A `Session` over prepared weights: the fewest operations per token, into buffers that are taken once (chapter 17)."""

    def __init__(self, prepared: Prepared, cache: KVCache, real: Bool[Tensor, "B S"]):
        c, dtype, device, B = prepared.model.config, prepared.dtype, cache.k.device, len(real)
        H, K, Dh = c.n_heads, c.n_kv_heads, c.head_dim

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        position = prepared.model.position
        self.prepared, self.length = prepared, cache.length
        self.keys, self.values = (t.to(dtype).view(c.n_layers, B * K, -1, Dh) for t in (cache.k, cache.v))
        self.keys = self.keys.transpose(
            2, 3
        ).contiguous()  # (B K) Dh S: read along S by the product with queries
        self.turns = RotationMatrices(position, Dh, dtype, device)
        self.bias = ScoreBias(None if position is None else position.slopes, real, K, dtype)
        self.stream = empty(B, c.dim + 1)
        self.stream[:, -1] = math.sqrt(
            c.dim * c.norm_eps
        )  # one more coordinate, whose square is what eps adds
        self.x, self.normed, self.qkv = self.stream[:, :-1], empty(B, c.dim), empty(B, (H + 2 * K) * Dh)
        self.q, self.k, self.v = self.qkv.view(B, -1, Dh).split([H, K, K], dim=1)
        self.turned_q, self.turned_k = empty(B, H, Dh), empty(B, K, Dh)
        self.gate_up, self.gated, self.logits = (
            empty(B, 2 * c.hidden_dim),
            empty(B, c.hidden_dim),
            empty(B, c.vocab_size),
        )

    def norm(self) -> Float[Tensor, "B D"]:
        size = torch.linalg.vector_norm(self.stream, dim=-1, keepdim=True)
        return torch.div(self.x, size, out=self.normed)

    def step(self, tokens: Int[Tensor, "B"]) -> Float[Tensor, "B V"]:
        """Append one token to each row; the logits of the next, in a buffer that the next step overwrites."""
        (B, H, Dh), end = self.q.shape, self.length + 1
        if end > self.keys.shape[3]:
            raise ValueError(f"the cache holds {self.keys.shape[3]} tokens, {end} needed")
        turn = self.turns(self.length).expand(B, Dh, Dh)
        turn_and_scale, bias = turn / math.sqrt(Dh), self.bias(end)
        keys, values = self.keys[..., :end].unbind(0), self.values[:, :, :end].unbind(0)
        columns = self.keys[..., self.length], self.values[:, :, self.length]
        new = [column.view(len(keys), B, -1, Dh).unbind(0) for column in columns]
        queries = self.turned_q.view(self.keys.shape[1], -1, Dh)  # (B K) G Dh: G heads read one kv head
        gate, up = self.gate_up.chunk(2, dim=-1)
        self.x.copy_(F.embedding(tokens, self.prepared.embed))
        for layer, k, v, new_k, new_v in zip(self.prepared.layers, keys, values, *new):
            layer.qkv(self.norm(), self.qkv)
            torch.bmm(self.q, turn_and_scale, out=self.turned_q)
            new_k.copy_(torch.bmm(self.k, turn, out=self.turned_k))
            new_v.copy_(self.v)
            scores = torch.bmm(queries, k) if bias is None else torch.baddbmm(bias, queries, k)
            layer.out.add(torch.bmm(scores.softmax(-1), v).view(B, H * Dh), self.x)
            layer.gate_up(self.norm(), self.gate_up)
            layer.down.add(torch.mul(F.silu(gate, inplace=True), up, out=self.gated), self.x)
        self.prepared.head(self.norm(), self.logits)
        self.length = end
        return self.logits


def prepare(model: Transformer, n_steps: int) -> Transformer | Prepared:
    """The model laid out for decoding, where it can be and n_steps tokens repay it; elsewhere the model itself."""
    small = sum(p.numel() * p.itemsize for p in model.parameters()) <= 2**30
    on_cpu = model.embed.weight.device.type == "cpu"
    return Prepared(model) if n_steps >= 24 and small and on_cpu and obstacle(model) is None else model
