"""Laws of chapter 11."""

import math

import torch

from minillm.check import close, law


def _reference(q, k, v):
    """One head, one query at a time."""
    H, T, Dh = q.shape[1:]
    K, S = k.shape[1:3]
    out = torch.zeros_like(q)
    for h in range(H):
        g = h * K // H
        for t in range(T):
            seen = S - T + t + 1
            scores = torch.einsum("bd,bsd->bs", q[:, h, t], k[:, g, :seen]) / math.sqrt(Dh)
            out[:, h, t] = torch.einsum("bs,bsd->bd", scores.softmax(-1), v[:, g, :seen])
    return out


def _qkv(B=2, H=4, K=4, T=6, S=6, Dh=8, **kwargs):
    return (
        torch.randn(B, H, T, Dh, **kwargs),
        torch.randn(B, K, S, Dh, **kwargs),
        torch.randn(B, K, S, Dh, **kwargs),
    )


@law(
    "attention.attend",
    "the case computed by hand",
    hint="softmax(q kᵀ / sqrt(Dh)) v; no query sees a later key",
)
def _(f):
    q, k, v = (torch.tensor(x).view(1, 1, 2, 1) for x in ([1.0, math.log(3)], [0.0, 1.0], [4.0, 8.0]))
    close(f(q, k, v), torch.tensor([4.0, 7.0]).view(1, 1, 2, 1))


@law(
    "attention.attend",
    "equal values come back as they are",
    hint="a row of weights sums to 1: the softmax runs over the keys",
)
def _(f):
    q, k, v = _qkv()
    v = v[:, :, :1].expand_as(v)
    close(f(q, k, v), v)


@law("attention.attend", "no look-ahead", hint="a later key has the score -inf before the softmax")
def _(f):
    q, k, v = _qkv()
    before = f(q, k, v)
    k, v = k.clone(), v.clone()
    k[:, :, 4] += 1.0
    v[:, :, 4] += 1.0
    after = f(q, k, v)
    assert torch.equal(before[:, :, :4], after[:, :, :4]), "a changed token 4 changed an output before it"
    assert not torch.equal(before[:, :, 4:], after[:, :, 4:]), "a changed token 4 changed nothing after it"


@law(
    "attention.attend",
    "scores are divided by sqrt(Dh)",
    hint="the head width, q.shape[-1], not the width of the model",
)
def _(f):
    for Dh in (4, 64):
        q, k, v = _qkv(Dh=Dh)
        close(f(q, k, v), _reference(q, k, v))


@law(
    "attention.attend",
    "after a cache, a query sees every earlier key",
    hint="query t of T is column S - T + t",
)
def _(f):
    for T, S in ((1, 6), (3, 8)):
        q, k, v = _qkv(T=T, S=S)
        close(f(q, k, v), _reference(q, k, v), what=f"T={T}, S={S}")


@law("attention.attend", "one kv head serves all (MQA)", hint="k and v may have fewer heads than q")
def _(f):
    q, k, v = _qkv(K=1)
    close(f(q, k, v), _reference(q, k, v))


@law(
    "attention.attend",
    "a kv head serves consecutive query heads",
    hint="heads 0 0 1 1, not 0 1 0 1: repeat_interleave",
)
def _(f):
    for T, S in ((6, 6), (1, 6)):
        q, k, v = _qkv(H=6, K=2, T=T, S=S)
        close(f(q, k, v), _reference(q, k, v))


@law("attention.attend", "the gradient is right", hint="keep every step differentiable")
def _(f):
    qkv = [x.requires_grad_() for x in _qkv(B=1, H=2, K=1, T=3, S=4, Dh=2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(f, qkv, raise_exception=False), (
        "the gradient differs from finite differences"
    )


@law("attention.attend", "bfloat16 goes in and comes out", hint="the result has the dtype of the input")
def _(f):
    q, k, v = _qkv(K=2, dtype=torch.bfloat16)
    close(f(q, k, v), _reference(q.float(), k.float(), v.float()).bfloat16(), rtol=4e-2, atol=4e-2)


@law("attention.sliding_window", "a boolean (T, S)", hint="compare column numbers of queries and keys")
def _(f):
    seen = f(3, 5, 2)
    assert isinstance(seen, torch.Tensor), f"expected a tensor, got {type(seen).__name__}"
    assert seen.dtype == torch.bool, f"expected torch.bool, got {seen.dtype}"
    assert seen.shape == (3, 5), f"shape {tuple(seen.shape)}, expected (3, 5)"


@law("attention.sliding_window", "nobody sees the future", hint="key column <= query column")
def _(f):
    assert not f(6, 6, 3).triu(1).any(), "a query sees a later key"


@law(
    "attention.sliding_window", "a token sees itself and window - 1 before it", hint="0 <= distance < window"
)
def _(f):
    for window in (1, 3, 100):
        expected = torch.tensor([[max(0, t - window + 1) <= s <= t for s in range(7)] for t in range(7)])
        assert torch.equal(f(7, 7, window), expected), f"wrong for window {window}"


@law(
    "attention.sliding_window",
    "after a cache, queries are the last columns",
    hint="query t is column S - T + t",
)
def _(f):
    assert torch.equal(f(2, 7, 3), f(7, 7, 3)[-2:]), (
        "two queries over seven keys differ from the last two of seven"
    )


@law(
    "attention.tokens_that_fit",
    "a key and a value of two bytes",
    hint="2 tensors, each of n_kv_heads * head_dim numbers per layer",
)
def _(f):
    fitting = f(4 * 10, 1, 1, 1)
    assert fitting == 10, f"{fitting} tokens in 40 bytes, expected 10"


@law(
    "attention.tokens_that_fit",
    "agrees with KVCache",
    hint="multiply by layers, kv heads, head width and bytes",
)
def _(f):
    from minillm.attention import KVCache

    shape = {"n_layers": 28, "n_kv_heads": 2, "head_dim": 128}  # ChatGLM2-6B
    for dtype, size in ((torch.bfloat16, 2), (torch.float32, 4)):
        n_bytes = KVCache(**shape, batch_size=1, max_tokens=8192, dtype=dtype, device="meta").n_bytes
        fitting = f(n_bytes, 28, 2, 128, size)
        assert fitting == 8192, f"{fitting} tokens at {size} bytes per number, expected 8192"


@law("attention.tokens_that_fit", "a token that fits only in part does not fit", hint="round down, to an int")
def _(f):
    fitting = f(4 * 10 + 3, 1, 1, 1)
    assert fitting == 10, f"{fitting!r} tokens in 43 bytes, expected 10"
    assert isinstance(fitting, int), f"expected an int, got {type(fitting).__name__}"


@law("attention.pool_heads", "K = H changes nothing", hint="the mean of one head is that head")
def _(f):
    weight = torch.randn(4 * 3, 5)
    close(f(weight, 4, 4), weight)


@law(
    "attention.pool_heads",
    "K = 1 is the mean of all heads",
    hint="view the rows as (heads, Dh), then average over heads",
)
def _(f):
    weight = torch.randn(4 * 3, 5)
    close(f(weight, 4, 1), weight.view(4, 3, 5).mean(0))


@law(
    "attention.pool_heads",
    "groups are consecutive heads",
    hint="heads 0 and 1 make kv head 0, heads 2 and 3 kv head 1",
)
def _(f):
    weight = torch.arange(4.0).repeat_interleave(3)[:, None].expand(-1, 5)
    close(f(weight, 4, 2), torch.tensor([0.5, 2.5]).repeat_interleave(3)[:, None].expand(-1, 5))


@law(
    "attention.pool_heads",
    "heads that were equal lose nothing",
    hint="repeating the result gives the matrix back",
)
def _(f):
    small = torch.randn(2, 3, 5)
    close(f(small.repeat_interleave(4, dim=0).reshape(24, 5), 8, 2), small.reshape(6, 5))
