"""Laws of chapter 10."""

import torch

from minillm.check import close, law


def _rotated(x, positions, theta):
    """The half-split rotation in float64, by complex numbers."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    phase = positions.double()[:, None, :, None] * frequencies
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(
        torch.ones_like(phase), phase
    )
    return torch.cat((turned.real, turned.imag), dim=-1)


@law(
    "position.rope",
    "position 0 changes nothing",
    hint="the angle is position * frequency: cos 0 = 1 and sin 0 = 0",
)
def _(f):
    x = torch.randn(2, 3, 1, 8)
    close(f(x, torch.zeros(2, 1, dtype=torch.long), 10000.0), x)


@law("position.rope", "position 1 turns a pair by one radian", hint="(a cos - b sin, b cos + a sin)")
def _(f):
    x = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    one = torch.tensor([1.0])
    close(
        f(x, torch.ones(1, 1, dtype=torch.long), 10000.0), torch.cat((one.cos(), one.sin())).view(1, 1, 1, 2)
    )


@law("position.rope", "lengths stay", hint="a rotation changes no length: check the signs of the two sines")
def _(f):
    x = torch.randn(2, 3, 5, 8)
    close(f(x, torch.randint(0, 50, (2, 5)), 10000.0).norm(dim=-1), x.norm(dim=-1))


@law(
    "position.rope",
    "the pairs are (i, i + Dh/2)",
    hint="split the last axis into two halves and pair them; not (2i, 2i + 1)",
)
def _(f):
    x = torch.zeros(1, 1, 1, 8)
    x[..., 1] = 1.0
    moved = f(x, torch.full((1, 1), 3), 10000.0)[0, 0, 0].nonzero().flatten().tolist()
    assert moved == [1, 5], (
        f"dimension 1 of 8 should mix with dimension 5; a one at 1 went to dimensions {moved}"
    )


@law("position.rope", "equals the formula", hint="frequency i is theta ** (-2 i / Dh), for i = 0 … Dh/2 - 1")
def _(f):
    x, positions = torch.randn(2, 3, 5, 8), torch.randint(0, 100, (2, 5))
    for theta in (10000.0, 100.0):
        close(f(x, positions, theta), _rotated(x, positions, theta).float(), rtol=1e-4, atol=1e-4)


@law("position.rope", "only the distance counts", hint="rotate queries and keys by the same rule")
def _(f):
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    at = lambda x, position: f(x, torch.full((1, 1), position), 10000.0)  # noqa: E731
    close((at(q, 107) * at(k, 100)).sum(), (at(q, 7) * at(k, 0)).sum(), rtol=1e-3, atol=1e-3, what="score")


@law("position.rope", "the gradient is right", hint="keep every step differentiable: no .data, no .item()")
def _(f):
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: f(x, torch.arange(3)[None], 10000.0), (x,), raise_exception=False, atol=1e-4
    ), "the gradient differs from finite differences"


@law(
    "position.rope",
    "in bfloat16 the angles are not rounded",
    hint="compute position * frequency, cos and sin in float32; only then cast to x.dtype",
)
def _(f):
    x, positions = torch.randn(1, 2, 4, 8).bfloat16(), torch.tensor([[3, 1000, 4001, 30000]])
    close(f(x, positions, 10000.0), _rotated(x, positions, 10000.0).bfloat16(), rtol=4e-2, atol=4e-2)


@law(
    "position.alibi_slopes",
    "8 heads: 1/2, 1/4, … 1/256",
    hint="a geometric sequence from 2^(-8/H) by 2^(-8/H)",
)
def _(f):
    close(f(8), 0.5 ** torch.arange(1, 9))


@law("position.alibi_slopes", "16 heads: from 2^(-1/2) to 2^-8", hint="head i of H has 2^(-8 (i + 1) / H)")
def _(f):
    close(f(16), 2.0 ** (-torch.arange(1, 17) / 2))


@law(
    "position.alibi_slopes",
    "one slope per head",
    hint="for 3 heads: those of 2 heads, then the first of 4 heads",
)
def _(f):
    for n_heads in range(1, 70):
        assert f(n_heads).shape == (n_heads,), f"{n_heads} heads: shape {tuple(f(n_heads).shape)}"


@law(
    "position.alibi_slopes",
    "40 heads, as in Baichuan-13B",
    hint="the 32 slopes of 32 heads, then slopes 1, 3, 5, … of 64 heads",
)
def _(f):
    last = torch.tensor([0.9170, 0.7711, 0.6484, 0.5453, 0.4585, 0.3856, 0.3242, 0.2726])
    close(f(40)[:32], 2.0 ** (-torch.arange(1, 33) / 4))
    close(f(40)[32:], last, rtol=1e-3)


@law("position.alibi_bias", "shape H, T, S", hint="slopes[:, None, None] * a (T, S) matrix of distances")
def _(f):
    assert f(torch.ones(3), 4, 6).shape == (3, 4, 6), (
        f"shape {tuple(f(torch.ones(3), 4, 6).shape)}, expected (3, 4, 6)"
    )


@law("position.alibi_bias", "0 for a token itself", hint="distance is query column minus key column")
def _(f):
    close(f(torch.ones(2), 5, 5).diagonal(dim1=1, dim2=2), torch.zeros(2, 5))


@law("position.alibi_bias", "minus slope times distance", hint="farther keys get a lower score")
def _(f):
    expected = -torch.tensor([[0.0], [1.0], [2.0]]) * 0.5
    close(f(torch.tensor([0.5]), 3, 3)[0, :, :1], expected)


@law(
    "position.alibi_bias",
    "with a cache the queries are the last T columns",
    hint="query row t stands at column S - T + t",
)
def _(f):
    slopes = torch.tensor([0.5, 0.25])
    close(f(slopes, 2, 6), f(slopes, 6, 6)[:, 4:], what="two new tokens after four cached ones")


def _turn_pairs(x, positions):
    phase = positions.double()[:, None] * 10000.0 ** (-torch.arange(0, x.shape[-1], 2).double() / x.shape[-1])
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(phase), phase)).flatten(-2)


@law("position.half_split_weight", "keeps every row", hint="it reorders rows: use view, transpose, reshape")
def _(f):
    weight = torch.arange(24.0).view(8, 3)
    out = f(weight, 2)
    assert out.shape == weight.shape, f"shape {tuple(out.shape)}, expected {tuple(weight.shape)}"
    close(out[:, 0].sort().values, weight[:, 0], what="sorted first column")


@law("position.half_split_weight", "heads do not mix", hint="view as (n_heads, Dh / 2, 2, D) first")
def _(f):
    rows = f(torch.arange(8.0)[:, None], 2).flatten().tolist()
    assert sorted(rows[:4]) == [0, 1, 2, 3], (
        f"the first head holds rows {rows[:4]}, expected some order of 0, 1, 2, 3"
    )


@law(
    "position.half_split_weight",
    "the scores stay",
    hint="row 2i of a head goes to i, row 2i + 1 to i + Dh/2",
)
def _(f):
    n_heads, positions, x = 2, torch.arange(5), torch.randn(5, 6)
    wq, wk = torch.randn(16, 6), torch.randn(16, 6)
    heads = lambda weight: (x @ weight.T).view(5, n_heads, 8).transpose(0, 1)  # noqa: E731
    expected = torch.stack(
        [_turn_pairs(q, positions) @ _turn_pairs(k, positions).T for q, k in zip(heads(wq), heads(wk))]
    )
    q, k = (_rotated(heads(f(w, n_heads))[None], positions[None], 10000.0)[0] for w in (wq, wk))
    close((q @ k.transpose(1, 2)).float(), expected.float(), rtol=1e-3, atol=1e-3, what="scores")
