"""Laws of chapter 09."""

import math

import torch
from torch.nn import functional as F

from minillm.check import close, law


@law("mlp.swish", "swish(0) is 0", hint="x times the sigmoid of x")
def _(f):
    close(f(torch.zeros(3)), torch.zeros(3))


@law("mlp.swish", "equals x times its sigmoid", hint="x / (1 + exp(-x))")
def _(f):
    x = 3 * torch.randn(2, 3, 16)
    close(f(x), (x.double() / (1 + (-x.double()).exp())).float())


@law("mlp.swish", "far from zero it is x or nothing, never NaN", hint="exp overflows: use torch.sigmoid")
def _(f):
    close(f(torch.tensor([-1e4, -200.0, 200.0, 1e4])), torch.tensor([0.0, 0.0, 200.0, 1e4]))


@law("mlp.swish", "the gradient is right", hint="keep every step differentiable, and write nothing in place")
def _(f):
    x = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, (x,), raise_exception=False), (
        "the gradient differs from finite differences"
    )


@law("mlp.swish", "bfloat16 goes in and comes out", hint="the result has the dtype of the input")
def _(f):
    x = torch.randn(64).bfloat16()
    close(f(x), F.silu(x.float()).bfloat16(), rtol=2e-2, atol=2e-2)


def _weights(dim, hidden, dtype=torch.float32):
    return (torch.randn(shape, dtype=dtype) for shape in ((hidden, dim), (hidden, dim), (dim, hidden)))


@law(
    "mlp.swiglu",
    "shape in is shape out",
    hint="w_gate and w_up are (F, D), w_down is (D, F), as nn.Linear stores them",
)
def _(f):
    for shape in ((8,), (5, 8), (2, 3, 8)):
        out = f(torch.randn(shape), *_weights(8, 12))
        assert out.shape == shape, f"shape {tuple(out.shape)}, expected {shape}"


@law("mlp.swiglu", "a gate at zero lets nothing through", hint="swish(0) = 0, whatever w_up says")
def _(f):
    x, (_, w_up, w_down) = torch.randn(5, 8), _weights(8, 12)
    close(f(x, torch.zeros(12, 8), w_up, w_down), torch.zeros(5, 8))


@law(
    "mlp.swiglu",
    "equals the formula",
    hint="w_down @ (swish(w_gate @ x) * (w_up @ x)): swish on the gate only",
)
def _(f):
    x, (w_gate, w_up, w_down) = torch.randn(2, 3, 8), _weights(8, 12)
    gate = x.double() @ w_gate.double().T
    expected = (gate * gate.sigmoid() * (x.double() @ w_up.double().T)) @ w_down.double().T
    close(f(x, w_gate, w_up, w_down), expected.float(), rtol=1e-4, atol=1e-4)


@law("mlp.swiglu", "the gradient is right", hint="keep every step differentiable")
def _(f):
    args = [torch.randn(2, 3, dtype=torch.float64), *_weights(3, 4, torch.float64)]
    assert torch.autograd.gradcheck(f, [a.requires_grad_() for a in args], raise_exception=False), (
        "the gradient differs from finite differences"
    )


@law("mlp.hidden_dim", "a multiple of 256", hint="round up: multiple * ceil(width / multiple)")
def _(f):
    for dim in (512, 1000, 4096):
        assert f(dim, 1.0, 256) % 256 == 0, f"dim {dim}: {f(dim, 1.0, 256)} is no multiple of 256"


@law("mlp.hidden_dim", "LLaMA 7B to 65B", hint="two thirds of 4 dim, cut to a whole number, then rounded up")
def _(f):
    for dim, expected in ((4096, 11008), (5120, 13824), (6656, 17920), (8192, 22016)):
        assert f(dim, 1.0, 256) == expected, f"dim {dim}: {f(dim, 1.0, 256)}, expected {expected}"


@law(
    "mlp.hidden_dim",
    "an exact multiple is not rounded further",
    hint="round up only where there is a remainder",
)
def _(f):
    assert f(96, 1.0, 256) == 256, f"dim 96: {f(96, 1.0, 256)}, expected 256"


@law(
    "mlp.hidden_dim",
    "LLaMA-2-70B",
    hint="multiply by 1.3 and cut to a whole number before rounding up to 4096",
)
def _(f):
    assert f(8192, 1.3, 4096) == 28672, f"dim 8192, 1.3, 4096: {f(8192, 1.3, 4096)}, expected 28672"


@law(
    "mlp.hidden_dim",
    "the width of ChatGLM2 and Baichuan-13B",
    hint="whole numbers at each step, as LLaMA's code does",
)
def _(f):
    for dim, multiplier in ((5120, 1.0), (4096, 1.25)):
        width = f(dim, multiplier, 128)
        assert width == 13696, f"dim {dim}, {multiplier}, 128: {width}, expected 13696"
    assert isinstance(f(5120, 1.0, 128), int), "a width is an int"


@law("mlp.lean_gate", "equals swish(gate) times up", hint="F.silu(gate) * up")
def _(f):
    gate, up = torch.randn(5, 8), torch.randn(5, 8)
    close(f(gate, up), F.silu(gate) * up)


@law(
    "mlp.lean_gate",
    "both gradients are right",
    hint="with s = sigmoid(gate): d gate = grad * up * (s + gate s (1 - s)), d up = grad * gate s",
)
def _(f):
    args = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(f, args, raise_exception=False), (
        "the gradient differs from finite differences"
    )


@law(
    "mlp.lean_gate",
    "saves two tensors and no more",
    hint="save only gate and up with ctx.save_for_backward, and compute swish(gate) again in backward",
)
def _(f):
    saved: dict[int, int] = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    # Two multiplications in front make gate and up tensors that nothing else would keep.
    a, b = (torch.randn(16, 16, requires_grad=True) for _ in range(2))
    gate, up = 2 * a, 3 * b
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = f(gate, up)
    assert out.requires_grad, "the result has no gradient"
    n = math.ceil(sum(saved.values()) / gate.numel())
    assert n <= 2, f"{n} tensors of the size of gate are kept for backward, expected 2"
