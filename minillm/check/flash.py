"""Laws of chapter 12."""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.check import close, law


def _once(*tiles):
    """Tiles that can be looked at once, in order."""
    yield from tiles


def _split(scores, values, size):
    return _once(*zip(scores.split(size), values.split(size)))


@law(
    "flash.online_softmax",
    "the case computed by hand",
    hint="when the maximum rises, shrink the old sum and the old output by exp(old - new)",
)
def _(f):
    scores = torch.tensor([1.0, 3.0, 4.0]).log()
    close(
        f(_split(scores, torch.tensor([[8.0], [4.0], [2.0]]), 2)), torch.tensor([3.5]), what="the hand's case"
    )


@law(
    "flash.online_softmax", "equal to the softmax over everything", hint="divide by the sum once, at the end"
)
def _(f):
    scores, values = 3 * torch.randn(20), torch.randn(20, 5)
    for size in (20, 7, 1):
        close(f(_split(scores, values, size)), scores.softmax(0) @ values, what=f"tiles of {size}")


@law(
    "flash.online_softmax",
    "large scores do not overflow",
    hint="exp(score - maximum) is at most 1; exp(score) is infinite above 88",
)
def _(f):
    scores, values = torch.tensor([500.0, 1000.0, 999.0, -1000.0]), torch.randn(4, 3)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        expected = scores.softmax(0) @ values
        close(f(_split(scores[order], values[order], 1)), expected, what="scores up to 1000")


@law(
    "flash.online_softmax",
    "a tile in which nothing is seen changes nothing",
    hint="-inf - (-inf) is NaN: begin with a finite number far below every score, such as -1e30",
)
def _(f):
    hidden, values = torch.full((3,), float("-inf")), torch.randn(9, 2)
    for scores in (torch.cat((hidden, torch.randn(6))), torch.cat((torch.randn(6), hidden))):
        close(f(_split(scores, values, 3)), scores.softmax(0) @ values, what="three keys masked")


def _part(scores, values):
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


@law(
    "flash.merge",
    "two halves make the whole",
    hint="weights exp(lse1 - lse) and exp(lse2 - lse), with lse = log(exp(lse1) + exp(lse2))",
)
def _(f):
    scores, values = 2 * torch.randn(4, 10), torch.randn(10, 3)
    out, lse = f(_part(scores[:, :3], values[:3]), _part(scores[:, 3:], values[3:]))
    expected = _part(scores, values)
    close(out, expected[0], what="out")
    close(lse, expected[1], what="lse")


@law("flash.merge", "what is merged can be merged again", hint="return the lse of both parts together")
def _(f):
    scores, values = torch.randn(4, 9), torch.randn(9, 3)
    parts = [_part(scores[:, at : at + 3], values[at : at + 3]) for at in (0, 3, 6)]
    expected = _part(scores, values)
    for out, lse in (f(f(parts[0], parts[1]), parts[2]), f(parts[0], f(parts[1], parts[2]))):
        close(out, expected[0], what="out of three parts")
        close(lse, expected[1], what="lse of three parts")


@law("flash.merge", "large sums do not overflow", hint="torch.logaddexp, or subtract the larger lse first")
def _(f):
    scores, values = torch.randn(4, 8) + torch.tensor([300.0, -300.0, 0.0, 90.0])[:, None], torch.randn(8, 3)
    out, lse = f(_part(scores[:, :5], values[:5]), _part(scores[:, 5:], values[5:]))
    close(out, scores.softmax(-1) @ values, what="out")
    close(lse, scores.logsumexp(-1), what="lse")


@law("flash.merge", "an empty part changes nothing", hint="its lse is -inf, its weight exp(-inf) = 0")
def _(f):
    part = _part(torch.randn(4, 6), torch.randn(6, 3))
    empty = torch.zeros(4, 3), torch.full((4,), float("-inf"))
    for out, lse in (f(part, empty), f(empty, part)):
        close(out, part[0], what="out")
        close(lse, part[1], what="lse")


def _causal(q, k, v):
    future = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    return (q @ k.T / math.sqrt(q.shape[1])).masked_fill(future, float("-inf")).softmax(-1) @ v


class _Largest(TorchDispatchMode):
    """The largest tensor that is made, and the multiplications of matrix products."""

    numel = products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
                self.products += out.numel() * args[-2].shape[-1]
        return out


@law("flash.tiled_attention", "one tile is attention", hint="scores over sqrt(Dh), no key after the query")
def _(f):
    q, k, v = torch.randn(3, 8, 4)
    close(f(q, k, v, 8), _causal(q, k, v))


@law(
    "flash.tiled_attention",
    "any side gives the same",
    hint="shrink sum and output when a tile raises the maximum; the last tile may be short",
)
def _(f):
    q, k, v = 2 * torch.randn(3, 23, 4)
    for side in (1, 4, 8, 64):
        close(f(q, k, v, side), _causal(q, k, v), what=f"side {side}")


@law(
    "flash.tiled_attention",
    "nothing of size N x N",
    hint="score one tile of queries against one tile of keys at a time",
)
def _(f):
    q, k, v = torch.randn(3, 128, 4)
    with _Largest() as largest:
        f(q, k, v, 8)
    assert largest.numel < 128 * 16, f"a tensor of {largest.numel} numbers at N = 128, side 8"


@law("flash.tiled_attention", "tiles of the future are not computed", hint="stop at the queries' own tile")
def _(f):
    q, k, v = torch.randn(3, 128, 4)
    with _Largest() as largest:
        f(q, k, v, 8)
    whole = 2 * 128 * 128 * 4
    assert largest.products <= 0.6 * whole, f"{largest.products / whole:.0%} of all products were computed"


@law(
    "flash.bytes_moved",
    "one tile: each matrix passes once",
    hint="q, k and v in, the output out: 4 n dim numbers",
)
def _(f):
    assert f(64, 16, 64) == 4 * 64 * 16 * 2, f"got {f(64, 16, 64)}, expected {4 * 64 * 16 * 2}"


@law("flash.bytes_moved", "k and v pass once for each tile of queries", hint="n / rows tiles of queries")
def _(f):
    for rows in (32, 8, 1):
        expected = 2 * (2 * 64 * 16 + 64 // rows * 2 * 64 * 16)
        assert f(64, 16, rows) == expected, f"rows {rows}: got {f(64, 16, rows)}, expected {expected}"


@law("flash.bytes_moved", "a tile that is not full is a pass too", hint="round the number of tiles up")
def _(f):
    expected = 4 * (2 * 100 * 8 + 4 * 2 * 100 * 8)
    assert f(100, 8, 30, 4) == expected, f"100 tokens by 30: got {f(100, 8, 30, 4)}, expected {expected}"


@law("flash.bytes_moved", "more rows than tokens are no use", hint="one pass at least")
def _(f):
    assert f(50, 8, 1000) == f(50, 8, 50), "1000 rows for 50 tokens differ from 50 rows"
