"""Laws of chapter 14."""

import tempfile
from pathlib import Path

import torch

from minillm.base.errors import MiniLLMError
from minillm.check import close, law

H, WIDTH, D = 3, 4, 12  # heads, their width, and the model's


def _parts():
    return [torch.randn(H * WIDTH, D) for _ in range(3)]


def _fused(parts):
    rows = [part[h * WIDTH : (h + 1) * WIDTH] for h in range(H) for part in parts]
    return torch.cat(rows)


@law(
    "zoo.split_heads",
    "q, k and v come out, each (H Dh, D)",
    hint="return three tensors of a third of the rows",
)
def _(f):
    parts = list(f(torch.randn(3 * H * WIDTH, D), H))
    assert [tuple(part.shape) for part in parts] == [(H * WIDTH, D)] * 3, (
        f"shapes {[tuple(part.shape) for part in parts]}"
    )


@law("zoo.split_heads", "one head: three blocks", hint="view the rows as (H, 3, Dh)")
def _(f):
    fused = torch.arange(6.0)[:, None]
    for part, expected in zip(f(fused, 1), fused.chunk(3)):
        close(part, expected)


@law(
    "zoo.split_heads",
    "each head's rows are q, k, v; not all q before all k",
    hint="fused.view(H, 3, Dh, D): the part is the second axis, not the first",
)
def _(f):
    parts = _parts()
    for name, part, expected in zip("qkv", f(_fused(parts), H), parts):
        close(part, expected, what=name)


@law("zoo.split_heads", "a bias is split like its matrix", hint="do not fix the number of axes")
def _(f):
    parts = [part[:, 0] for part in _parts()]
    for name, part, expected in zip("qkv", f(_fused(parts), H), parts):
        close(part, expected, what=name)


def _pairs(x, angle):  # rotate pairs (2i, 2i + 1)
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.view_as_real(z).flatten(-2)


def _halves(x, angle):  # rotate pairs (i, i + half)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)


@law("zoo.pairs_to_halves", "rows are reordered, none is lost", hint="only move rows, within each head")
def _(f):
    weight = torch.randn(H * WIDTH, D)
    moved = f(weight, H)
    assert moved.shape == weight.shape, f"shape {tuple(moved.shape)}, expected {tuple(weight.shape)}"
    for h in range(H):
        rows = slice(h * WIDTH, (h + 1) * WIDTH)
        assert {tuple(r) for r in moved[rows].tolist()} == {tuple(r) for r in weight[rows].tolist()}, (
            f"head {h} does not hold its own rows"
        )


@law(
    "zoo.pairs_to_halves",
    "row 2i goes to i, row 2i + 1 to i + Dh / 2",
    hint="view(H, Dh / 2, 2, D), then swap the two middle axes",
)
def _(f):
    close(f(torch.arange(6.0)[:, None], 1), torch.tensor([0.0, 2, 4, 1, 3, 5])[:, None])


@law(
    "zoo.pairs_to_halves",
    "scores do not change when the rotation changes its layout",
    hint="the same reordering for q and k leaves every product as it was",
)
def _(f):
    wq, wk = torch.randn(2, H * WIDTH, D).double()
    x, y = torch.randn(2, D).double()
    angles = torch.tensor([[0.3, 0.7], [1.1, 2.3]]).double()
    before = _pairs((wq @ x).view(H, WIDTH), angles[0]) * _pairs((wk @ y).view(H, WIDTH), angles[1])
    q, k = (f(w, H) for w in (wq, wk))
    after = _halves((q @ x).view(H, WIDTH), angles[0]) * _halves((k @ y).view(H, WIDTH), angles[1])
    close(after.sum(-1), before.sum(-1), rtol=1e-9, atol=1e-9, what="score")


@law("zoo.unpack_int4", "twice as many columns, from -8 to 7", hint="two numbers per byte, two's complement")
def _(f):
    numbers = f(torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).view(16, 16))
    assert tuple(numbers.shape) == (16, 32), f"shape {tuple(numbers.shape)}, expected (16, 32)"
    assert (int(numbers.min()), int(numbers.max())) == (-8, 7), f"from {numbers.min()} to {numbers.max()}"


@law("zoo.unpack_int4", "the even column is in the high half", hint="0x21 is 2, then 1")
def _(f):
    got = f(torch.tensor([[0x21]], dtype=torch.int8)).tolist()
    assert got == [[2, 1]], f"0x21 gives {got}, expected [[2, 1]]"


@law("zoo.unpack_int4", "negative numbers in either half", hint="0xF is -1: extend the sign of four bits")
def _(f):
    for byte, expected in (
        (0x1F, [1, -1]),
        (-15, [-1, 1]),
        (-1, [-1, -1]),
        (-120, [-8, -8]),
        (0x78, [7, -8]),
    ):
        got = f(torch.tensor([[byte]], dtype=torch.int8)).tolist()
        assert got == [expected], f"{byte & 255:#04x} gives {got}, expected {[expected]}"


GMASK, MASK, SOP = 91, 90, 94


@law(
    "zoo.glm_positions",
    "the second position is 0 before sop, and sop has 1",
    hint="c is the index of sop; t - c + 1 from there on",
)
def _(f):
    _, second = f([5, 6, GMASK, SOP, 7, 8], GMASK, MASK, SOP)
    assert list(second) == [0, 0, 0, 1, 2, 3], f"second positions {list(second)}"


@law("zoo.glm_positions", "the first counts, and stays at the blank from sop on", hint="the index of gMASK")
def _(f):
    first, _ = f([5, 6, GMASK, SOP, 7, 8], GMASK, MASK, SOP)
    assert list(first) == [0, 1, 2, 2, 2, 2], f"first positions {list(first)}"


@law(
    "zoo.glm_positions", "the blank may stand in the middle", hint="it is where the mask token is, not c - 1"
)
def _(f):
    first, second = f([5, MASK, 6, 7, SOP, 8], GMASK, MASK, SOP)
    assert list(first) == [0, 1, 2, 3, 1, 1], f"first positions {list(first)}"
    assert list(second) == [0, 0, 0, 0, 1, 2], f"second positions {list(second)}"


@law(
    "zoo.glm_positions",
    "gMASK is the blank where there is one, even behind a MASK",
    hint="look for gMASK first",
)
def _(f):
    first, _ = f([5, MASK, 6, GMASK, SOP, 8], GMASK, MASK, SOP)
    assert list(first) == [0, 1, 2, 3, 3, 3], f"first positions {list(first)}"


@law("zoo.inside", "a plain name is fine", hint="return folder / name")
def _(f):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        (folder / "model-00001-of-00002.safetensors").touch()
        got = Path(f(folder, "model-00001-of-00002.safetensors"))
        assert got.resolve() == folder / "model-00001-of-00002.safetensors", f"got {got}"


def _refuses(f, folder, name):
    try:
        f(folder, name)
    except (ValueError, MiniLLMError):
        return
    raise AssertionError(f"{name!r} was accepted")


@law("zoo.inside", "no way up, no absolute path", hint="a name with a separator is not a name")
def _(f):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        (folder / "sub").mkdir(parents=True)
        (Path(name) / "outside.bin").touch()
        for bad in ("../outside.bin", str(Path(name) / "outside.bin"), "sub/../../outside.bin", "..", ""):
            _refuses(f, folder, bad)


@law(
    "zoo.inside", "no sibling that merely begins alike", hint="compare folders, not the beginnings of strings"
)
def _(f):
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "model-evil").mkdir()
        (Path(name) / "model").mkdir()
        (Path(name) / "model-evil" / "x.bin").touch()
        _refuses(f, Path(name) / "model", "../model-evil/x.bin")


@law("zoo.inside", "no link that leads out", hint="resolve the path before you look where it is")
def _(f):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        folder.mkdir()
        (Path(name) / "outside.bin").touch()
        (folder / "x.bin").symlink_to(Path(name) / "outside.bin")
        _refuses(f, folder, "x.bin")
