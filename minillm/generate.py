"""Draft, to be replaced by the export of chapter 14."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from minillm.attention import Attention, KVCache, Mask
from minillm.mlp import SwiGLU
from minillm.norm import RMSNorm
from minillm.position import ALiBi, Position, RoPE
from minillm.transformer import NormHead, Transformer, flat_layout


def top_k_filter(logits: Float[Tensor, "B V"], k: int) -> Float[Tensor, "B V"]:
    """Keep the k largest logits of each row, and any that equal the k-th; the others become -inf.

    Source: Fan et al. 2018, arXiv:1805.04833, section 5.4.
    """
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < kth, -math.inf)


def top_p_filter(logits: Float[Tensor, "B V"], p: float) -> Float[Tensor, "B V"]:
    """Keep the smallest set of most probable tokens whose probabilities sum to at least p; the others become -inf.

    Source: Holtzman et al. 2020, arXiv:1904.09751, section 3.1.
    """
    ordered, index = logits.sort(dim=-1)
    drop = ordered.softmax(-1).cumsum(-1) <= 1 - p
    drop[:, -1] = False  # the most probable token stays, however small p is
    return logits.masked_fill(drop.scatter(-1, index, drop), -math.inf)


def min_p_filter(logits: Float[Tensor, "B V"], p: float) -> Float[Tensor, "B V"]:
    """Keep the tokens that are at least p times as probable as the most probable one; the others become -inf.

    Source: Nguyen et al. 2024, arXiv:2407.01082, equation 3.
    """
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -math.inf)


def repetition_penalty(
    logits: Float[Tensor, "B V"], history: Int[Tensor, "B S"], penalty: float
) -> Float[Tensor, "B V"]:
    """Make the tokens of `history` less likely: their positive logits are divided by the penalty, negative ones multiplied.

    Args:
        logits: scores of the next token.
        history: the ids seen so far, prompt included; negative ids stand for padding and change nothing.
        penalty: above 1 against repetition, below 1 for it.

    Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1.
    """
    B, V = logits.shape
    seen = torch.zeros(B, V + 1, dtype=torch.bool, device=logits.device)
    seen = seen.scatter(1, history.masked_fill(history < 0, V), True)[:, :V]  # column V collects the padding
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def draw(logits: Float[Tensor, "B V"], uniform: Float[Tensor, "B"]) -> Int[Tensor, "B"]:
    """The token at which each row's distribution function first exceeds that row's number in [0, 1)."""
    cdf = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(cdf, uniform.double()[:, None] * cdf[:, -1:], right=True)[:, 0]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How the next token is drawn from the logits: penalty, temperature, top-k, top-p, min-p, in this order.

    Args:
        temperature: divides the logits; 0 takes the most probable token.
        top_k: keep this many tokens.
        top_p: keep the most probable tokens up to this total probability.
        min_p: keep the tokens at least this many times as probable as the first.
        repetition_penalty: above 1, tokens that occurred before become less likely.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}; None keeps every token")
        for name, value in (("top_p", self.top_p), ("min_p", self.min_p)):
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {value}; None keeps every token")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be positive, got {self.repetition_penalty}; 1 is none")

    @classmethod
    def greedy(cls) -> "Sampler":
        """Always the most probable token."""
        return cls(temperature=0.0)

    def filtered(
        self, logits: Float[Tensor, "B V"], history: Int[Tensor, "B S"] | None = None
    ) -> Float[Tensor, "B V"]:
        """The logits that are drawn from, in float32 at least."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.repetition_penalty != 1 and history is not None:
            logits = repetition_penalty(logits, history, self.repetition_penalty)
        if self.temperature == 0:
            return logits  # no filter ever drops the largest
        logits = logits / self.temperature
        if self.top_k is not None:
            logits = top_k_filter(logits, self.top_k)
        if self.top_p is not None:
            logits = top_p_filter(logits, self.top_p)
        return logits if self.min_p is None else min_p_filter(logits, self.min_p)

    def __call__(
        self,
        logits: Float[Tensor, "B V"],
        history: Int[Tensor, "B S"] | None = None,
        generator: torch.Generator | None = None,
        *,
        uniform: Float[Tensor, "B"] | None = None,
    ) -> Int[Tensor, "B"]:
        """One token per row, drawn by `uniform` if given, else by the (CPU) generator."""
        logits = self.filtered(logits, history)
        if self.temperature == 0:
            return logits.max(-1).indices  # torch's argmax is several times slower on a CPU
        if uniform is None:
            uniform = torch.rand(len(logits), dtype=torch.float64, generator=generator).to(logits.device)
        return draw(logits, uniform)


def left_pad(
    prompts: Sequence[Sequence[int]] | Int[Tensor, "B T"], pad_id: int, vocab_size: int
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Prompts of any lengths as one rectangle that ends flush right, and True where it holds a real token.

    Raises:
        ValueError: no prompt, an empty one, or an id outside the vocabulary.
    """
    rows = prompts.tolist() if isinstance(prompts, Tensor) else [list(prompt) for prompt in prompts]
    if not rows:
        raise ValueError("no prompts: give at least one")
    for number, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompt {number} is empty: give it at least one token, such as the bos token")
        if min(row) < 0 or max(row) >= vocab_size:
            bad = next(token for token in row if not 0 <= token < vocab_size)
            raise ValueError(f"prompt {number} holds the id {bad}, the vocabulary ends at {vocab_size - 1}")
    width = max(map(len, rows))
    tokens = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows])
    real = torch.arange(width) >= torch.tensor([[width - len(row)] for row in rows])
    return tokens, real


def prefill(
    model: Transformer,
    tokens: Int[Tensor, "B T"],
    real: Bool[Tensor, "B T"],
    cache: KVCache,
    *,
    chunk: int = 512,
) -> Float[Tensor, "B V"]:
    """Read the prompts into the cache, at most `chunk` columns at a time; the logits after the last column.

    In models that count positions, a token's position is its column, padding included: rotary and ALiBi see only
    differences. A model with a layout of its own places its tokens itself, and reads the prompt in one piece.
    """
    width, flat = tokens.shape[1], model.layout is flat_layout
    keys = None if bool(real.all()) else real

    def read(start: int, end: int) -> Float[Tensor, "B T D"]:
        return model.hidden(
            tokens[:, start:end],
            positions=torch.arange(start, end, device=tokens.device)[None] if flat else None,
            mask=Mask(keys=None if keys is None else keys[:, :end]),
            cache=cache,
        )

    last = (width - 1) // chunk * chunk if flat else 0
    for start in range(0, last, chunk):
        read(start, start + chunk)
    return model.logits(read(last, width)[:, -1])


class Session:
    """Decoding through the model itself, a token per row at a time: right for every model.

    Args:
        model: the model.
        cache: filled by `prefill`, with room for what is to come.
        real: (B, S) True where a column of the cache holds or will hold a real token.
    """

    def __init__(self, model: Transformer, cache: KVCache, real: Bool[Tensor, "B S"]):
        self.model, self.cache = model, cache
        self.real = None if bool(real.all()) else real

    def step(self, tokens: Int[Tensor, "B"]) -> Float[Tensor, "B V"]:
        """Append one token to each row; the logits of the next."""
        start = self.cache.length
        flat = self.model.layout is flat_layout
        hidden = self.model.hidden(
            tokens[:, None],
            positions=torch.tensor([[start]], device=tokens.device) if flat else None,
            mask=Mask(keys=None if self.real is None else self.real[:, : start + 1]),
            cache=self.cache,
        )
        return self.model.logits(hidden[:, -1])


class Projection:
    """x Wᵀ + b with W stored (in, out), the layout in which a CPU multiplies a thin x fastest, and a norm's scale folded in.

    Args:
        weights: (out, in) matrices with one input; their outputs stand side by side.
        biases: one per weight, or None.
        scale: multiplies the input channels.
    """

    def __init__(
        self,
        weights: list[Tensor],
        biases: list[Tensor | None],
        scale: Float[Tensor, "D"] | None,
        dtype: torch.dtype,
    ):
        weight = torch.cat([w.detach() for w in weights]).to(dtype)
        self.weight = (weight if scale is None else weight * scale).t().contiguous()
        self.bias = (
            None if biases[0] is None else torch.cat([b.detach() for b in biases if b is not None]).to(dtype)
        )

    def __call__(self, x: Float[Tensor, "B D"], out: Float[Tensor, "B E"]) -> None:
        """Write to `out`."""
        if self.bias is None:
            torch.mm(x, self.weight, out=out)
        else:
            torch.addmm(self.bias, x, self.weight, out=out)

    def add(self, x: Float[Tensor, "B D"], out: Float[Tensor, "B E"]) -> None:
        """Add to `out`."""
        out.addmm_(x, self.weight)
        if self.bias is not None:
            out.add_(self.bias)


class HalfProjection:
    """A `Projection` whose weights stay in 16 bits, for models too large for a wider copy; the sums around it are wide."""

    def __init__(
        self,
        weights: list[Tensor],
        biases: list[Tensor | None],
        scale: Float[Tensor, "D"] | None,
        dtype: torch.dtype,
    ):
        self.weight = torch.cat([w.detach() for w in weights])
        self.bias = None if biases[0] is None else torch.cat([b.detach() for b in biases if b is not None])
        self.scale = scale

    def product(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B E"]:
        x = (x if self.scale is None else x * self.scale).to(self.weight.dtype)
        y = torch.mv(self.weight, x[0])[None] if len(x) == 1 else x @ self.weight.t()
        return y if self.bias is None else y + self.bias

    def __call__(self, x: Float[Tensor, "B D"], out: Float[Tensor, "B E"]) -> None:
        out.copy_(self.product(x))

    def add(self, x: Float[Tensor, "B D"], out: Float[Tensor, "B E"]) -> None:
        out.add_(self.product(x))


class PreparedLayer(NamedTuple):
    """The four matrix products of a block."""

    qkv: Projection | HalfProjection
    out: Projection | HalfProjection
    gate_up: Projection | HalfProjection
    down: Projection | HalfProjection


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
    """A snapshot of a model's weights, laid out for decoding; later training does not reach it (chapter 14).

    Args:
        model: of the LLaMA kind: RMSNorm, SwiGLU, rotary, ALiBi or no positions, plain linear layers.
        wide: widen 16-bit weights to float32; by default if all of them then take at most `wide_bytes`.

    Raises:
        ValueError: the model is of another kind.
    """

    wide_bytes = 128 * 2**20  # what a large cache holds; beyond it reading half as many bytes wins

    def __init__(self, model: Transformer, *, wide: bool | None = None):
        reason = obstacle(model)
        if reason is not None:
            raise ValueError(f"cannot prepare this model: {reason}; pass the model itself")
        self.model, config, weight = model, model.config, model.embed.weight
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        n_bytes = sum(p.numel() for p in model.parameters()) * self.dtype.itemsize
        wide = n_bytes <= self.wide_bytes if wide is None else wide
        kind = Projection if wide or weight.dtype == self.dtype else HalfProjection
        root = math.sqrt(config.dim)

        def project(*linears: nn.Linear, norm: nn.Module | None = None) -> Projection | HalfProjection:
            scale = None if norm is None else cast(RMSNorm, norm).weight.detach().to(self.dtype) * root
            rows = [F.normalize(p.weight, dim=-1) if isinstance(p, NormHead) else p.weight for p in linears]
            return kind(rows, [p.bias for p in linears], scale, self.dtype)

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


def rotations(
    position: Position | None, head_dim: int, start: int, n: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "T Dh Dh"]:
    """The position encoding as a matrix per position: `x @ rotations(…)[t]` is `position(x)` at start + t."""
    eye = torch.eye(head_dim, dtype=dtype, device=device)
    if position is None:
        return eye.expand(n, -1, -1)
    angles = position.angles(torch.arange(start, start + n, device=device)[None])
    rotated = position(eye[None, :, None].expand(1, head_dim, n, head_dim), angles)  # row i: where e_i goes
    return rotated[0].transpose(0, 1).contiguous()


class ScoreBias:
    """What is added to the scores of one decoding step: ALiBi's slopes, -inf at padding, or nothing at all (None)."""

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


class FastSession:
    """A `Session` over prepared weights: the fewest operations per token, into buffers that are taken once."""

    block = 64  # positions whose rotations are computed at once

    def __init__(self, prepared: Prepared, cache: KVCache, real: Bool[Tensor, "B S"]):
        c, dtype, device, B = prepared.model.config, prepared.dtype, cache.k.device, len(real)
        H, K, Dh = c.n_heads, c.n_kv_heads, c.head_dim
        empty = lambda *shape: torch.empty(shape, dtype=dtype, device=device)  # noqa: E731
        self.prepared, self.length = prepared, cache.length
        self.keys, self.values = (t.to(dtype).view(c.n_layers, B * K, -1, Dh) for t in (cache.k, cache.v))
        slopes = None if prepared.model.position is None else prepared.model.position.slopes
        self.bias = ScoreBias(slopes, real, K, dtype)
        self.stream = empty(B, c.dim + 1)
        self.stream[:, -1] = math.sqrt(c.dim * c.norm_eps)  # one more coordinate: its square is what eps adds
        self.x, self.normed, self.qkv = self.stream[:, :-1], empty(B, c.dim), empty(B, (H + 2 * K) * Dh)
        self.q, self.k, self.v = self.qkv.view(B, -1, Dh).split([H, K, K], dim=1)
        self.turned_q, self.turned_k = empty(B, H, Dh), empty(B, K, Dh)
        self.gate_up, self.gated = empty(B, 2 * c.hidden_dim), empty(B, c.hidden_dim)
        self.logits = empty(B, c.vocab_size)

    def norm(self) -> Tensor:
        size = torch.linalg.vector_norm(self.stream, dim=-1, keepdim=True)
        return torch.div(self.x, size, out=self.normed)

    def turn(self) -> tuple[Tensor, Tensor]:
        """The rotation of this step for keys, and for queries with the scores' 1 / sqrt(Dh) in it; one per row."""
        B, _, Dh = self.q.shape
        if self.length % self.block == 0 or not hasattr(self, "turns"):
            start = self.length - self.length % self.block
            position = self.prepared.model.position
            self.turns = rotations(position, Dh, start, self.block, self.normed.dtype, self.normed.device)
        turn = self.turns[self.length % self.block].expand(B, Dh, Dh)
        return turn, turn / math.sqrt(Dh)

    def step(self, tokens: Int[Tensor, "B"]) -> Float[Tensor, "B V"]:
        """Append one token to each row; the logits of the next, in a buffer that the next step overwrites."""
        B, H, Dh = self.q.shape
        end = self.length + 1
        if end > self.keys.shape[2]:
            raise ValueError(f"the cache holds {self.keys.shape[2]} tokens, {end} needed")
        turn_k, turn_q = self.turn()
        bias = self.bias(end)
        keys, values = self.keys[:, :, :end].unbind(0), self.values[:, :, :end].unbind(0)
        new_k = self.keys[:, :, self.length].view(len(keys), B, -1, Dh).unbind(0)
        new_v = self.values[:, :, self.length].view(len(keys), B, -1, Dh).unbind(0)
        queries = self.turned_q.view(
            keys[0].shape[0], -1, Dh
        )  # (B K) G Dh: a group of heads reads one kv head
        gate, up = self.gate_up.chunk(2, dim=-1)
        self.x.copy_(F.embedding(tokens, self.prepared.embed))
        for layer, k, v, last_k, last_v in zip(self.prepared.layers, keys, values, new_k, new_v):
            layer.qkv(self.norm(), self.qkv)
            torch.bmm(self.q, turn_q, out=self.turned_q)
            last_k.copy_(torch.bmm(self.k, turn_k, out=self.turned_k))
            last_v.copy_(self.v)
            k = k.transpose(1, 2)
            scores = torch.bmm(queries, k) if bias is None else torch.baddbmm(bias, queries, k)
            layer.out.add(torch.bmm(scores.softmax(-1), v).view(B, H * Dh), self.x)
            layer.gate_up(self.norm(), self.gate_up)
            F.silu(gate, inplace=True)
            layer.down.add(torch.mul(gate, up, out=self.gated), self.x)
        self.prepared.head(self.norm(), self.logits)
        self.length = end
        return self.logits


def open_session(
    model: Transformer | Prepared, cache: KVCache, real: Bool[Tensor, "B S"], n_steps: int
) -> Session | FastSession:
    """The fastest session that this model allows and that n_steps repay."""
    if isinstance(model, Prepared):
        return FastSession(model, cache, real)
    small = sum(p.numel() * p.itemsize for p in model.parameters()) <= 2**30
    if n_steps >= 32 and small and cache.k.device.type == "cpu" and obstacle(model) is None:
        return FastSession(Prepared(model), cache, real)
    return Session(model, cache, real)


def uniforms(n_rows: int, n_draws: int, seed: int | Sequence[int] | None) -> Float[Tensor, "B N"]:
    """Random numbers in [0, 1), a stream per row that depends on the row's own seed only.

    Args:
        seed: one per row; or one number, from which the rows' seeds are made; or None, which takes it from torch's
            global generator.
    """
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    if isinstance(seed, int):
        seeds = torch.randint(2**62, (n_rows,), generator=torch.Generator().manual_seed(seed)).tolist()
        seeds[0] = seed
    else:
        seeds = list(seed)
    if len(seeds) != n_rows:
        raise ValueError(f"one seed per prompt, or one for all: got {len(seeds)} for {n_rows} prompts")
    streams = [torch.Generator().manual_seed(s) for s in seeds]
    return torch.stack([torch.rand(n_draws, dtype=torch.float64, generator=stream) for stream in streams])


def decode_steps(
    model: Transformer | Prepared,
    prompts: Sequence[Sequence[int]] | Int[Tensor, "B T"],
    *,
    max_new_tokens: int,
    sampler: Sampler,
    pad_id: int = 0,
    seed: int | Sequence[int] | None = None,
) -> Iterator[list[int]]:
    """The next token of every row, step by step, for as long as they are asked for.

    Raises:
        ValueError: the longest prompt and the new tokens together exceed the model's max_seq_len.
    """
    plain = model.model if isinstance(model, Prepared) else model
    tokens, real = left_pad(prompts, pad_id, plain.config.vocab_size)
    (B, T), limit, device = tokens.shape, plain.config.max_seq_len, plain.embed.weight.device
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if T + max_new_tokens > limit:
        raise ValueError(
            f"{T} prompt tokens and {max_new_tokens} new ones exceed the model's context of {limit} (max_seq_len): "
            "shorten the prompt or lower max_new_tokens"
        )
    uniform = None if sampler.temperature == 0 else uniforms(B, max_new_tokens, seed).to(device)
    with torch.inference_mode():
        tokens, real = tokens.to(device), F.pad(real, (0, max_new_tokens), value=True).to(device)
        history = F.pad(tokens, (0, max_new_tokens)).masked_fill(~real, -1)
        cache = plain.make_cache(B, T + max_new_tokens)
    session = None
    for n in range(max_new_tokens):
        with torch.inference_mode():  # not around the yield: the caller's own code would run in it
            if session is None:
                logits = prefill(plain, tokens, real[:, :T], cache)
                session = open_session(model, cache, real, max_new_tokens)
            else:
                logits = session.step(history[:, T + n - 1])
            chosen = sampler(logits, history[:, : T + n], uniform=None if uniform is None else uniform[:, n])
            history[:, T + n] = chosen
        yield chosen.tolist()


def generate(
    model: Transformer | Prepared,
    prompts: Sequence[Sequence[int]] | Int[Tensor, "B T"],
    *,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    eos_id: int | None = None,
    pad_id: int = 0,
    seed: int | Sequence[int] | None = None,
    stop: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """Continue every prompt; returns the new tokens only, `eos_id` included where a row reached it.

    Args:
        model: a model, or `Prepared(model)` to prepare its weights once for many calls.
        prompts: token ids, of unequal lengths if need be.
        max_new_tokens: per row; with the longest prompt at most the model's max_seq_len.
        sampler: default greedy.
        eos_id: a row ends with it.
        pad_id: fills shorter rows; never seen by any real token.
        seed: one number, or one per prompt. A row's tokens depend on its own seed, not on its neighbours.
        stop: called with a row's new tokens after each of them; True ends the row.
    """
    new: list[list[int]] = [[] for _ in range(len(prompts))]
    running = list(range(len(prompts)))
    steps = decode_steps(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampler=sampler or Sampler.greedy(),
        pad_id=pad_id,
        seed=seed,
    )
    for chosen in steps:
        for row in running:
            new[row].append(chosen[row])
        running = [
            row for row in running if chosen[row] != eos_id and not (stop is not None and stop(new[row]))
        ]
        if not running:
            break
    return new


def stream(
    model: Transformer | Prepared,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    eos_id: int | None = None,
    seed: int | None = None,
    stop: Callable[[list[int]], bool] | None = None,
) -> Iterator[int]:
    """The tokens of `generate` for one prompt, each as soon as it is known."""
    new: list[int] = []
    for (token,) in decode_steps(
        model, [prompt], max_new_tokens=max_new_tokens, sampler=sampler or Sampler.greedy(), seed=seed
    ):
        new.append(token)
        yield token
        if token == eos_id or (stop is not None and stop(new)):
            return


@runtime_checkable
class TextTokenizer(Protocol):
    """What the text functions need of a tokenizer; `minillm.tokenizer.Tokenizer` has it."""

    @property
    def eos_id(self) -> int | None: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


def text_pieces(tokenizer: TextTokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of a stream of tokens, each piece as soon as it is whole: no character of several tokens is split."""
    ids: list[int] = []
    start, shown = 0, 0  # ids[start:shown] is the last piece: the context in which a decoder spaces the next
    for token in tokens:
        ids.append(token)
        before, now = tokenizer.decode(ids[start:shown]), tokenizer.decode(ids[start:])
        if len(now) > len(before) and not now.endswith("\ufffd"):
            yield now[len(before) :]
            start, shown = shown, len(ids)
    rest = tokenizer.decode(ids[start:])[len(tokenizer.decode(ids[start:shown])) :]
    if rest:
        yield rest


def until(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """Pass text on, up to the first of the stop strings; what may be the beginning of one is held back."""
    held = ""
    for piece in pieces:
        held += piece
        found = [held.index(mark) for mark in stop if mark in held]
        if found:
            held = held[: min(found)]
            break
        keep = max((n for mark in stop for n in range(1, len(mark)) if held.endswith(mark[:n])), default=0)
        if len(held) > keep:
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    if held:
        yield held


def stream_text(
    model: Transformer | Prepared,
    tokenizer: TextTokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Continue a text, piece by piece; ends at the tokenizer's eos, or before the first string of `stop`."""
    eos = tokenizer.eos_id
    tokens = stream(
        model, tokenizer.encode(prompt), max_new_tokens=max_new_tokens, sampler=sampler, eos_id=eos, seed=seed
    )
    yield from until(text_pieces(tokenizer, (token for token in tokens if token != eos)), stop)


def generate_text(
    model: Transformer | Prepared,
    tokenizer: TextTokenizer,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    seed: int | Sequence[int] | None = None,
    stop: Sequence[str] = (),
) -> str | list[str]:
    """Continue texts, as one batch; each ends at the tokenizer's eos, or before the first string of `stop`.

    Returns:
        The continuation of each prompt, without the prompt: a list, or a string if `prompts` is a string.
    """
    eos, tail = tokenizer.eos_id, 2 * max((len(mark.encode()) for mark in stop), default=0)

    def ended(ids: list[int]) -> bool:
        text = tokenizer.decode(ids[-tail:])
        return any(mark in text for mark in stop)

    rows = generate(
        model,
        [tokenizer.encode(text) for text in ([prompts] if isinstance(prompts, str) else prompts)],
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        eos_id=eos,
        seed=seed,
        stop=ended if stop else None,
    )
    texts = [tokenizer.decode([token for token in row if token != eos]) for row in rows]
    texts = ["".join(until([text], stop)) for text in texts]
    return texts[0] if isinstance(prompts, str) else texts


@torch.inference_mode()
def log_likelihood(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
) -> list[float]:
    """log p(continuation | prompt) in nats, summed over the tokens of the continuation.

    Pairs whose continuations differ in the last token only are read once: the four letters of a multiple choice cost
    one pass.

    Raises:
        ValueError: a prompt or a continuation is empty, or a pair is longer than the model's max_seq_len.
    """
    if len(prompts) != len(continuations):
        raise ValueError(f"one continuation per prompt: got {len(prompts)} and {len(continuations)}")
    device, limit = model.embed.weight.device, model.config.max_seq_len
    inputs: dict[tuple[int, ...], list[int]] = {}
    for i, (prompt, continuation) in enumerate(zip(prompts, continuations)):
        if not len(prompt) or not len(continuation):
            raise ValueError(f"pair {i}: prompt and continuation need at least one token each")
        if len(prompt) + len(continuation) - 1 > limit:
            raise ValueError(
                f"pair {i}: {len(prompt)} + {len(continuation)} tokens exceed the context of {limit}"
            )
        inputs.setdefault((*prompt, *continuation[:-1]), []).append(i)
    order = sorted(inputs, key=len)
    scores = torch.zeros(len(prompts), dtype=torch.float64, device=device)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = len(batch[-1])
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in batch], device=device)
        hidden = model.hidden(tokens)  # padding on the right: causality hides it
        places = [
            (row, len(prompts[i]) - 1 + n, token, i)
            for row, key in enumerate(batch)
            for i in inputs[key]
            for n, token in enumerate(continuations[i])
        ]
        rows, columns, targets, owners = torch.tensor(places, device=device).t()
        nats = [
            F.cross_entropy(model.logits(h).float(), target, reduction="none")
            for h, target in zip(hidden[rows, columns].split(1024), targets.split(1024))
        ]
        scores.index_add_(0, owners, -torch.cat(nats).double())
    return scores.tolist()
