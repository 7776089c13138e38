import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from minillm.attention import Attention, KVCache, Mask
from minillm.mlp import MLP, SwiGLU
from minillm.norm import LayerNorm, RMSNorm
from minillm.position import ALiBi, Angles, Position, RoPE, RoPE2D


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that fixes a model's shape. Sizes have no default; variants default to LLaMA's."""

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    hidden_dim: int
    max_seq_len: int
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    position: Literal["rope", "rope2d", "alibi", "none"] = "rope"
    rope_theta: float = 10000.0
    rope_fraction: float = 1.0  # the share of a head that rotates
    rope_interleaved: bool = False
    rope_scale: float = 1.0  # positions are divided by it (linear interpolation)
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False  # the head's weight is the embedding's
    norm_head: bool = False  # Baichuan2: the head's rows are normalised
    residual: Literal["pre", "glm"] = "pre"
    attention: Literal["causal", "prefix"] = "causal"

    def __post_init__(self):
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dim % self.n_heads:
            raise ValueError(f"dim must be a multiple of n_heads, got {self.dim} and {self.n_heads}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads must be a multiple of n_kv_heads, got {self.n_heads} and {self.n_kv_heads}")

    @property
    def head_dim(self) -> int:
        """The width of one head, Dh."""
        return self.dim // self.n_heads

    def make_position(self) -> Position | None:
        """The position encoding that the layers share."""
        if self.position == "rope":
            return RoPE(
                self.head_dim,
                theta=self.rope_theta,
                rotary_dim=int(self.head_dim * self.rope_fraction),
                interleaved=self.rope_interleaved,
                scale=self.rope_scale,
            )
        if self.position == "rope2d":
            return RoPE2D(self.head_dim, theta=self.rope_theta)
        return ALiBi(self.n_heads) if self.position == "alibi" else None


class Block(nn.Module):
    """Attention and MLP, each on a normed copy, each added to the residual stream."""

    def __init__(self, config: ModelConfig, position: Position | None):
        super().__init__()
        norm = RMSNorm if config.norm == "rms" else LayerNorm
        self.attn_norm = norm(config.dim, config.norm_eps)
        self.attn = Attention(
            config.dim,
            config.n_heads,
            config.n_kv_heads,
            qkv_bias=config.qkv_bias,
            out_bias=config.out_bias,
            position=position,
        )
        self.mlp_norm = norm(config.dim, config.norm_eps)
        mlp = SwiGLU if config.mlp == "swiglu" else MLP
        self.mlp = mlp(config.dim, config.hidden_dim, bias=config.mlp_bias)

    def forward(
        self, x: Float[Tensor, "B T D"], angles: Angles | None, mask: Mask, cache: KVCache | None, layer: int
    ) -> Float[Tensor, "B T D"]:
        x = x + self.attn(self.attn_norm(x), angles=angles, mask=mask, cache=cache, layer=layer)
        return x + self.mlp(self.mlp_norm(x))


class GLMBlock(Block):
    """ChatGLM-6B's block: the residual carries the *normed* tensor, scaled by alpha = sqrt(2 * 28)."""

    alpha = math.sqrt(2 * 28)  # the reference hard-wires 28 layers

    def forward(
        self, x: Float[Tensor, "B T D"], angles: Angles | None, mask: Mask, cache: KVCache | None, layer: int
    ) -> Float[Tensor, "B T D"]:
        x = self.attn_norm(x)
        x = self.alpha * x + self.attn(x, angles=angles, mask=mask, cache=cache, layer=layer)
        x = self.mlp_norm(x)
        return self.alpha * x + self.mlp(x)


class Transformer(nn.Module):
    """Embedding, blocks, final norm, head. Weights: `embed`, `blocks.N.…`, `norm`, `head`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        position = config.make_position()
        block = GLMBlock if config.residual == "glm" else Block
        self.blocks = nn.ModuleList(block(config, position) for _ in range(config.n_layers))
        self.norm = (RMSNorm if config.norm == "rms" else LayerNorm)(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self.position = position
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of standard deviation 0.02; those that write to the residual stream smaller by sqrt(2 n_layers)."""
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                nn.init.ones_(weight) if "norm" in name and name.endswith("weight") else nn.init.zeros_(weight)
            else:
                into_residual = name.endswith(("wo.weight", "w_down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * self.config.n_layers) if into_residual else 0.02)

    def make_cache(self, batch_size: int, max_tokens: int) -> KVCache:
        """An empty cache that fits this model, on its device and in its dtype."""
        weight, config = self.embed.weight, self.config
        return KVCache(
            n_layers=config.n_layers,
            batch_size=batch_size,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            max_tokens=max_tokens,
            dtype=weight.dtype,
            device=weight.device,
        )

    def hidden(
        self,
        tokens: Int[Tensor, "B T"],
        *,
        attention_mask: Bool[Tensor, "B S"] | None = None,
        positions: Int[Tensor, "..."] | None = None,
        mask: Mask | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The final, normed hidden states.

        Args:
            tokens: ids; with a cache, only those that it does not hold yet.
            attention_mask: True for real tokens, False for (left) padding; covers cached columns too.
            positions: (B, T), or (B, 2, T) for 2D rotary; by default each row counts its own real tokens from 0.
            mask: who sees whom; by default causal. Not together with `attention_mask`.
            cache: earlier keys and values; this call appends to it.
        """
        if mask is not None and attention_mask is not None:
            raise ValueError("give mask or attention_mask, not both: Mask(keys=attention_mask) combines them")
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if mask is None:
            mask = Mask(keys=attention_mask)
        if positions is None:
            if attention_mask is None:
                positions = torch.arange(start, end, device=tokens.device)[None]
            else:
                positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, start:end]
        x = self.embed(tokens)
        angles = None if self.position is None else self.position.angles(positions)
        for layer, block in enumerate(self.blocks):
            x = block(x, angles, mask, cache, layer)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.norm(x)

    def logits(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Scores of every token of the vocabulary as the next one."""
        if self.config.norm_head:
            return F.linear(hidden, F.normalize(self.head.weight, dim=-1))
        return self.head(hidden)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        *,
        attention_mask: Bool[Tensor, "B S"] | None = None,
        positions: Int[Tensor, "..."] | None = None,
        mask: Mask | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Next-token logits; the arguments are those of `hidden`."""
        return self.logits(
            self.hidden(tokens, attention_mask=attention_mask, positions=positions, mask=mask, cache=cache)
        )
