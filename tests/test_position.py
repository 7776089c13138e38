import copy
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import rope_reference
from tolerances import assert_close, assert_low_precision

from minillm import position as p
from minillm.check import check, laws


def rope(x, positions, theta, **options):
    encoding = p.RoPE(x.shape[-1], theta=theta, **options)
    return encoding(x, encoding.angles(positions))


def alibi_bias(slopes, n_queries, n_keys):
    distance = torch.arange(n_keys - n_queries, n_keys)[:, None] - torch.arange(n_keys)
    return -slopes[:, None, None] * distance


def half_split_weight(weight, n_heads):
    return weight.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


SOLUTIONS = {
    "position.rope": rope,
    "position.alibi_slopes": p.alibi_slopes,
    "position.alibi_bias": alibi_bias,
    "position.half_split_weight": half_split_weight,
}


@pytest.mark.parametrize(
    ("exercise", "law"), [(name, law) for name in SOLUTIONS for law in laws(name)], ids=str
)
def test_the_package_obeys_its_laws(exercise, law):
    law(SOLUTIONS[exercise])


def half_split(x, positions, theta, *, offset=0, sign=1.0, dtype=torch.float32, power=None):
    half = x.shape[-1] // 2
    frequencies = (theta ** (-torch.arange(half) / (half if power is None else power))).to(dtype).float()
    phase = (positions + offset)[:, None, :, None].float() * frequencies
    cos, sin = phase.cos().to(x.dtype), phase.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + sign * a * sin), dim=-1)


def absolute(x, positions, theta):
    """Right for small positions, and then counts no further."""
    return rope(x, positions.clamp(max=100), theta)


def first_slopes(n_heads):
    return 2.0 ** (-8 * torch.arange(1, n_heads + 1) / n_heads)


@pytest.mark.parametrize(
    ("exercise", "wrong", "law"),
    [
        ("position.rope", lambda x, n, t: half_split(x, n, t, offset=1), "position 0 changes nothing"),
        ("position.rope", lambda x, n, t: rope(x, -n, t), "position 1 turns a pair by one radian"),
        ("position.rope", lambda x, n, t: half_split(x, n, t, sign=-1.0), "position 1 turns a pair by one radian"),
        ("position.rope", lambda x, n, t: x * (1 + n[:, None, :, None]) if x.shape[-1] > 2 else rope(x, n, t), "lengths stay"),
        ("position.rope", lambda x, n, t: rope(x, n, t, interleaved=True), "the pairs are (i, i + Dh/2)"),
        ("position.rope", lambda x, n, t: rope(x, n, 10000.0), "equals the formula"),
        ("position.rope", lambda x, n, t: half_split(x, n, t, power=x.shape[-1]), "equals the formula"),
        ("position.rope", absolute, "only the distance counts"),
        ("position.rope", lambda x, n, t: rope(x.detach(), n, t), "the gradient is right"),
        ("position.rope", lambda x, n, t: half_split(x, n, t, dtype=x.dtype), "in bfloat16 the angles are not rounded"),
        ("position.alibi_slopes", lambda n: 2.0 ** -torch.arange(n), "8 heads: 1/2, 1/4, … 1/256"),
        ("position.alibi_slopes", lambda n: 0.5 ** torch.arange(1.0, n + 1), "16 heads: from 2^(-1/2) to 2^-8"),
        ("position.alibi_slopes", lambda n: first_slopes(2 ** (n.bit_length() - 1)), "one slope per head"),
        ("position.alibi_slopes", first_slopes, "40 heads, as in Baichuan-13B"),
        ("position.alibi_bias", lambda s, t, n: alibi_bias(s, t, n)[0], "shape H, T, S"),
        ("position.alibi_bias", lambda s, t, n: alibi_bias(s, t, n) - 1, "0 for a token itself"),
        ("position.alibi_bias", lambda s, t, n: -alibi_bias(s, t, n), "minus slope times distance"),
        ("position.alibi_bias", lambda s, t, n: alibi_bias(s, n, n)[:, :t], "with a cache the queries are the last T columns"),
        ("position.half_split_weight", lambda w, h: w.repeat(2, 1), "keeps every row"),
        ("position.half_split_weight", lambda w, h: half_split_weight(w, 1), "heads do not mix"),
        ("position.half_split_weight", lambda w, h: w, "the scores stay"),
    ],
)  # fmt: skip
def test_check_names_the_broken_law(exercise, wrong, law):
    report = check(exercise, wrong, quiet=True)
    broken = [rule.name for rule, reason in report.reasons.items() if reason is not None]
    assert broken[0] == law


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [2, 4, 8])
def test_rope_equals_the_slow_reference(dtype, interleaved, rotary_dim):
    encoding = p.RoPE(8, rotary_dim=rotary_dim, interleaved=interleaved, theta=500.0, scale=3.0)
    x, positions = torch.randn(2, 3, 5, 8, dtype=dtype), torch.randint(0, 60, (2, 5))
    expected = rope_reference(x, positions / 3.0, rotary_dim, 500.0, interleaved)
    torch.testing.assert_close(encoding(x, encoding.angles(positions)), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_split_equals_llama(dtype):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_theta=10000.0)
    x, positions = torch.randn(2, 4, 7, 16, dtype=dtype), torch.randint(0, 4000, (2, 7))
    cos, sin = LlamaRotaryEmbedding(config)(x, positions)
    ours = p.RoPE(16)
    angles = ours.angles(positions, dtype)
    assert torch.equal(angles.cos, cos[:, None])  # to the last bit
    assert torch.equal(angles.sin.abs(), sin[:, None].abs())
    assert_close(ours(x, angles), apply_rotary_pos_emb(x, x, cos, sin)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 16.0])
def test_interleaved_and_partial_equals_glm(dtype, factor):
    from transformers import GlmConfig
    from transformers.models.glm.modeling_glm import GlmRotaryEmbedding, apply_rotary_pos_emb

    scaling = {"rope_type": "default"} if factor == 1 else {"rope_type": "linear", "factor": factor}
    config = GlmConfig(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=16,
        rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 0.5, **scaling},
    )
    x, positions = torch.randn(2, 4, 7, 16, dtype=dtype), torch.randint(0, 4000, (2, 7))
    cos, sin = GlmRotaryEmbedding(config)(x, positions)
    if cos.shape[-1] == 16:  # transformers' linear rule ignores the partial factor: give it the frequencies
        phase = positions[..., None].float() * (p.rope_frequencies(8) / factor)
        cos, sin = (torch.cat((f(phase), f(phase)), -1).to(dtype) for f in (torch.cos, torch.sin))
    ours = p.RoPE(16, rotary_dim=8, interleaved=True, scale=factor)
    assert_close(ours(x, ours.angles(positions)), apply_rotary_pos_emb(x, x, cos, sin)[0])


def test_rope_2d_equals_two_ropes_with_frequencies_rounded_to_float16():
    x, positions = torch.randn(2, 3, 5, 16), torch.randint(0, 2000, (2, 2, 5))
    ours = p.RoPE2D(16)
    half = p.RoPE(8, frequencies=(1 / 10000 ** (torch.arange(0, 8, 2) / 8)).half().float())
    parts = [half(part, half.angles(positions[:, n])) for n, part in enumerate(x.chunk(2, -1))]
    assert_close(ours(x, ours.angles(positions)), torch.cat(parts, -1))
    assert not torch.equal(ours.frequencies, p.rope_frequencies(8))


def test_alibi_slopes_equal_the_published_code():
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    for n_heads in (1, 2, 8, 12, 32, 40, 52, 64):
        theirs = build_alibi_tensor(torch.ones(1, 2), n_heads, torch.float32)[:, 0, 1]
        assert_close(p.alibi_slopes(n_heads), theirs)


def test_alibi_rotates_nothing():
    x, alibi = torch.randn(1, 4, 3, 8), p.ALiBi(4)
    assert alibi.angles(torch.arange(3)[None]) is None
    assert alibi(x, None) is x
    assert torch.equal(alibi.slopes, p.alibi_slopes(4))
    assert p.RoPE.slopes is None
    assert p.RoPE2D.slopes is None


every_layout = pytest.mark.parametrize(
    "encoding",
    [p.RoPE(8), p.RoPE(8, interleaved=True), p.RoPE(8, rotary_dim=4, interleaved=True), p.RoPE2D(8)],
)


def some_positions(encoding, *shape, low=0, high=50):
    two = (shape[0], 2, shape[1]) if isinstance(encoding, p.RoPE2D) else shape
    return torch.randint(low, high, two)


@every_layout
@settings(max_examples=25, deadline=None)
@given(m=st.integers(0, 200), n=st.integers(0, 200), shift=st.integers(0, 2000))
def test_only_the_distance_counts(encoding, m, n, shift):
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    at = lambda i: torch.full((1, 2, 1) if isinstance(encoding, p.RoPE2D) else (1, 1), i)  # noqa: E731
    score = lambda a, b: (encoding(q, encoding.angles(at(a))) * encoding(k, encoding.angles(at(b)))).sum()  # noqa: E731
    assert abs(score(m, n) - score(m + shift, n + shift)) < 2e-3


@every_layout
def test_lengths_stay_and_zero_is_still(encoding):
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    positions = some_positions(encoding, 2, 5)
    torch.testing.assert_close(
        encoding(x, encoding.angles(positions)).norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0
    )
    assert torch.equal(encoding(x, encoding.angles(torch.zeros_like(positions))), x)


@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_written_gradient_equals_autograds(encoding, dtype):
    positions = some_positions(encoding, 2, 5)
    angles = encoding.angles(positions, dtype)
    x, grad = torch.randn(2, 5, 3, 8, dtype=dtype), torch.randn(2, 3, 5, 8, dtype=dtype)
    heads = x.transpose(1, 2).requires_grad_()  # as a projection hands them over
    (ours,) = torch.autograd.grad(encoding(heads, angles), heads, grad)
    leaves = p.Angles(
        *(a.clone().requires_grad_() for a in angles)
    )  # angles with a gradient go through autograd
    (auto,) = torch.autograd.grad(encoding(heads, leaves), heads, grad)
    assert_close(ours, auto)


@every_layout
def test_gradcheck_once_and_twice(encoding):
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    angles = encoding.angles(some_positions(encoding, 1, 3))
    assert torch.autograd.gradcheck(lambda x: encoding(x, angles), (x,))
    assert torch.autograd.gradgradcheck(lambda x: encoding(x, angles), (x,))


def test_the_angles_keep_a_gradient_that_they_ask_for():
    frequencies = p.rope_frequencies(8).requires_grad_()
    x = torch.randn(1, 1, 3, 8, requires_grad=True)
    phase = torch.arange(3.0)[:, None] * frequencies
    p.rotate(x, p.half_split_angles(phase), p.rotate_half_split).sum().backward()
    assert frequencies.grad is not None
    assert frequencies.grad.abs().sum() > 0


@every_layout
def test_no_tensor_of_the_size_of_x_is_kept(encoding):
    kept = []
    x = torch.randn(4, 16, 8, 8, requires_grad=True)
    angles = encoding.angles(some_positions(encoding, 1, 8))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        encoding(x, angles)
    assert max(kept) < x.numel() / 16


@every_layout
def test_low_precision_errs_like_the_naive_one(encoding):
    positions = some_positions(encoding, 2, 5, low=3000, high=30000)
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(2, 3, 5, 8).to(dtype)
        exact = encoding(x.double(), encoding.angles(positions))
        naive = encoding(x.float(), encoding.angles(positions)).to(dtype)  # rounded once, at the end
        ours = encoding(x, encoding.angles(positions, dtype))
        assert ours.dtype == dtype
        assert_low_precision(ours, naive, exact, floor=2e-2 if dtype == torch.bfloat16 else 2e-3)


@every_layout
def test_the_angles_of_one_position_are_those_of_the_whole(encoding):
    positions = some_positions(encoding, 2, 9, high=5000)
    whole, last = encoding.angles(positions), encoding.angles(positions[..., 6:])
    for a, b in zip(whole, last):
        assert torch.equal(a[:, :, 6:], b)


def test_angles_are_good_to_a_hundredth_of_a_radian_at_32k():
    positions = torch.arange(32000, 32768)[None]
    exact = positions[0, :, None].double() * 10000.0 ** (-torch.arange(0, 128, 2).double() / 128)
    ours = p.RoPE(128, interleaved=True).angles(positions)
    assert (ours.cos[0, 0].double() - exact.cos()).abs().max() < 5e-3
    assert (ours.sin[0, 0].double() - exact.sin()).abs().max() < 5e-3


def test_scale_divides_positions():
    positions = torch.arange(0, 64, 4)[None]
    wide, narrow = p.RoPE(8, scale=4.0).angles(positions), p.RoPE(8).angles(positions // 4)
    assert all(torch.equal(a, b) for a, b in zip(wide, narrow))


def test_given_frequencies_are_used():
    frequencies = torch.tensor([0.5, 0.25, 0.125, 0.0])
    x = torch.randn(1, 1, 3, 8, dtype=torch.float64)
    encoding = p.RoPE(8, frequencies=frequencies, interleaved=True)
    angles = encoding.angles(torch.arange(3)[None])
    assert torch.equal(angles.cos[0, 0], (torch.arange(3.0)[:, None] * frequencies).cos())
    assert_close(encoding(x, angles)[..., 6:], x[..., 6:])


encodings = pytest.mark.parametrize(
    ("make", "name"), [(lambda: p.RoPE(8), "frequencies"), (lambda: p.RoPE2D(8), "frequencies"), (lambda: p.ALiBi(12), "slopes")]
)  # fmt: skip


@encodings
def test_constants_survive_casts_and_empty_memory_and_are_not_stored(make, name):
    module = torch.nn.Sequential(make())
    value = getattr(module[0], name).clone()
    for change in (
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("meta").to_empty(device="cpu"),
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
    ):
        module = change(module)
        kept = getattr(module[0], name)
        assert kept.dtype == torch.float32
        assert torch.equal(kept, value)
    assert not module.state_dict()
    assert not list(module.parameters())


@encodings
def test_a_model_made_on_meta_has_its_constants(make, name):
    with torch.device("meta"):
        made = make()
    assert torch.equal(getattr(made, name), getattr(make(), name))
    assert getattr(made.to("meta"), name).is_meta


def test_positions_decide_the_device_of_the_angles():
    assert p.RoPE(8).angles(torch.zeros(1, 3, dtype=torch.long, device="meta")).cos.is_meta
    assert p.RoPE2D(8).angles(torch.zeros(1, 2, 3, dtype=torch.long, device="meta")).cos.is_meta


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: p.RoPE(8, rotary_dim=3), r"even and in 2\.\.8 \(head_dim\), got 3"),
        (lambda: p.RoPE(8, rotary_dim=10), r"even and in 2\.\.8 \(head_dim\), got 10"),
        (lambda: p.RoPE(8, rotary_dim=0), "got 0"),
        (lambda: p.RoPE(7), "got 7"),
        (lambda: p.RoPE(8, theta=0.0), "above 0, got 0.0"),
        (lambda: p.RoPE(8, scale=-1.0), "above 0, got 10000.0 and -1.0"),
        (lambda: p.RoPE(8, frequencies=torch.ones(3)), r"must be 4, one per pair of rotary_dim = 8, got shape \(3,\)"),
        (lambda: p.RoPE2D(6), "multiple of 4 for two rotary halves, got 6"),
        (lambda: p.rope_frequencies(5), "even and at least 2.*got 5"),
        (lambda: p.rope_frequencies(0), "even and at least 2.*got 0"),
        (lambda: p.alibi_slopes(0), "at least 1, got 0"),
    ],
)  # fmt: skip
def test_bad_sizes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_compiles_into_one_graph():
    # In a process of its own: the shape checks of the test run cannot be traced.
    program = """
import torch
from minillm.position import RoPE, RoPE2D
for rope, positions in ((RoPE(8), torch.arange(4)[None]), (RoPE(8, rotary_dim=4, interleaved=True), torch.arange(4)[None]),
                        (RoPE2D(8), torch.arange(8).view(1, 2, 4))):
    turn = lambda x: rope(x, rope.angles(positions))
    x = torch.randn(1, 2, 4, 8, requires_grad=True)
    for run in (turn, torch.compile(turn, backend="aot_eager", fullgraph=True)):
        y = run(x)
        (grad,) = torch.autograd.grad(y, x, y.detach())
        torch.testing.assert_close(grad, x.detach())
        torch.testing.assert_close(y, turn(x))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
