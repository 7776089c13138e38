"""Laws of chapter 08."""

import torch

from minillm.check import close, law


def _rms(x, weight, eps):
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@law(
    "norm.rms_norm",
    "a vector of ones stays a vector of ones",
    hint="divide by the root of the mean of the squares",
)
def _(f):
    close(f(torch.ones(2, 8), torch.ones(8), 0.0), torch.ones(2, 8))


@law(
    "norm.rms_norm",
    "equals the formula",
    hint="x / sqrt(mean(x²) + eps) * weight, the mean over the last axis",
)
def _(f):
    x, weight = 3 * torch.randn(2, 3, 16), torch.rand(16)
    close(f(x, weight, 1e-5), _rms(x, weight, 1e-5).float())


@law(
    "norm.rms_norm",
    "any number of leading axes",
    hint="use dim=-1 and keepdim=True, and no fixed number of axes",
)
def _(f):
    for shape in ((8,), (5, 8), (2, 3, 4, 8)):
        x = torch.randn(shape)
        close(f(x, torch.ones(8), 1e-5), _rms(x, torch.ones(8), 1e-5).float())


@law("norm.rms_norm", "eps is inside the root", hint="sqrt(mean square + eps), not sqrt(mean square) + eps")
def _(f):
    x = 0.01 * torch.randn(4, 8)
    close(f(x, torch.ones(8), 1e-2), _rms(x, torch.ones(8), 1e-2).float())


@law("norm.rms_norm", "a vector of zeros stays zero", hint="add eps before dividing")
def _(f):
    close(f(torch.zeros(2, 8), torch.ones(8), 1e-6), torch.zeros(2, 8))


@law("norm.rms_norm", "the gradient is right", hint="keep every step differentiable: no .data, no .item()")
def _(f):
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, weight: f(x, weight, 1e-5), (x, weight), raise_exception=False
    ), "the gradient differs from finite differences"


@law(
    "norm.rms_norm",
    "float16 does not overflow",
    hint="compute the squares in float32, then cast back to x.dtype",
)
def _(f):
    x = torch.full((2, 8), 300.0, dtype=torch.float16)
    close(f(x, torch.ones(8, dtype=torch.float16), 1e-5), torch.ones(2, 8, dtype=torch.float16), rtol=1e-2)


@law("norm.rms_norm", "bfloat16 goes in and comes out", hint="the result has the dtype of the input")
def _(f):
    x, weight = torch.randn(4, 64).bfloat16(), torch.ones(64).bfloat16()
    close(f(x, weight, 1e-5), _rms(x, weight, 1e-5).bfloat16(), rtol=2e-2, atol=2e-2)


@law(
    "norm.layer_norm",
    "equals torch's",
    hint="subtract the mean, divide by the root of the variance (over D, not D-1)",
)
def _(f):
    x, weight, bias = 3 * torch.randn(2, 3, 16) + 1, torch.rand(16), torch.randn(16)
    close(f(x, weight, bias, 1e-5), torch.nn.functional.layer_norm(x, (16,), weight, bias, 1e-5))


@law("norm.layer_norm", "eps is inside the root", hint="sqrt(variance + eps)")
def _(f):
    x, weight, bias = 0.01 * torch.randn(4, 8), torch.ones(8), torch.zeros(8)
    close(f(x, weight, bias, 1e-2), torch.nn.functional.layer_norm(x, (8,), weight, bias, 1e-2))


@law("norm.layer_norm", "the gradient is right", hint="keep every step differentiable")
def _(f):
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.rand(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *args: f(*args, 1e-5), (x, weight, bias), raise_exception=False), (
        "the gradient differs from finite differences"
    )


@law(
    "norm.rms_norm_grad", "is orthogonal to x when weight is 1 and eps 0", hint="remove the part along x_hat"
)
def _(f):
    x, grad = torch.randn(4, 8, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    along = (f(grad, x, torch.ones(8, dtype=torch.float64), 0.0) * x).sum(-1).abs().max().item()
    assert along < 1e-9, f"gradient · x = {along:.2g}, expected 0"


@law(
    "norm.rms_norm_grad", "equals autograd's", hint="r * (u - x_hat * mean(u * x_hat)) with u = grad * weight"
)
def _(f):
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    weight, grad = torch.rand(8, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    y = x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * weight
    (expected,) = torch.autograd.grad(y, x, grad)
    close(f(grad, x.detach(), weight, 1e-3), expected, rtol=1e-8, atol=1e-10)


@law("norm.fold", "the folded matrix gives the same output", hint="input channel i is column i of the matrix")
def _(f):
    x, weight, matrix = torch.randn(4, 8), torch.rand(8), torch.randn(3, 8)
    normed = _rms(x, torch.ones(8), 1e-5).float()
    close(normed @ f(weight, matrix).T, (normed * weight) @ matrix.T)
