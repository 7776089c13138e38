import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import swiglu_reference
from tolerances import assert_close, assert_low_precision
from torch.nn import functional as F

from minillm import mlp
from minillm.check import check, laws


def swiglu(x, w_gate, w_up, w_down):
    weights = {"w_gate.weight": w_gate, "w_up.weight": w_up, "w_down.weight": w_down}
    return torch.func.functional_call(mlp.SwiGLU(x.shape[-1], len(w_gate)), weights, (x,))


class LeanGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


SOLUTIONS = {
    "mlp.swish": F.silu,
    "mlp.swiglu": swiglu,
    "mlp.hidden_dim": lambda dim, multiplier, multiple_of: mlp.swiglu_hidden_dim(
        dim, multiplier=multiplier, multiple_of=multiple_of
    ),
    "mlp.lean_gate": LeanGate.apply,
}


@pytest.mark.parametrize(
    ("exercise", "law"), [(name, law) for name in SOLUTIONS for law in laws(name)], ids=str
)
def test_the_package_obeys_its_laws(exercise, law):
    law(SOLUTIONS[exercise])


def ceil_to(width, multiple):
    return multiple * math.ceil(width / multiple)


@pytest.mark.parametrize(
    ("exercise", "wrong", "law"),
    [
        ("mlp.swish", torch.sigmoid, "swish(0) is 0"),
        ("mlp.swish", F.gelu, "equals x times its sigmoid"),
        ("mlp.swish", lambda x: x * x.exp() / (1 + x.exp()), "far from zero it is x or nothing, never NaN"),
        ("mlp.swish", lambda x: x * x.detach().sigmoid(), "the gradient is right"),
        ("mlp.swish", lambda x: F.silu(x.float()) if x.dtype == torch.bfloat16 else F.silu(x), "bfloat16 goes in and comes out"),
        ("mlp.swiglu", lambda x, g, u, d: F.silu(x @ g.T) * (x @ u.T), "shape in is shape out"),
        ("mlp.swiglu", lambda x, g, u, d: ((x @ g.T).sigmoid() * (x @ u.T)) @ d.T, "a gate at zero lets nothing through"),
        ("mlp.swiglu", lambda x, g, u, d: swiglu(x, u, g, d), "equals the formula"),
        ("mlp.swiglu", lambda x, g, u, d: swiglu(x.detach(), g, u, d), "the gradient is right"),
        ("mlp.hidden_dim", lambda d, m, k: int(m * 8 * d / 3), "a multiple of 256"),
        ("mlp.hidden_dim", lambda d, m, k: k * int(m * 8 * d / 3 // k), "LLaMA 7B to 65B"),
        ("mlp.hidden_dim", lambda d, m, k: k * (int(m * int(8 * d / 3)) // k + 1), "an exact multiple is not rounded further"),
        ("mlp.hidden_dim", lambda d, m, k: ceil_to(int(8 * d / 3), k), "LLaMA-2-70B"),
        ("mlp.hidden_dim", lambda d, m, k: float(ceil_to(int(m * int(8 * d / 3)), k)), "the width of ChatGLM2 and Baichuan-13B"),
        ("mlp.lean_gate", lambda g, u: g * u, "equals swish(gate) times up"),
        ("mlp.lean_gate", lambda g, u: F.silu(g.detach()) * u, "both gradients are right"),
        ("mlp.lean_gate", lambda g, u: F.silu(g) * u, "saves two tensors and no more"),
    ],
)  # fmt: skip
def test_check_names_the_broken_law(exercise, wrong, law):
    report = check(exercise, wrong, quiet=True)
    broken = [rule.name for rule, reason in report.reasons.items() if reason is not None]
    assert broken[0] == law


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (0, 6)])
@pytest.mark.parametrize("bias", [False, True])
def test_swiglu_equals_the_slow_reference(shape, dtype, bias):
    ours, x = mlp.SwiGLU(6, 10, bias=bias).to(dtype), torch.randn(shape, dtype=dtype)
    assert_close(ours(x), swiglu_reference(x, ours.w_gate, ours.w_up, ours.w_down))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_equals_llama(dtype):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    config = LlamaConfig(hidden_size=32, intermediate_size=88, hidden_act="silu", mlp_bias=False)
    theirs, ours = LlamaMLP(config).to(dtype), mlp.SwiGLU(32, 88).to(dtype)
    names = {"w_gate": "gate_proj", "w_up": "up_proj", "w_down": "down_proj"}
    ours.load_state_dict({f"{n}.weight": getattr(theirs, o).weight.detach() for n, o in names.items()})
    x = 3 * torch.randn(2, 5, 32, dtype=dtype)
    assert_close(ours(x), theirs(x))


def test_gelu_tanh_is_the_published_formula_and_not_the_exact_gelu():
    from transformers.activations import NewGELUActivation

    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    assert_close(mlp.gelu_tanh(x), NewGELUActivation()(x))
    assert 4e-4 < (mlp.gelu_tanh(x) - F.gelu(x)).abs().max() < 5e-4


def test_mlp_uses_its_activation_and_biases():
    x = torch.randn(4, 6)
    for activation in (mlp.gelu_tanh, F.relu):
        module = mlp.MLP(6, 10, activation=activation, bias=True)
        up = x @ module.w_up.weight.T + module.w_up.bias
        assert_close(module(x), activation(up) @ module.w_down.weight.T + module.w_down.bias)
    plain = mlp.MLP(6, 10)
    assert_close(plain(x), mlp.gelu_tanh(x @ plain.w_up.weight.T) @ plain.w_down.weight.T)


def test_modules_hold_what_they_say():
    shapes = lambda module: {name: tuple(p.shape) for name, p in module.named_parameters()}  # noqa: E731
    assert shapes(mlp.MLP(4, 8)) == {"w_up.weight": (8, 4), "w_down.weight": (4, 8)}
    assert shapes(mlp.SwiGLU(4, 8)) == {
        "w_gate.weight": (8, 4),
        "w_up.weight": (8, 4),
        "w_down.weight": (4, 8),
    }
    assert len(shapes(mlp.MLP(4, 8, bias=True))) == 4
    assert len(shapes(mlp.SwiGLU(4, 8, bias=True))) == 6


def test_gradcheck():
    for module in (mlp.SwiGLU(3, 5), mlp.MLP(3, 5), mlp.MLP(3, 5, activation=F.silu, bias=True)):
        x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(module.double(), (x,))


def test_low_precision_errs_like_the_naive_one():
    x, w_gate, w_up, w_down = (torch.randn(s) for s in ((9, 16), (24, 16), (24, 16), (16, 24)))
    low = [t.bfloat16() for t in (x, w_gate, w_up, w_down)]
    g, u = low[0] @ low[1].T, low[0] @ low[2].T
    naive = ((g * torch.sigmoid(g)) * u) @ low[3].T
    exact = swiglu(*(t.double() for t in low))
    assert_low_precision(swiglu(*low), naive, exact)


@pytest.mark.parametrize("phi", [F.relu, F.gelu, F.silu, mlp.gelu_tanh])
def test_every_activation_is_half_of_x_plus_something_even(phi):
    x = torch.randn(100, dtype=torch.float64)
    assert_close(phi(x) - phi(-x), x)


def test_swiglu_is_linear_in_w_up_and_not_in_w_gate():
    module, x = mlp.SwiGLU(6, 10).double(), torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        before = module(x)
        module.w_up.weight *= -3
        assert_close(module(x), -3 * before)
        module.w_gate.weight *= -3
        assert not torch.allclose(module(x), 9 * before, rtol=1e-2)


def test_tokens_do_not_mix():
    x, order = torch.randn(2, 7, 6, dtype=torch.float64), torch.randperm(7)
    for module in (mlp.SwiGLU(6, 10).double(), mlp.MLP(6, 10).double()):
        assert_close(module(x[:, order]), module(x)[:, order])


@given(
    dim=st.integers(1, 20_000),
    multiplier=st.floats(0.1, 4),
    multiple_of=st.sampled_from([1, 32, 128, 256, 4096]),
)
def test_hidden_dim_is_the_next_multiple(dim, multiplier, multiple_of):
    width = mlp.swiglu_hidden_dim(dim, multiplier=multiplier, multiple_of=multiple_of)
    wanted = int(multiplier * int(8 * dim / 3))
    assert width % multiple_of == 0
    assert wanted <= width < wanted + multiple_of


def test_hidden_dim_keeps_the_parameters_of_the_plain_mlp():
    plain, gated = mlp.MLP(96, 4 * 96), mlp.SwiGLU(96, mlp.swiglu_hidden_dim(96))
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in gated.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "at least 1.*got 0, 256 and 1.0"),
        ({"dim": 64, "multiple_of": 0}, "at least 1.*got 64, 0"),
        ({"dim": 64, "multiplier": -1.0}, "multiplier above 0.*and -1.0"),
        ({"dim": 64, "multiplier": float("nan")}, "multiplier above 0.*and nan"),
    ],
)
def test_hidden_dim_names_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        mlp.swiglu_hidden_dim(**arguments)
