import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from minillm.attention import Attention, KVCache, Mask
from minillm.mlp import MLP, SwiGLU
from minillm.norm import LayerNorm, RMSNorm
from minillm.position import ALiBi, Angles, Position, RoPE, RoPE2D


class Block(nn.Module):
    """A pre-norm block: attention and MLP each read a normed copy of the residual stream and add to it.

    Args:
        attn: mixes tokens.
        mlp: works on each token alone.
        attn_norm: norms what the attention reads.
        mlp_norm: norms what the MLP reads.

    Chapter: 10. Source: arXiv:2002.04745, figure 1 (b).
    """

    def __init__(self, attn: nn.Module, mlp: nn.Module, attn_norm: nn.Module, mlp_norm: nn.Module):
        super().__init__()
        self.attn_norm, self.attn = attn_norm, attn
        self.mlp_norm, self.mlp = mlp_norm, mlp

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        angles: Angles | None = None,
        mask: Mask | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Float[Tensor, "B T D"]:
        x = x + self.attn(self.attn_norm(x), angles=angles, mask=mask, cache=cache, layer=layer)
        return x + self.mlp(self.mlp_norm(x))


class GLMBlock(Block):
    """ChatGLM-6B's block: the stream is normed first, and the *normed* stream, times alpha, is what is added to.

    Chapter: 10. Source: `modeling_chatglm.py` of ChatGLM-6B; the scale is GLM-130B's (arXiv:2210.02414, section 2.1).
    """

    alpha = math.sqrt(2 * 28)  # the published code writes 28 and does not read the config's layer count

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        angles: Angles | None = None,
        mask: Mask | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Float[Tensor, "B T D"]:
        x = self.attn_norm(x)
        x = self.alpha * x + self.attn(x, angles=angles, mask=mask, cache=cache, layer=layer)
        x = self.mlp_norm(x)
        return self.alpha * x + self.mlp(x)


class NormHead(nn.Linear):
    """Baichuan2's output layer: a linear map whose rows are scaled to length 1, so that no token wins by its norm alone.

    Chapter: 10. Source: arXiv:2309.10305, section 2.4.
    """

    def forward(self, input: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        return F.linear(input, F.normalize(self.weight, dim=-1), self.bias)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that fixes a model's shape. Sizes have no default; the variants default to LLaMA's.

    Raises:
        ValueError: a value is out of range, two do not fit together, or one would have no effect.
    """

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    hidden_dim: int
    max_seq_len: int  # the length it is trained for; nothing fails beyond it but the quality
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
    residual: Literal["pre", "glm"] = "pre"
    tied: bool = False  # the head's weight is the embedding's
    norm_head: bool = False  # Baichuan2

    def __post_init__(self):
        check_fields(self)
        if self.dim % self.n_heads:
            raise ValueError(f"dim must be a multiple of n_heads, got {self.dim} and {self.n_heads}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads must be a multiple of n_kv_heads, got {self.n_heads} and {self.n_kv_heads}"
            )
        used = {"rope": ("theta", "fraction", "interleaved", "scale"), "rope2d": ("theta",)}.get(
            self.position, ()
        )
        for field in fields(self):
            prefix, _, name = field.name.partition("rope_")
            if not prefix and name not in used and getattr(self, field.name) != field.default:
                raise ValueError(f"{field.name} has no effect with position={self.position!r}: leave it out")
        if self.position == "rope" and (self.rope_fraction > 1 or self.rotary_dim % 2 or not self.rotary_dim):
            raise ValueError(
                f"rope_fraction must give an even number of head_dim = {self.head_dim} dimensions, "
                f"got {self.rope_fraction} which gives {self.rotary_dim}"
            )

    @property
    def head_dim(self) -> int:
        """The width of one head, Dh."""
        return self.dim // self.n_heads

    @property
    def rotary_dim(self) -> int:
        """How many of a head's dimensions rotate."""
        return int(self.head_dim * self.rope_fraction)


def check_fields(config: object) -> None:
    """Hold each field of a dataclass against its annotation: positive sizes, finite positive numbers, known choices.

    Raises:
        ValueError: a field breaks its rule; the message names field, rule and value.
    """
    for field in fields(config):  # type: ignore[arg-type]
        value, name = getattr(config, field.name), field.name
        choices = get_args(field.type)
        if choices and value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        if field.type is bool and not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
        if field.type is int and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if field.type is float and not (isinstance(value, (int, float)) and 0 < value < math.inf):
            raise ValueError(f"{name} must be a finite number above 0, got {value!r}")


def make_norm(config: ModelConfig) -> RMSNorm | LayerNorm:
    """One of the model's norms: two in each block, one before the head."""
    return (RMSNorm if config.norm == "rms" else LayerNorm)(config.dim, config.norm_eps)


def make_position(config: ModelConfig) -> Position | None:
    """The position encoding that all layers share, or None."""
    if config.position == "rope":
        return RoPE(
            config.head_dim,
            theta=config.rope_theta,
            rotary_dim=config.rotary_dim,
            interleaved=config.rope_interleaved,
            scale=config.rope_scale,
        )
    if config.position == "rope2d":
        return RoPE2D(config.head_dim, theta=config.rope_theta)
    return ALiBi(config.n_heads) if config.position == "alibi" else None


def make_block(config: ModelConfig, position: Position | None) -> Block:
    """One block of the model."""
    attn = Attention(
        config.dim,
        config.n_heads,
        config.n_kv_heads,
        qkv_bias=config.qkv_bias,
        out_bias=config.out_bias,
        position=position,
    )
    mlp = (SwiGLU if config.mlp == "swiglu" else MLP)(config.dim, config.hidden_dim, bias=config.mlp_bias)
    block = GLMBlock if config.residual == "glm" else Block
    return block(attn, mlp, make_norm(config), make_norm(config))


Layout = Callable[[Tensor, Mask, KVCache | None], tuple[Mask, Tensor]]


def flat_layout(
    tokens: Int[Tensor, "B T"], mask: Mask, cache: KVCache | None = None
) -> tuple[Mask, Int[Tensor, "1 T"] | Int[Tensor, "B T"]]:
    """The mask as it is, and one position per token: each row counts its own real tokens from 0."""
    start = 0 if cache is None else cache.length
    end = start + tokens.shape[1]
    if mask.keys is None:
        return mask, torch.arange(start, end, device=tokens.device)[None]
    return mask, (mask.keys[:, :end].long().cumsum(1) - 1).clamp(min=0)[:, start:]


def prefix_layout(
    tokens: Int[Tensor, "B T"], mask: Mask, cache: KVCache | None = None
) -> tuple[Mask, Int[Tensor, "B 2 T"]]:
    """The mask as it is, and two positions per token for 2D rotary, read off the mask's prefix.

    The first counts through the prefix and stays at its last token; the second is 0 in the prefix and counts from 1 after it.

    Source: GLM, arXiv:2103.10360, section 2.2.1.
    """
    start = 0 if cache is None else cache.length
    end = start + tokens.shape[1]
    columns = torch.arange(start, end, device=tokens.device).expand(tokens.shape)
    prefix = torch.zeros_like(columns[:, :1]) if mask.prefix is None else mask.prefix[:, None]
    first = torch.minimum(columns, (prefix - 1).clamp(min=0))
    if mask.keys is not None:
        first = (mask.keys[:, :end].long().cumsum(1) - 1).clamp(min=0).gather(1, first)
    return mask, torch.stack((first, (columns - prefix + 1).clamp(min=0)), dim=1)


class Transformer(nn.Module):
    """Embedding, blocks, final norm, head: token ids in, a score for every next token out.

    Weights are named `embed`, `blocks.N.{attn_norm,attn,mlp_norm,mlp}`, `norm`, `head`.

    Args:
        config: the shape.
        layout: from tokens, mask and cache to (mask, positions); by default positions are counted
            (`flat_layout`, or `prefix_layout` for 2D rotary). A model whose mask follows from its tokens brings its own.

    Chapter: 10.
    """

    def __init__(self, config: ModelConfig, *, layout: Layout | None = None):
        super().__init__()
        self.config = config
        self.layout = layout or (prefix_layout if config.position == "rope2d" else flat_layout)
        self.position = make_position(config)
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(make_block(config, self.position) for _ in range(config.n_layers))
        self.norm = make_norm(config)
        self.head = (NormHead if config.norm_head else nn.Linear)(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self.reset_parameters()

    def hidden(
        self,
        tokens: Int[Tensor, "B T"],
        *,
        attention_mask: Bool[Tensor, "B S"] | Int[Tensor, "B S"] | None = None,
        positions: Int[Tensor, "..."] | None = None,
        mask: Mask | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The final, normed hidden states.

        Args:
            tokens: ids; with a cache, only those that it does not hold yet.
            attention_mask: True (1) for real tokens, False (0) for padding; covers cached columns too.
            positions: (B, T), or (B, 2, T) for 2D rotary, in place of the layout's.
            mask: who sees whom; by default causal. Not together with `attention_mask`.
            cache: earlier keys and values; this call appends to it.
        """
        if tokens.dim() != 2:
            raise ValueError(
                f"tokens must be (B, T), got {tuple(tokens.shape)}: one sequence is tokens[None]"
            )
        if attention_mask is not None:
            if mask is not None:
                raise ValueError(
                    "give mask or attention_mask, not both: Mask(keys=attention_mask) combines them"
                )
            mask = Mask(keys=attention_mask.bool())
        mask, counted = self.layout(tokens, Mask() if mask is None else mask, cache)
        angles = (
            None
            if self.position is None
            else self.position.angles(counted if positions is None else positions)
        )
        x = self.embed(tokens)
        for layer, block in enumerate(self.blocks):
            x = block(x, angles, mask, cache, layer)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.norm(x)

    def logits(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Scores of every token of the vocabulary as the next one."""
        return self.head(hidden)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        *,
        attention_mask: Bool[Tensor, "B S"] | Int[Tensor, "B S"] | None = None,
        positions: Int[Tensor, "..."] | None = None,
        mask: Mask | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Next-token logits; the arguments are those of `hidden`."""
        hidden = self.hidden(
            tokens, attention_mask=attention_mask, positions=positions, mask=mask, cache=cache
        )
        return self.logits(hidden)

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

    def reset_parameters(self, std: float = 0.02) -> None:
        """Gains 1, biases 0, weights normal; those that write to the residual stream smaller by sqrt(2 n_layers).

        Source: GPT-2 (section 2.3 of its report), for both the 0.02 and the smaller residual weights.
        """
        writers = ("attn.wo.weight", "mlp.w_down.weight")
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                nn.init.constant_(weight, 1.0 if name.endswith("norm.weight") else 0.0)
            else:
                nn.init.normal_(
                    weight, std=std / math.sqrt(2 * self.config.n_layers) if name.endswith(writers) else std
                )


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """How many parameters each part of a model has. A tied head has none of its own."""

    embedding: int
    attention: int
    mlp: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        return self.embedding + self.attention + self.mlp + self.norms + self.head


def count_parameters(config: ModelConfig) -> ParameterCount:
    """The parameters of `Transformer(config)`, part by part, from its shape alone."""
    dim, hidden_dim, kv_dim = config.dim, config.hidden_dim, config.n_kv_heads * config.head_dim
    attention = 2 * dim * dim + 2 * dim * kv_dim
    attention += config.qkv_bias * (dim + 2 * kv_dim) + config.out_bias * dim
    into = 2 if config.mlp == "swiglu" else 1  # matrices into the hidden width; always one out of it
    mlp = (into + 1) * dim * hidden_dim + config.mlp_bias * (into * hidden_dim + dim)
    return ParameterCount(
        embedding=config.vocab_size * dim,
        attention=config.n_layers * attention,
        mlp=config.n_layers * mlp,
        norms=(2 * config.n_layers + 1) * (dim if config.norm == "rms" else 2 * dim),
        head=0 if config.tied else config.vocab_size * dim,
    )


def flops_per_token(config: ModelConfig, seq_len: int, *, backward: bool = False) -> int:
    """Floating-point operations of the matrix products of one token, a multiplication and an addition counted as two.

    Every key is counted, also those that a causal kernel skips: so do published utilisations.

    Args:
        config: the model.
        seq_len: keys that each token is scored against.
        backward: forward and backward (three times the forward), in place of forward alone.

    Source: PaLM, arXiv:2204.02311, appendix B, with the head and without the embedding.
    """
    count = count_parameters(replace(config, qkv_bias=False, out_bias=False, mlp_bias=False))
    matrices = count.attention + count.mlp + config.vocab_size * config.dim
    scores = config.n_layers * 2 * seq_len * config.dim  # q kᵀ, and the weights times v
    return (3 if backward else 1) * 2 * (matrices + scores)


def kv_cache_bytes(
    config: ModelConfig, n_tokens: int, *, batch_size: int = 1, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Bytes of the keys and values of all layers, for this many tokens of this many sequences."""
    per_token = 2 * config.n_layers * config.n_kv_heads * config.head_dim
    return batch_size * n_tokens * per_token * dtype.itemsize


def activation_bytes(
    config: ModelConfig, *, batch_size: int, seq_len: int, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Bytes that autograd keeps from the forward pass for the backward pass, logits included.

    Runs the real model on fake tensors, which have shapes and no memory, so that the count is that of the code as it is:
    one layer and two layers are run, and the difference stands for all others.
    """

    def kept(n_layers: int) -> int:
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(saved: Tensor) -> Tensor:
            storages[saved.untyped_storage()._cdata] = saved.untyped_storage()
            return saved

        with FakeTensorMode(), torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            model = Transformer(replace(config, n_layers=n_layers))
            weights: dict[str, Tensor] = {
                n: nn.Parameter(torch.empty_like(w, dtype=dtype)) for n, w in model.named_parameters()
            }
            own = {w.untyped_storage()._cdata for w in (*weights.values(), *model.buffers())}
            tokens = torch.zeros(batch_size, seq_len, dtype=torch.long)
            torch.func.functional_call(model, weights, (tokens,))
            return sum(storage.nbytes() for key, storage in storages.items() if key not in own)

    one = kept(1)
    return one + (config.n_layers - 1) * (kept(2) - one)


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes of one training step, part by part."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def training_memory(
    config: ModelConfig, *, batch_size: int, seq_len: int, dtype: torch.dtype = torch.bfloat16
) -> TrainingMemory:
    """What one step of AdamW needs: 16 bytes for each parameter, and the activations of the batch.

    The optimizer keeps two moments in float32, and beside 16-bit weights a float32 copy of them.

    Source: ZeRO, arXiv:1910.02054, section 3.1.
    """
    n_parameters = count_parameters(config).total
    return TrainingMemory(
        weights=n_parameters * dtype.itemsize,
        gradients=n_parameters * dtype.itemsize,
        optimizer=n_parameters * (8 if dtype.itemsize == 4 else 12),
        activations=activation_bytes(config, batch_size=batch_size, seq_len=seq_len, dtype=dtype),
    )
