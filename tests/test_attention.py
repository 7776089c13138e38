import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import attention_reference, plain_attention, random_qkv, visible_reference
from tolerances import assert_close, assert_low_precision
from torch.nn import functional as F

from minillm.attention import Attention, KVCache, Mask, attend, score_bias, visible
from minillm.check import check, laws
from minillm.flash import attend_by_block
from minillm.position import ALiBi, RoPE, alibi_slopes


def sliding_window(n_queries, n_keys, window):
    distance = torch.arange(n_keys)[n_keys - n_queries :, None] - torch.arange(n_keys)
    return (distance >= 0) & (distance < window)


SOLUTIONS = {
    "attention.attend": lambda q, k, v: attend(q, k, v, Mask()),
    "attention.sliding_window": sliding_window,
    "attention.tokens_that_fit": lambda free, layers, heads, width, size=2: (
        free // (2 * layers * heads * width * size)
    ),
    "attention.pool_heads": lambda w, H, K: w.unflatten(0, (K, H // K, -1)).mean(1).flatten(0, 1),
}


@pytest.mark.parametrize(
    ("exercise", "law"), [(name, law) for name in SOLUTIONS for law in laws(name)], ids=str
)
def test_the_package_obeys_its_laws(exercise, law):
    law(SOLUTIONS[exercise])


@pytest.mark.parametrize(
    ("exercise", "wrong", "law"),
    [
        ("attend", lambda q, k, v: q, "the case computed by hand"),
        ("attend", lambda q, k, v: plain_attention(q, k, v, dim=-2), "the case computed by hand"),
        ("attend", lambda q, k, v: plain_attention(q, k, v) * (1 + 0.1 * (q.shape[2] > 2)), "equal values come back as they are"),
        ("attend", lambda q, k, v: plain_attention(q, k, v) + 1e-6 * (v - v[:, :, :1]).sum(), "no look-ahead"),
        ("attend", lambda q, k, v: plain_attention(q, k, v, scale=1.0), "scores are divided by sqrt(Dh)"),
        ("attend", lambda q, k, v: plain_attention(q, k, v, offset=False), "after a cache, a query sees every earlier key"),
        ("attend", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
         "after a cache, a query sees every earlier key"),
        ("attend", lambda q, k, v: plain_attention(q, k, v, tile=True), "a kv head serves consecutive query heads"),
        ("attend", lambda q, k, v: plain_attention(q, k, v, detach=True), "the gradient is right"),
        ("attend", lambda q, k, v: plain_attention(q, k, v).to(torch.promote_types(q.dtype, torch.float32)),
         "bfloat16 goes in and comes out"),
        ("sliding_window", lambda T, S, w: sliding_window(T, S, w).float(), "a boolean (T, S)"),
        ("sliding_window", lambda T, S, w: sliding_window(T, S, w).logical_not(), "nobody sees the future"),
        ("sliding_window", lambda T, S, w: sliding_window(T, S, w + 1), "a token sees itself and window - 1 before it"),
        ("sliding_window", lambda T, S, w: sliding_window(S, S, w)[:T], "after a cache, queries are the last columns"),
        ("tokens_that_fit", lambda free, n, K, Dh, size=2: free // (n * K * Dh * size), "a key and a value of two bytes"),
        ("tokens_that_fit", lambda free, n, K, Dh, size=2: free // (4 * n * K * Dh), "agrees with KVCache"),
        ("tokens_that_fit", lambda free, n, K, Dh, size=2: free / (2 * n * K * Dh * size), "a token that fits only in part does not fit"),
        ("pool_heads", lambda w, H, K: w.unflatten(0, (K, H // K, -1)).sum(1).flatten(0, 1), "K = 1 is the mean of all heads"),
        ("pool_heads", lambda w, H, K: w.unflatten(0, (H // K, K, -1)).mean(0).flatten(0, 1), "groups are consecutive heads"),
    ],
)  # fmt: skip
def test_check_names_the_broken_law(exercise, wrong, law):
    report = check(f"attention.{exercise}", wrong, quiet=True)
    assert [rule.name for rule, reason in report.reasons.items() if reason is not None][:1] == [law]


MASKS = {
    "causal": {},
    "both ways": {"causal": False},
    "prefix": {"prefix": [2, 4]},
    "documents": {"documents": [[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 3, 3]]},
    "padding": {"keys": [[False, False, True, True, True, True], [True] * 6]},
    "everything": {
        "prefix": [3, 1],
        "documents": [[0, 0, 0, 0, 1, 1], [5, 5, 4, 4, 4, 4]],
        "keys": [[False, True, True, True, True, True], [True, True, True, True, False, False]],
    },
}


def make_mask(name):
    return Mask(
        **{key: value if key == "causal" else torch.tensor(value) for key, value in MASKS[name].items()}
    )


def seen_reference(name, n_queries, n_keys):
    rows = [
        {key: value if key == "causal" else value[b] for key, value in MASKS[name].items()} for b in range(2)
    ]
    return [visible_reference(n_queries, n_keys, **row) for row in rows]


@pytest.mark.parametrize("name", MASKS)
def test_masks_equal_the_slow_reference(name):
    for n_keys in (1, 4, 6):
        for n_queries in {1, min(3, n_keys), n_keys}:
            dense = make_mask(name).dense(n_queries, n_keys)
            assert dense.dtype == torch.bool
            expected = torch.tensor(seen_reference(name, n_queries, n_keys))
            assert torch.equal(dense.expand(2, 1, n_queries, n_keys)[:, 0], expected)


def test_a_mask_draws_the_grids_of_its_docstring():
    def draw(mask, n_queries):
        return ["".join("#" if seen else "." for seen in row) for row in mask.dense(n_queries, 4)[0, 0]]

    drawing = inspect.cleandoc(Mask.__doc__)  # Python 3.13 strips the indentation, earlier ones keep it
    lines = [line for line in drawing.splitlines() if set(line) <= set("#. ") and "#" in line]
    grids = [[line[at : at + 7].replace(" ", "") for line in lines] for at in (4, 15, 26, 37, 48)]
    assert grids[0] == draw(Mask(), 4)
    assert [row for row in grids[1] if row] == draw(Mask(), 2)
    assert grids[2] == draw(Mask(prefix=torch.tensor([3])), 4)
    assert grids[3] == draw(Mask(documents=torch.tensor([[0, 0, 1, 1]])), 4)
    assert grids[4] == draw(Mask(keys=torch.tensor([[False, False, True, True]])), 4)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("alibi", [False, True])
def test_attend_equals_the_slow_reference(name, n_kv_heads, alibi):
    slopes = alibi_slopes(4) if alibi else None
    for dtype in (torch.float32, torch.float64):
        for T, S in ((6, 6), (1, 6), (3, 6), (1, 1)):
            q, k, v = random_qkv(K=n_kv_heads, T=T, S=S, dtype=dtype)
            expected = attention_reference(q, k, v, seen_reference(name, T, S), slopes)
            assert_close(attend(q, k, v, make_mask(name), slopes=slopes), expected)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("alibi", [False, True])
def test_gradients_by_finite_differences(name, alibi):
    slopes = alibi_slopes(2) if alibi else None
    for T in (1, 2, 6):
        qkv = [x.requires_grad_() for x in random_qkv(H=2, K=1, T=T, S=6, Dh=2, dtype=torch.float64)]
        mask = make_mask(name)
        assert torch.autograd.gradcheck(lambda q, k, v, mask=mask: attend(q, k, v, mask, slopes=slopes), qkv)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("T", [1, 16])
@pytest.mark.parametrize("n_kv_heads", [1, 4, 8])
def test_low_precision(dtype, T, n_kv_heads):
    exact = random_qkv(H=8, K=n_kv_heads, T=T, S=16, Dh=16, dtype=torch.float64)
    low = [x.to(dtype) for x in exact]
    ours = attend(*low, Mask())
    assert ours.dtype == dtype
    assert_low_precision(ours, plain_attention(*low), plain_attention(*exact))


def test_alibi_penalties_are_rounded_once():
    slopes = alibi_slopes(40)  # not powers of two: bfloat16 cannot hold them
    bias = score_bias(visible(1, 1001), torch.bfloat16, slopes)
    assert torch.equal(bias[0, :, 0, 0], (-1000 * slopes).bfloat16())


def test_gqa_is_mha_with_tied_heads():
    x = torch.randn(2, 7, 32)
    for K in (1, 2, 4):
        gqa, mha = Attention(32, 4, K, qkv_bias=True), Attention(32, 4, qkv_bias=True)
        tied = {name: weight.clone() for name, weight in gqa.state_dict().items()}
        for name in ("wk.weight", "wk.bias", "wv.weight", "wv.bias"):
            tied[name] = tied[name].unflatten(0, (K, 8)).repeat_interleave(4 // K, dim=0).flatten(0, 1)
        mha.load_state_dict(tied)
        assert_close(gqa(x), mha(x))


def test_mha_equals_torch():
    ours, theirs = (
        Attention(32, 4, qkv_bias=True, out_bias=True),
        torch.nn.MultiheadAttention(32, 4, batch_first=True),
    )
    torch.nn.init.normal_(theirs.in_proj_bias)
    for name, weight, bias in zip("qkv", theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3)):
        getattr(ours, f"w{name}").load_state_dict({"weight": weight, "bias": bias})
    ours.wo.load_state_dict(theirs.out_proj.state_dict())
    x = torch.randn(2, 9, 32)
    future = torch.ones(9, 9, dtype=torch.bool).triu(1)
    assert_close(ours(x), theirs(x, x, x, attn_mask=future, need_weights=False)[0])


def test_gqa_with_rotary_equals_llama():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=48, num_attention_heads=6, num_key_value_heads=2, rope_theta=10000.0)
    config._attn_implementation = "eager"
    theirs, ours = LlamaAttention(config, layer_idx=0).eval(), Attention(48, 6, 2, position=RoPE(8))
    ours.load_state_dict({f"w{name[0]}.weight": weight for name, weight in theirs.state_dict().items()})
    x = torch.randn(2, 9, 48)
    angles = LlamaRotaryEmbedding(config)(x, torch.arange(9)[None])
    future = torch.zeros(9, 9).masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), float("-inf"))
    assert_close(ours(x), theirs(x, position_embeddings=angles, attention_mask=future[None, None])[0])


POSITIONS = {"rope": lambda: RoPE(8), "alibi": lambda: ALiBi(4), "none": lambda: None}


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_no_look_ahead_bit_for_bit(position, n_kv_heads):
    layer, x = Attention(32, 4, n_kv_heads, position=POSITIONS[position]()), torch.randn(2, 40, 32)
    for mask in (Mask(), Mask(keys=torch.arange(40) >= torch.tensor([[3], [0]]))):
        for at in (0, 17, 39):
            changed = x.clone()
            changed[:, at] += torch.randn(32)
            before, after = layer(x, mask=mask), layer(changed, mask=mask)
            assert torch.equal(before[:, :at], after[:, :at])
            assert not torch.equal(before[1, -1], after[1, -1])


def test_a_prefix_sees_itself_whole_and_nothing_after():
    layer, x, mask = Attention(32, 4), torch.randn(2, 8, 32), Mask(prefix=torch.tensor([5, 0]))
    for at, blind in ((4, (0, 4)), (6, (6, 6))):  # the first query that stays, per row
        changed = x.clone()
        changed[:, at] += 1.0
        same = (layer(x, mask=mask) == layer(changed, mask=mask)).all(-1)
        assert same[0].tolist() == [t < blind[0] for t in range(8)]
        assert same[1].tolist() == [t < blind[1] for t in range(8)]


@pytest.mark.parametrize("position", POSITIONS)
def test_packed_documents_equal_separate_ones(position):
    layer = Attention(32, 4, 2, position=POSITIONS[position]())
    x, lengths = torch.randn(1, 10, 32), [3, 1, 6]
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    packed = layer(x, mask=Mask(documents=documents))
    assert_close(packed, torch.cat([layer(part) for part in x.split(lengths, dim=1)], dim=1))


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_cached_equals_uncached_for_any_pieces(data):
    draw = data.draw
    position = POSITIONS[draw(st.sampled_from(sorted(POSITIONS)))]
    K, n_layers, B = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    pieces = draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    T = sum(pieces)
    pads = draw(st.lists(st.integers(0, T), min_size=B, max_size=B))
    torch.manual_seed(draw(st.integers(0, 1000)))
    layers = [Attention(32, 4, K, position=position()).double() for _ in range(n_layers)]
    real = torch.arange(T) >= torch.tensor(pads)[:, None]
    keys = real if any(pads) or draw(st.booleans()) else None
    x = torch.randn(B, T, 32, dtype=torch.float64)
    cache = KVCache(n_layers=n_layers, batch_size=B, n_kv_heads=K, head_dim=8, max_tokens=T, dtype=x.dtype)
    outputs = []
    with torch.no_grad():
        for piece in x.split(pieces, dim=1):
            mask = Mask(keys=keys)
            for number, layer in enumerate(layers):
                piece = layer(piece, mask=mask, cache=cache, layer=number)
            cache.advance(piece.shape[1])
            outputs.append(piece)
        whole, mask = x, Mask(keys=keys)
        for layer in layers:
            whole = layer(whole, mask=mask)
    assert cache.length == T
    assert_close(torch.cat(outputs, 1), whole)


def test_a_cached_prefix_equals_uncached_when_it_is_read_in_one_piece():
    layer, x, mask = Attention(32, 4, 2).double(), torch.randn(2, 9, 32, dtype=torch.float64), None
    cache = KVCache(n_layers=1, batch_size=2, n_kv_heads=2, head_dim=8, max_tokens=9, dtype=torch.float64)
    outputs = []
    with torch.no_grad():
        for piece in x.split([5, 1, 3], dim=1):
            mask = Mask(prefix=torch.tensor([5, 2]))
            outputs.append(layer(piece, mask=mask, cache=cache))
            cache.advance(piece.shape[1])
        assert_close(torch.cat(outputs, 1), layer(x, mask=mask))


@pytest.mark.parametrize("position", POSITIONS)
def test_left_padding_equals_no_padding(position):
    layer, x = Attention(32, 4, 2, position=POSITIONS[position]()), torch.randn(3, 8, 32)
    pads = [0, 3, 7]
    out = layer(x, mask=Mask(keys=torch.arange(8) >= torch.tensor(pads)[:, None]))
    for row, pad in enumerate(pads):
        assert_close(out[row : row + 1, pad:], layer(x[row : row + 1, pad:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alibi", [False, True])
def test_rows_that_are_all_padding_are_finite(dtype, alibi):
    layer = Attention(32, 4, 2, position=ALiBi(4) if alibi else RoPE(8)).to(dtype)
    x = torch.randn(2, 6, 32, dtype=dtype, requires_grad=True)
    out = layer(x, mask=Mask(keys=torch.tensor([[False] * 6, [True] * 3 + [False] * 3])))
    out.sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_the_cache_gives_views_of_memory_taken_once():
    cache = KVCache(n_layers=2, batch_size=1, n_kv_heads=2, head_dim=4, max_tokens=8)
    first, second = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 1, 4)
    keys, values = cache.append(1, first, 2 * first)
    assert keys.data_ptr() == cache.k[1].data_ptr()
    assert values.data_ptr() == cache.v[1].data_ptr()
    assert not cache.k[0].any()
    assert cache.length == 0
    cache.advance(3)
    keys, values = cache.append(1, second, 2 * second)
    assert torch.equal(keys, torch.cat((first, second), 2))
    assert torch.equal(values, torch.cat((2 * first, 2 * second), 2))
    cache.length = 2  # forget the third token
    assert torch.equal(cache.append(1, second, second)[0], torch.cat((first[:, :, :2], second), 2))


@pytest.mark.parametrize(
    ("shape", "cache_bytes"),
    [
        ({"n_layers": 28, "n_kv_heads": 32, "head_dim": 128, "max_tokens": 2048}, 939_524_096),  # ChatGLM-6B
        (
            {"n_layers": 28, "n_kv_heads": 2, "head_dim": 128, "max_tokens": 32768},
            939_524_096,
        ),  # ChatGLM2-6B: 16 x the tokens
        (
            {"n_layers": 80, "n_kv_heads": 8, "head_dim": 128, "max_tokens": 4096},
            1_342_177_280,
        ),  # LLaMA-2-70B
    ],
)
def test_cache_bytes_of_published_models(shape, cache_bytes):
    cache = KVCache(**shape, batch_size=1, dtype=torch.bfloat16, device="meta")
    assert cache.n_bytes == cache_bytes
    assert cache.max_tokens == shape["max_tokens"]


def test_parameters_are_what_the_arguments_say():
    layer = Attention(24, 4, 2, head_dim=5, qkv_bias=True)
    shapes = {name: tuple(weight.shape) for name, weight in layer.named_parameters()}
    assert shapes == {
        "wq.weight": (20, 24), "wq.bias": (20,), "wk.weight": (10, 24), "wk.bias": (10,),
        "wv.weight": (10, 24), "wv.bias": (10,), "wo.weight": (24, 20),
    }  # fmt: skip
    assert Attention(24, 4).wk.weight.shape == (24, 24)
    assert [name for name, _ in Attention(24, 4, out_bias=True).named_parameters() if "bias" in name] == [
        "wo.bias"
    ]


def test_explicit_angles_replace_the_counted_ones():
    layer, x = Attention(32, 4, position=RoPE(8)), torch.randn(1, 5, 32)
    positions = torch.tensor([[0, 3, 4, 9, 20]])
    angles = layer.position.angles(positions)
    assert not torch.allclose(layer(x, angles=angles), layer(x))
    assert_close(layer(x, angles=layer.position.angles(torch.arange(5)[None])), layer(x))


def test_a_mask_builds_its_tensor_once_for_all_layers():
    mask, seen = Mask(keys=torch.ones(1, 4, dtype=torch.bool)), visible(4, 4)
    first = mask.additive(4, 4, "cpu", torch.float32)
    assert mask.additive(4, 4, "cpu", torch.float32) is first
    for slopes in (
        None,
        alibi_slopes(4),
        2 * alibi_slopes(4),
    ):  # what differs in one thing is not taken for the same
        for dtype in (torch.float32, torch.float64):
            bias = mask.additive(4, 4, "cpu", dtype, slopes)
            assert bias.dtype == dtype
            assert torch.equal(bias, score_bias(seen, dtype, slopes))
    slopes = [alibi_slopes(4), 2 * alibi_slopes(4)]
    assert not torch.equal(*(mask.additive(4, 4, "cpu", torch.float32, one) for one in slopes))
    assert mask.additive(2, 4, "cpu", torch.float32, slopes[1]).shape[2:] == (2, 4)
    assert Mask().plain
    assert not mask.plain


def test_plain_causality_needs_no_tensor(monkeypatch):
    def refuse(*args):
        raise AssertionError("a dense mask was built")

    monkeypatch.setattr(Mask, "additive", refuse)
    for mask, T, S in ((Mask(), 5, 5), (Mask(), 1, 5), (Mask(causal=False), 3, 5)):
        attend(*random_qkv(T=T, S=S), mask)
    with pytest.raises(AssertionError, match="a dense mask was built"):
        attend(*random_qkv(T=2, S=5), Mask())


def test_a_mask_first_used_in_inference_mode_trains():
    layer, mask = Attention(32, 4), Mask(keys=torch.ones(1, 6, dtype=torch.bool))
    x = torch.randn(1, 6, 32)
    with torch.inference_mode():
        layer(x, mask=mask)
    layer(x, mask=mask).sum().backward()
    assert layer.wq.weight.grad.abs().sum() > 0


COMPILED = """
import torch
from minillm.attention import Attention, KVCache, Mask
from minillm.position import ALiBi, RoPE
from torch._dynamo.testing import CompileCounter

x, real = torch.randn(2, 9, 32), torch.ones(2, 9, dtype=torch.bool)
for position, given in ((RoPE(8), {}), (RoPE(8), {"keys": real}), (ALiBi(4), {"documents": real.long()})):
    torch._dynamo.reset()
    layer, counter, shared = Attention(32, 4, 2, position=position), CompileCounter(), Mask(**given)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for mask in (shared, shared, Mask(**given)):
        torch.testing.assert_close(compiled(x, mask=mask), layer(x, mask=mask))
    assert counter.frame_count == 1, (given, counter.frame_count)

torch._dynamo.reset()
counter, cache = CompileCounter(), KVCache(n_layers=1, batch_size=2, n_kv_heads=2, head_dim=8, max_tokens=9)
compiled = torch.compile(layer, backend=counter, fullgraph=True)
with torch.no_grad():
    for t in range(9):
        out = compiled(x[:, t : t + 1], cache=cache)
        cache.advance(1)
    torch.testing.assert_close(out, layer(x)[:, -1:])
assert counter.frame_count <= 3, counter.frame_count

from minillm.flash import attend_by_block
q, k, v = (torch.randn(2, n, 140, 8, requires_grad=True) for n in (4, 2, 2))
found = []
for run in (attend_by_block, torch.compile(attend_by_block, backend="aot_eager", fullgraph=True)):
    out = run(q, k, v, Mask())
    found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
for ours, compiled_ in zip(*found):
    torch.testing.assert_close(ours, compiled_)
print("compiled")
"""


def test_compiles_without_graph_breaks_and_without_recompiling_per_step():
    import subprocess
    import sys

    # A process of its own: here, the package is imported with the checks of beartype in it.
    run = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() == "compiled"


def test_bad_input_is_named_with_a_way_out():
    q, k, v = random_qkv(H=4, K=3)
    for function in (attend, attend_by_block):
        with pytest.raises(ValueError, match="n_heads must be a multiple of n_kv_heads, got 4 and 3"):
            function(q, k, v, Mask())
    with pytest.raises(ValueError, match="n_heads must be a multiple of n_kv_heads, got 4 and 3"):
        Attention(32, 4, 3)
    with pytest.raises(ValueError, match="n_heads must be a multiple of n_kv_heads, got 4 and 0"):
        Attention(32, 4, 0)
    with pytest.raises(ValueError, match="dim must be a multiple of n_heads, got 30 and 4; or give head_dim"):
        Attention(30, 4)
    with pytest.raises(ValueError, match="3 queries do not fit in 2 keys"):
        Mask().dense(3, 2)
    with pytest.raises(ValueError, match="keys must describe all 5 keys, cached ones too, got 4 columns"):
        Mask(keys=torch.ones(1, 4, dtype=torch.bool)).dense(1, 5)
    with pytest.raises(ValueError, match="documents must describe all 5 keys"):
        Mask(documents=torch.ones(1, 4, dtype=torch.long)).dense(1, 5)
    cache = KVCache(n_layers=1, batch_size=1, n_kv_heads=2, head_dim=8, max_tokens=3)
    layer, x = Attention(32, 4, 2), torch.randn(1, 4, 32)
    with pytest.raises(
        ValueError, match="the cache holds 3 tokens, 4 needed: make it with a larger max_tokens"
    ):
        layer(x, cache=cache)
    with pytest.raises(ValueError, match=r"a cache has no gradients: call the model under torch.no_grad\(\)"):
        layer(x[:, :2], cache=cache)


def test_integer_padding_is_refused_with_a_way_out():
    # Annotations are checked in tests, and would refuse it first: ask the unchecked constructor.
    init = getattr(Mask.__init__, "__wrapped__", Mask.__init__)
    with pytest.raises(ValueError, match=r"keys must be bool.*got torch.int64: pass keys.bool\(\)"):
        init(Mask.__new__(Mask), keys=torch.ones(1, 4, dtype=torch.long))
