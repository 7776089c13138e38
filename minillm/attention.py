import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from minillm.position import Angles, Position


class Mask:
    """Which keys a query may see: a description, turned into a tensor only where a kernel needs one.

    The T queries are the last T of the S key columns (T < S when earlier keys come from a cache).

    Args:
        causal: query column i sees key columns <= i.
        prefix: (B,) columns < prefix[b] are seen by every query (prefix-LM).
        documents: (B, S) a document id per column; a query sees only its own document.
        keys: (B, S) False where a key is padding.
    """

    def __init__(
        self,
        *,
        causal: bool = True,
        prefix: Int[Tensor, "B"] | None = None,
        documents: Int[Tensor, "B S"] | None = None,
        keys: Bool[Tensor, "B S"] | None = None,
    ):
        self.causal, self.prefix, self.documents, self.keys = causal, prefix, documents, keys
        self._dense: dict[tuple, Tensor] = {}

    @property
    def plain(self) -> bool:
        """True when nothing but causality restricts the view, so that a kernel needs no tensor."""
        return self.prefix is None and self.documents is None and self.keys is None

    def dense(self, n_queries: int, n_keys: int, device: torch.device) -> Bool[Tensor, "B 1 T S"]:
        """True where query t may see key s; (1 or B, 1, T, S). A query always sees itself."""
        rows = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
        columns = torch.arange(n_keys, device=device)[None, :]
        seen = (columns <= rows if self.causal else torch.ones_like(columns <= rows))[None, None]
        if self.prefix is not None:
            seen = seen | (columns[None] < self.prefix[:, None, None])[:, None]
        if self.documents is not None:
            own = self.documents[:, n_keys - n_queries : n_keys, None] == self.documents[:, None, :n_keys]
            seen = seen & own[:, None]
        if self.keys is not None:
            seen = seen & self.keys[:, None, None, :n_keys]
        return seen | (columns == rows)  # a padded query sees itself: a softmax over nothing would be NaN

    def additive(
        self, n_queries: int, n_keys: int, device: torch.device, dtype: torch.dtype, slopes: Float[Tensor, "H"] | None
    ) -> Tensor:
        """What SDPA takes as `attn_mask`: booleans, or with ALiBi slopes a float bias. Built once per call of the model."""
        key = (n_queries, n_keys, device, dtype, slopes is None)
        if key not in self._dense:
            seen = self.dense(n_queries, n_keys, device)
            if slopes is not None:
                rows = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
                distance = (rows - torch.arange(n_keys, device=device)).abs()
                bias = -slopes.to(device)[:, None, None] * distance  # H T S
                seen = torch.where(seen, bias, float("-inf")).to(dtype)
            self._dense = {key: seen}
        return self._dense[key]


def attend(
    q: Float[Tensor, "B H T Dh"],
    k: Float[Tensor, "B K S Dh"],
    v: Float[Tensor, "B K S Dh"],
    mask: Mask,
    *,
    slopes: Float[Tensor, "H"] | None = None,
) -> Float[Tensor, "B H T Dh"]:
    """softmax(q kᵀ / sqrt(Dh) + bias) v, each kv head serving H / K consecutive query heads."""
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    gqa = q.shape[1] != k.shape[1]
    if mask.plain and slopes is None and (not mask.causal or n_queries == n_keys or n_queries == 1):
        causal = mask.causal and n_queries > 1
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)
    bias = mask.additive(n_queries, n_keys, q.device, q.dtype, slopes)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=gqa)


class KVCache:
    """Keys and values of every layer for the tokens seen so far, in memory taken once."""

    def __init__(
        self,
        *,
        n_layers: int,
        batch_size: int,
        n_kv_heads: int,
        head_dim: int,
        max_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        shape = (n_layers, batch_size, n_kv_heads, max_tokens, head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def max_tokens(self) -> int:
        return self.k.shape[3]

    @property
    def n_bytes(self) -> int:
        return 2 * self.k.numel() * self.k.element_size()

    def append(
        self, layer: int, k: Float[Tensor, "B K T Dh"], v: Float[Tensor, "B K T Dh"]
    ) -> tuple[Float[Tensor, "B K S Dh"], Float[Tensor, "B K S Dh"]]:
        """Store one layer's new keys and values; return all of that layer's so far. `advance` after the last layer."""
        end = self.length + k.shape[2]
        if end > self.max_tokens:
            raise ValueError(f"the cache holds {self.max_tokens} tokens, {end} needed: make it with a larger max_tokens")
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def advance(self, n_tokens: int) -> None:
        self.length += n_tokens


class Attention(nn.Module):
    """Multi-head (K = H), grouped-query (1 < K < H) and multi-query (K = 1) attention."""

    def __init__(
        self,
        dim: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        position: Position | None = None,
    ):
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if n_heads % n_kv_heads:
            raise ValueError(f"n_heads must be a multiple of n_kv_heads, got {n_heads} and {n_kv_heads}")
        if head_dim is None and dim % n_heads:
            raise ValueError(f"dim must be a multiple of n_heads, got {dim} and {n_heads}; or give head_dim")
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        self.head_dim = dim // n_heads if head_dim is None else head_dim
        self.wq = nn.Linear(dim, n_heads * self.head_dim, bias=qkv_bias)
        self.wk = nn.Linear(dim, n_kv_heads * self.head_dim, bias=qkv_bias)
        self.wv = nn.Linear(dim, n_kv_heads * self.head_dim, bias=qkv_bias)
        self.wo = nn.Linear(n_heads * self.head_dim, dim, bias=out_bias)
        self.position = position

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        *,
        angles: Angles | None = None,
        mask: Mask | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Float[Tensor, "B T D"]:
        """Attend. `angles` are `position.angles(positions)`, computed once for all layers by the caller."""
        B, T, _ = x.shape
        q = self.wq(x).view(B, T, self.n_heads, self.head_dim).transpose(1, 2)
        k = self.wk(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)
        v = self.wv(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)
        slopes = None
        if self.position is not None:
            if angles is None:
                start = 0 if cache is None else cache.length
                angles = self.position.angles(torch.arange(start, start + T, device=x.device)[None])
            q, k = self.position(q, angles), self.position(k, angles)
            slopes = self.position.slopes
        if cache is not None:
            k, v = cache.append(layer, k, v)
        out = attend(q, k, v, mask if mask is not None else Mask(), slopes=slopes)
        return self.wo(out.transpose(1, 2).reshape(B, T, -1))
