import pytest
import torch
from references import rms_norm_reference
from tolerances import assert_close, assert_low_precision
from torch.nn import functional as F

from minillm import norm
from minillm.check import check, laws

SOLUTIONS = {
    "norm.rms_norm": norm.rms_norm,
    "norm.layer_norm": norm.layer_norm,
    "norm.rms_norm_grad": lambda grad, x, weight, eps: torch.autograd.grad(
        norm.rms_norm(x := x.detach().requires_grad_(), weight, eps), x, grad
    )[0],
    "norm.fold": lambda weight, matrix: matrix * weight,
}


@pytest.mark.parametrize(
    ("exercise", "law"), [(name, law) for name in SOLUTIONS for law in laws(name)], ids=str
)
def test_the_package_obeys_its_laws(exercise, law):
    law(SOLUTIONS[exercise])


def rms(x, weight, eps, dim=-1, outside=False, wide=True):
    big = x.to(torch.promote_types(x.dtype, torch.float32)) if wide else x
    ms = big.square().mean(dim, keepdim=True)
    return (big / (ms.sqrt() + eps if outside else (ms + eps).sqrt())).to(x.dtype) * weight


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        (lambda x, w, eps: None, "a vector of ones stays a vector of ones"),
        (lambda x, w, eps: x * w, "equals the formula"),
        (lambda x, w, eps: rms(x, w, eps, outside=True), "eps is inside the root"),
        (lambda x, w, eps: rms(x.detach(), w, eps), "the gradient is right"),
        (lambda x, w, eps: rms(x, w, eps, wide=False), "float16 does not overflow"),
        (
            lambda x, w, eps: rms(x, w, eps).float() if x.dtype == torch.bfloat16 else rms(x, w, eps),
            "bfloat16 goes in and comes out",
        ),
        (lambda x, w, eps: rms(x, w, eps, dim=1) if x.dim() == 3 else rms(x, w, eps), "equals the formula"),
    ],
)
def test_check_names_the_broken_law(wrong, law):
    report = check("norm.rms_norm", wrong, quiet=True)
    broken = [rule.name for rule, reason in report.reasons.items() if reason is not None]
    assert broken[0] == law


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (0, 7)])
def test_rms_norm_equals_the_slow_reference_and_torch(shape, dtype):
    x, weight = torch.randn(shape, dtype=dtype), torch.rand(7, dtype=dtype)
    y = norm.rms_norm(x, weight, 1e-6)
    assert_close(y, F.rms_norm(x, (7,), weight, 1e-6))
    if x.numel():
        assert_close(y, rms_norm_reference(x, weight, 1e-6))


def test_rms_norm_equals_llama():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = norm.RMSNorm(64, 1e-6).to(dtype), LlamaRMSNorm(64, 1e-6).to(dtype)
        ours.weight.data.uniform_()
        theirs.load_state_dict(ours.state_dict())
        x = 10 * torch.randn(5, 64, dtype=dtype)
        assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_forward_and_backward(dtype):
    x64, w64, g64 = torch.randn(6, 32).double(), torch.rand(32).double(), torch.randn(6, 32).double()

    def run(f, dtype):
        x, w = x64.to(dtype).requires_grad_(), w64.to(dtype).requires_grad_()
        y = f(x, w, 1e-5)
        return y, *torch.autograd.grad(y, (x, w), g64.to(dtype))

    naive = lambda x, w, eps: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w  # noqa: E731
    for ours, low, exact in zip(run(norm.rms_norm, dtype), run(naive, dtype), run(naive, torch.float64)):
        assert ours.dtype == dtype
        assert_low_precision(ours, low, exact)


def test_gradcheck_over_one_and_many_axes():
    for shape in ((5,), (2, 5), (2, 3, 5)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        weight = torch.rand(5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(norm.rms_norm, (x, weight))


def test_scale_invariance_and_shift():
    x, one = torch.randn(4, 16, dtype=torch.float64), torch.ones(16, dtype=torch.float64)
    assert_close(norm.rms_norm(9 * x, one, 0.0), norm.rms_norm(x, one, 0.0))
    assert_close(norm.layer_norm(9 * x + 2, one, eps=0.0), norm.layer_norm(x, one, eps=0.0))
    assert not torch.allclose(norm.rms_norm(x + 2, one, 0.0), norm.rms_norm(x, one, 0.0))


def test_modules_hold_what_they_say():
    assert [name for name, _ in norm.RMSNorm(8).named_parameters()] == ["weight"]
    assert [name for name, _ in norm.LayerNorm(8).named_parameters()] == ["weight", "bias"]
    assert [name for name, _ in norm.LayerNorm(8, bias=False).named_parameters()] == ["weight"]
    layer, x = norm.LayerNorm(8, 1e-3), torch.randn(3, 8)
    assert_close(layer(x), F.layer_norm(x, (8,), eps=1e-3))


def test_check_names_unknown_exercises():
    with pytest.raises(ValueError, match="no exercises for chapter 'nothing'"):
        laws("nothing.at_all")
    with pytest.raises(ValueError, match=r"no exercise 'norm.x'; chapter 'norm' has .*norm.rms_norm"):
        laws("norm.x")
