import itertools
import sys
import types

import interpreted
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import attention_reference
from tolerances import assert_close, assert_low_precision

from minillm import flash
from minillm.attention import Attention, Mask, attend
from minillm.base import machine
from minillm.check import check, laws
from minillm.position import alibi_slopes

# ---- the exercises


def online_softmax(tiles, *, shrink=True, start=-1e30, divide=True, stable=True):
    m, l, a = torch.tensor(start), 0.0, 0.0
    for scores, values in tiles:
        scores = scores.clamp(min=start)
        higher = torch.maximum(scores.max(), m) if stable else torch.tensor(0.0)
        factor = torch.exp(m - higher) if shrink and stable else 1.0
        p = torch.exp(scores - higher)
        l, a, m = l * factor + p.sum(), a * factor + p @ values, higher
        if divide == "each":
            a = a / l
    return a / l if divide is True else a


def merge(first, second, *, weigh=True, lse=torch.logaddexp):
    (out1, lse1), (out2, lse2) = first, second
    total = lse(lse1, lse2)
    if not weigh:
        return (out1 + out2) / 2, total
    return (lse1 - total).exp()[:, None] * out1 + (lse2 - total).exp()[:, None] * out2, total


def tiled_attention(q, k, v, side):
    given_ = (x[None, None] for x in (q, k, v))
    return flash.attend_tiled(*given_, Mask(), tile=(side, side))[0, 0]


def all_tiles(q, k, v, side):
    out = []
    for rows in torch.arange(len(q)).split(side):
        parts = [
            merge_part(q[rows] @ k[columns].T / q.shape[1] ** 0.5, columns <= rows[:, None], v[columns])
            for columns in torch.arange(len(q)).split(side)
        ]
        whole = parts[0]
        for part in parts[1:]:
            whole = merge(whole, part)
        out.append(whole[0])
    return torch.cat(out)


def merge_part(scores, seen, values):
    scores = scores.masked_fill(~seen, -1e30)
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


def bytes_moved(n, dim, rows, size=2):
    return (2 * n * dim + -(-n // rows) * 2 * n * dim) * size


SOLUTIONS = {
    "flash.online_softmax": online_softmax,
    "flash.merge": merge,
    "flash.tiled_attention": tiled_attention,
    "flash.bytes_moved": bytes_moved,
}


@pytest.mark.parametrize(
    ("exercise", "law"), [(name, law) for name in SOLUTIONS for law in laws(name)], ids=str
)
def test_the_package_obeys_its_laws(exercise, law):
    law(SOLUTIONS[exercise])


@pytest.mark.parametrize(
    ("exercise", "wrong", "law"),
    [
        ("online_softmax", lambda tiles: online_softmax(tiles, shrink=False), "the case computed by hand"),
        ("online_softmax", lambda tiles: online_softmax(tiles, divide="each"), "the case computed by hand"),
        ("online_softmax", lambda tiles: online_softmax(tiles, start=-2.0), "equal to the softmax over everything"),
        ("online_softmax", lambda tiles: online_softmax(tiles, stable=False), "large scores do not overflow"),
        (
            "online_softmax",
            lambda tiles: online_softmax(tiles, start=float("-inf")),
            "a tile in which nothing is seen changes nothing",
        ),
        ("merge", lambda a, b: merge(a, b, weigh=False), "two halves make the whole"),
        ("merge", lambda a, b: (merge(a, b)[0], torch.maximum(a[1], b[1])), "two halves make the whole"),
        ("merge", lambda a, b: merge(a, b, lse=lambda x, y: (x.exp() + y.exp()).log()), "large sums do not overflow"),
        (
            "merge",
            lambda a, b: merge(a, b, lse=lambda x, y: x + (1 + (y - x).exp()).log()),
            "an empty part changes nothing",
        ),
        ("tiled_attention", lambda q, k, v, side: q, "one tile is attention"),
        ("tiled_attention", lambda q, k, v, side: tiled_attention(q, k, v, len(q)), "nothing of size N x N"),
        (
            "tiled_attention",
            lambda q, k, v, side: torch.cat([tiled_attention(*(x[i : i + side] for x in (q, k, v)), side) for i in range(0, len(q), side)]),
            "any side gives the same",
        ),
        ("tiled_attention", all_tiles, "tiles of the future are not computed"),
        ("bytes_moved", lambda n, dim, rows, size=2: 3 * n * dim * size, "one tile: each matrix passes once"),
        ("bytes_moved", lambda n, dim, rows, size=2: 4 * n * dim * size, "k and v pass once for each tile of queries"),
        (
            "bytes_moved",
            lambda n, dim, rows, size=2: (2 * n * dim + max(1, n // rows) * 2 * n * dim) * size,
            "a tile that is not full is a pass too",
        ),
        (
            "bytes_moved",
            lambda n, dim, rows, size=2: bytes_moved(n, dim, rows, size) + (rows > n),
            "more rows than tokens are no use",
        ),
    ],
)  # fmt: skip
def test_check_names_the_broken_law(exercise, wrong, law):
    report = check(f"flash.{exercise}", wrong, quiet=True)
    broken = [rule.name for rule, reason in report.reasons.items() if reason is not None]
    assert broken[:1] == [law]


# ---- every backend, every mask: one result


S = 37
IDS = torch.tensor([[0] * 9 + [1] * 17 + [2] * 11, [5] * 30 + [3] * 7])
MASKS = {
    "causal": {},
    "both ways": {"causal": False},
    "prefix": {"prefix": torch.tensor([7, 34])},
    "documents": {"documents": IDS},
    "documents, both ways": {"causal": False, "documents": torch.tensor([[1] * 9 + [2] * 24 + [3] * 4])},
    "documents apart": {"documents": torch.arange(S)[None].expand(2, -1) % 3},
    "padding": {"keys": torch.arange(S) >= torch.tensor([[3], [20]])},
    "all": {"prefix": torch.tensor([5, 33]), "documents": IDS, "keys": torch.arange(S) % 5 != 2},
}
MASKS["all"]["keys"] = MASKS["all"]["keys"].expand(2, -1)
SHAPES = {"MHA": (4, S, 8, False), "GQA, ALiBi": (2, S, 24, True), "MQA, after a cache": (1, 11, 16, True)}


@pytest.fixture(scope="module")
def interpreter():
    with interpreted.pool() as executor:
        yield executor


def problem(K, T, Dh, alibi, H=4):
    generator = torch.Generator().manual_seed(K * 1000 + T)
    sizes = ((2, H, T, Dh), (2, K, S, Dh), (2, K, S, Dh), (2, H, T, Dh))
    *inputs, grad = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return inputs, grad, alibi_slopes(H) if alibi else None


def run_backend(name, inputs, grad, mask, slopes, dtype, interpreter):
    """[out, dq, dk, dv] of a backend, or a skip that says why it cannot be asked."""
    plain = Mask(**mask).plain
    if name == "triton" and not torch.cuda.is_available():
        pytest.importorskip("triton")
        return interpreted.both_passes_elsewhere(interpreter, name, inputs, grad, mask, slopes, dtype)
    if name in ("flash-attn", "flex") and not plain:
        with pytest.raises(ValueError, match=f"{name} knows no prefix, documents or padding"):
            flash.BACKENDS[name](*(x.to(dtype) for x in inputs), Mask(**mask), slopes=slopes)
        return None
    if name == "flash-attn" and not (torch.cuda.is_available() and flash.INSTALLED["flash_attn"]):
        pytest.skip("flash-attn is not installed")
    if name == "flex":
        return interpreted.both_passes_elsewhere(interpreter, name, inputs, grad, mask, slopes, dtype)
    device = "cuda" if name in ("triton", "flash-attn") else "cpu"
    move = {key: value if key == "causal" else value.to(device) for key, value in mask.items()}
    moved = [x.to(device) for x in (*inputs, grad)]
    results = interpreted.both_passes(flash.BACKENDS[name], moved[:3], moved[3], Mask(**move), slopes, dtype)
    return [x.cpu() for x in results]


@pytest.mark.parametrize("name", flash.BACKENDS)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_backend_gives_the_same_result_and_gradients(name, kind, shape, interpreter):
    inputs, grad, slopes = problem(*SHAPES[shape])
    dtype = torch.float32 if name != "flash-attn" else torch.bfloat16
    exact = interpreted.both_passes(
        flash.attend_naive, inputs, grad, Mask(**MASKS[kind]), slopes, torch.float64
    )
    ours = run_backend(name, inputs, grad, MASKS[kind], slopes, dtype, interpreter)
    if ours is None:
        return
    if dtype == torch.float32:
        for mine, true in zip(ours, exact):
            assert_close(mine.float(), true.float())
        return
    naive = interpreted.both_passes(flash.attend_naive, inputs, grad, Mask(**MASKS[kind]), slopes, dtype)
    for mine, low, true in zip(ours, naive, exact):
        assert_low_precision(mine, low, true, floor=2e-3)


def test_the_naive_backend_equals_the_slow_reference():
    for kind, shape in itertools.product(MASKS, SHAPES):
        (q, k, v), _, slopes = problem(*SHAPES[shape])
        mask = Mask(**MASKS[kind])
        seen = mask.dense(q.shape[2], S).expand(2, 1, -1, -1)[:, 0].tolist()
        expected = attention_reference(q, k, v, seen, slopes)
        assert_close(flash.attend_naive(q, k, v, mask, slopes=slopes), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["causal", "all"])
@pytest.mark.parametrize("name", ["triton", "tiled"])
def test_low_precision(name, kind, dtype, interpreter):
    inputs, grad, slopes = problem(*SHAPES["GQA, ALiBi"])
    ours = run_backend(name, inputs, grad, MASKS[kind], slopes, dtype, interpreter)
    naive, exact = (
        interpreted.both_passes(flash.attend_naive, inputs, grad, Mask(**MASKS[kind]), slopes, kind_of)
        for kind_of in (dtype, torch.float64)
    )
    for mine, low, true in zip(ours, naive, exact):
        assert_low_precision(mine, low, true)


@pytest.mark.parametrize("head_dim", [64, 128, 80])
def test_the_kernels_take_the_head_widths_of_models(head_dim, interpreter):
    inputs, grad, slopes = problem(1, 9, head_dim, False, H=2)
    exact = interpreted.both_passes(flash.attend_naive, inputs, grad, Mask(), slopes, torch.float64)
    ours = run_backend("triton", inputs, grad, {}, slopes, torch.float32, interpreter)
    for mine, true in zip(ours, exact):
        assert_close(mine.float(), true.float())


# ---- tiles


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_tiles_put_together_are_the_mask(data):
    mask = Mask(**MASKS[data.draw(st.sampled_from(sorted(MASKS)))])
    T, height, width = (data.draw(st.integers(1, S)) for _ in range(3))
    dense = mask.dense(T, S).expand(2, 1, T, S)
    for rows in flash.tiles(S - T, S, height):
        for columns in flash.tiles(0, S, width):
            seen = flash.seen_tile(mask, rows, columns)
            part = dense[:, :, rows.start - (S - T) : rows.stop - (S - T), columns.start : columns.stop]
            if isinstance(seen, bool):
                assert part.all() if seen else not part.any()
            else:
                assert torch.equal(seen.expand_as(part), part)


def test_tiles_need_no_tensor_where_the_mask_is_plain(monkeypatch):
    monkeypatch.setattr(torch, "arange", None)  # any tensor of columns would fail
    assert flash.seen_tile(Mask(), range(8, 16), range(8)) is True
    assert flash.seen_tile(Mask(), range(8, 16), range(9)) is True  # the first row is column 8, and sees it
    assert flash.seen_tile(Mask(), range(8, 16), range(16, 24)) is False
    assert flash.seen_tile(Mask(causal=False), range(8, 16), range(16, 24)) is True


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("alibi", [False, True])
def test_gradients_by_finite_differences(kind, alibi):
    mask = Mask(**{key: value if key == "causal" else value[..., :5] for key, value in MASKS[kind].items()})
    if mask.prefix is not None:
        mask.prefix = torch.tensor([2, 4])
    slopes = alibi_slopes(2) if alibi else None
    for T in (5, 2):
        inputs = [
            torch.randn(2, n, t, 2, dtype=torch.float64, requires_grad=True)
            for n, t in ((2, T), (1, 5), (1, 5))
        ]
        assert torch.autograd.gradcheck(
            lambda q, k, v: flash.attend_tiled(q, k, v, mask, slopes=slopes, tile=(2, 3)),
            inputs,
            fast_mode=True,
        )


def test_any_tile_size_gives_the_same():
    inputs, grad, slopes = problem(*SHAPES["GQA, ALiBi"])
    expected = interpreted.both_passes(flash.attend_naive, inputs, grad, Mask(), slopes, torch.float64)
    for tile in ((1, S), (S, 1), (5, 8), (64, 64)):
        results = interpreted.both_passes(
            lambda *x, tile=tile, **more: flash.attend_tiled(*x, **more, tile=tile), inputs, grad, Mask(), slopes, torch.float64
        )  # fmt: skip
        for mine, true in zip(results, expected):
            assert_close(mine, true)


def test_no_look_ahead_bit_for_bit(interpreter):
    inputs, grad, _ = problem(2, S, 16, False)
    changed = [x.clone() for x in inputs]
    for x in changed[1:]:
        x[:, :, 20] += 1.0
    for name in ("tiled", "triton"):
        if name == "triton":
            pytest.importorskip("triton")
        before, after = (
            interpreted.both_passes_elsewhere(interpreter, name, x, grad, {}, None, torch.float32)[0]
            for x in (inputs, changed)
        )
        assert torch.equal(before[:, :, :20], after[:, :, :20])
        assert not torch.equal(before[:, :, 20:], after[:, :, 20:])


def test_no_mask_of_rows_times_keys_is_ever_made(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a dense mask was built")

    monkeypatch.setattr(Mask, "dense", refuse)
    monkeypatch.setattr(Mask, "additive", refuse)
    inputs, grad, slopes = problem(*SHAPES["GQA, ALiBi"])
    for mask in MASKS.values():
        interpreted.both_passes(flash.attend_tiled, inputs, grad, Mask(**mask), slopes, torch.float32)
        described = flash.mask_tensors(Mask(**mask), 2, S)
        assert all(x is None or x.numel() <= 2 * S for x in described.values())
    with pytest.raises(AssertionError, match="dense mask"):
        flash.attend_naive(*inputs, Mask())


def test_peak_memory_is_linear_in_the_length_and_the_naive_one_is_not():
    def peak(one, T):
        q, k, v = (torch.randn(1, 1, T, 16, requires_grad=True) for _ in range(3))
        return machine.peak_bytes(lambda: one(q, k, v, Mask()).sum().backward())

    growth = {one: peak(one, 2048) / peak(one, 1024) for one in (flash.attend_naive, flash.attend_tiled)}
    assert growth[flash.attend_naive] > 3.5
    assert growth[flash.attend_tiled] < 2.1


# ---- the traffic


def count_naive(n, dim, backward):
    square, matrix = n * n, n * dim
    steps = [(2 * matrix, square), (square, square), (square + matrix, matrix)]  # (read, written)
    if backward:  # dv, dp, ds, dq, dk
        steps += [(square + matrix, matrix), (2 * matrix, square), (2 * square, square)]
        steps += [(square + matrix, matrix), (square + matrix, matrix)]
    return sum(read + written for read, written in steps)


def count_tiled(n, dim, sram, backward):
    moved = 0
    for rows in flash.tiles(0, n, flash.rows_that_fit(sram, dim)):
        moved += 2 * len(rows) * dim + len(rows)  # q, out, lse
        moved += sum(2 * len(columns) * dim for columns in flash.tiles(0, n, 16))
    if backward:
        moved += 2 * n * dim + n  # out, grad, delta
        for columns in flash.tiles(0, n, flash.rows_that_fit(sram, dim, held=4, squares=2)):
            moved += 4 * len(columns) * dim
            moved += sum(2 * len(rows) * dim + 2 * len(rows) for rows in flash.tiles(0, n, 16))
        for rows in flash.tiles(0, n, flash.rows_that_fit(sram, dim, held=3, squares=2)):
            moved += 3 * len(rows) * dim + 2 * len(rows)
            moved += sum(2 * len(columns) * dim for columns in flash.tiles(0, n, 16))
    return moved


@pytest.mark.parametrize("backward", [False, True])
def test_traffic_by_formula_is_what_the_loops_count(backward):
    for n, dim in ((64, 8), (100, 16), (257, 8)):
        assert flash.attention_traffic(n, dim, backward=backward) == count_naive(n, dim, backward)
        for sram in (900, 2048, 10_000, 1_000_000):
            expected = count_tiled(n, dim, sram, backward)
            assert flash.attention_traffic(n, dim, sram=sram, backward=backward) == expected


def test_traffic_falls_as_the_paper_says():
    n, dim = 1 << 16, 64
    for sram in (1 << 15, 1 << 16, 1 << 17):
        ratio = flash.attention_traffic(n, dim, sram=sram) / (4 * n * n * dim * dim / sram)
        assert 1.0 < ratio < 1.3


def test_fast_memory_that_holds_no_row_is_named():
    assert flash.rows_that_fit(2 * 16 * 8 + 32, 8) == 1
    with pytest.raises(
        ValueError, match="100 numbers of fast memory hold no row of width 8 beside 16 columns"
    ):
        flash.rows_that_fit(100, 8)


def test_slow_memory_counts_reads_and_writes():
    memory = flash.SlowMemory(a=torch.ones(4, 3), b=torch.zeros(4, 3))
    memory.write("b", memory.read("a", slice(1, 3)), slice(0, 2))
    assert memory.moved == 12
    assert memory.tensors["b"].sum() == 6


# ---- the choice


def chosen(
    device="cuda", dtype=torch.bfloat16, mask=None, T=2048, n_keys=2048, alibi=False, gradients=True, **more
):
    shape = (more.pop("B", 8), 40, T, more.pop("Dh", 128))
    how = {"shape": shape, "n_keys": n_keys, "alibi": alibi, "gradients": gradients, **more}
    return flash.choose_backend(device, dtype, Mask(**(mask or {})), **how)


PACKED = {"documents": torch.zeros(8, 2048, dtype=torch.long)}


def test_a_compiled_graph_on_a_cpu_takes_operators_only(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert chosen("cpu").backend == "blocks"
    for gradients in (
        True,
        False,
    ):  # not flex, which would compile within the compiler, and not a loop over tiles
        assert chosen("cpu", T=16384, n_keys=16384, alibi=True, gradients=gradients).backend == "sdpa"


@pytest.mark.parametrize(
    ("case", "installed", "backend"),
    [
        ({}, ("triton", "flash_attn"), "flash-attn"),
        ({"alibi": True}, ("triton", "flash_attn"), "flash-attn"),
        ({"T": 100}, ("triton", "flash_attn"), "flash-attn"),
        ({}, ("triton",), "sdpa"),
        ({"mask": {"causal": False}}, (), "sdpa"),
        ({"mask": PACKED}, ("triton", "flash_attn"), "triton"),
        ({"alibi": True}, ("triton",), "triton"),
        ({"T": 100}, ("triton",), "triton"),
        ({"mask": PACKED, "B": 8}, (), "sdpa"),
        ({"alibi": True}, (), "tiled"),
        ({"T": 1}, ("triton", "flash_attn"), "sdpa"),
        ({"modern": False}, ("triton", "flash_attn"), "sdpa"),
        ({"modern": False, "alibi": True}, ("triton", "flash_attn"), "tiled"),
        ({"dtype": torch.float32}, ("triton", "flash_attn"), "sdpa"),
        ({"dtype": torch.float32, "alibi": True}, ("triton", "flash_attn"), "triton"),
        ({"Dh": 512, "mask": PACKED}, ("triton", "flash_attn"), "sdpa"),
        ({"device": "cpu"}, ("triton", "flash_attn"), "blocks"),
        ({"device": "cpu", "mask": PACKED}, (), "blocks"),
        ({"device": "cpu", "dtype": torch.float32}, (), "sdpa"),
        ({"device": "cpu", "dtype": torch.float32, "T": 1000, "n_keys": 1000}, (), "blocks"),
        ({"device": "cpu", "T": 1}, (), "sdpa"),
        ({"device": "mps"}, (), "sdpa"),
        ({"device": "cpu", "alibi": True}, ("triton",), "tiled"),
        ({"device": "cpu", "alibi": True, "gradients": False}, (), "flex"),
        ({"device": "cpu", "alibi": True, "gradients": False, "mask": PACKED}, (), "tiled"),
        ({"device": "mps", "alibi": True, "gradients": False}, (), "tiled"),
        ({"device": "cpu", "alibi": True, "B": 1, "T": 256, "n_keys": 256}, (), "blocks"),
        (
            {"device": "cpu", "alibi": True, "B": 1, "T": 1024, "n_keys": 1024},
            (),
            "blocks",
        ),  # 80 MiB; in float32 160
        (
            {"device": "cpu", "alibi": True, "B": 1, "T": 1024, "n_keys": 1024, "dtype": torch.float32},
            (),
            "tiled",
        ),
    ],
)
def test_the_rule_of_choice(case, installed, backend, monkeypatch):
    monkeypatch.setattr(flash, "INSTALLED", {name: name in installed for name in ("triton", "flash_attn")})
    monkeypatch.setattr(flash, "HAS_COMPILER", True)
    choice = chosen(**case)
    assert choice.backend == backend
    assert len(choice.why) > 10
    monkeypatch.setattr(flash, "HAS_COMPILER", False)
    assert chosen(**case).backend == ("tiled" if backend == "flex" else backend)


def test_attend_fast_asks_the_rule_and_obeys(monkeypatch):
    asked = {}
    for name in flash.BACKENDS:
        monkeypatch.setitem(flash.BACKENDS, name, lambda q, k, v, mask, *, slopes, name=name: (name, q.dtype))

    def rule(device, dtype, mask, **how):
        asked.update(how, device=device, dtype=dtype)
        return flash.Choice("tiled", "because")

    monkeypatch.setattr(flash, "choose_backend", rule)
    q, k = torch.randn(2, 4, 3, 8, requires_grad=True), torch.randn(2, 2, 5, 8)
    unchecked = getattr(flash.attend_fast, "__wrapped__", flash.attend_fast)
    assert unchecked(q, k, k, Mask(), slopes=alibi_slopes(4)) == ("tiled", torch.float32)
    assert asked == {
        "device": "cpu", "dtype": torch.float32, "shape": (2, 4, 3, 8), "n_keys": 5, "alibi": True, "gradients": True,
        "modern": True,
    }  # fmt: skip
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert unchecked(q, k, k, Mask()) == ("tiled", torch.bfloat16)
    assert (asked["gradients"], asked["alibi"], asked["dtype"]) == (False, False, torch.bfloat16)


@pytest.mark.parametrize("backend", ["blocks", "sdpa", "tiled", "naive"])
def test_autocast_rounds_what_goes_in_and_no_scores(backend, monkeypatch):
    monkeypatch.setattr(flash, "choose_backend", lambda *args, **how: flash.Choice(backend, "because"))
    q, k, v = (torch.randn(2, n, 70, 16) for n in (4, 2, 2))
    expected = flash.BACKENDS[backend](*(x.bfloat16() for x in (q, k, v)), Mask())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(flash.attend_fast(q, k, v, Mask()), expected)
        assert torch.is_autocast_enabled("cpu")


def test_attend_fast_equals_attend_where_the_mask_would_be_large(monkeypatch):
    inputs, grad, slopes = problem(*SHAPES["GQA, ALiBi"])
    expected = interpreted.both_passes(attend, inputs, grad, Mask(), slopes, torch.float32)
    monkeypatch.setattr(flash, "MAX_BIAS_BYTES", 0)
    for mine, true in zip(
        interpreted.both_passes(flash.attend_fast, inputs, grad, Mask(), slopes, torch.float32), expected
    ):
        assert_close(mine.float(), true.float())


def test_the_models_use_it():
    from minillm.runs.recipes import recipe
    from minillm.transformer import Transformer

    with torch.device("meta"):
        model = Transformer(recipe("tiny").model)
    assert all(block.attn.attend is flash.attend_fast for block in model.blocks)
    assert Attention(8, 2).attend is attend


def test_the_layer_calls_what_it_is_given():
    layer, x = Attention(32, 4, 2, attend=flash.attend_tiled), torch.randn(2, 9, 32)
    plain = Attention(32, 4, 2)
    plain.load_state_dict(layer.state_dict())
    assert_close(layer(x), plain(x))
    layer.attend = lambda q, k, v, mask, *, slopes: torch.zeros_like(q)
    assert not layer(x).any()


def test_flash_attn_is_called_as_it_wants_to_be(monkeypatch):
    """Against the signature of flash_attn 2.8: (B, T, H, Dh), queries last, slopes in float32."""

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        assert softmax_scale is None
        assert alibi_slopes is None or alibi_slopes.dtype == torch.float32
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attend(q, k, v, Mask(causal=causal), slopes=alibi_slopes).transpose(1, 2)

    module = types.ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    for kind, shape in itertools.product(("causal", "both ways"), SHAPES):
        (q, k, v), _, slopes = problem(*SHAPES[shape])
        mask = Mask(**MASKS[kind])
        expected = attend(q, k, v, mask, slopes=slopes)
        assert_close(flash.BACKENDS["flash-attn"](q, k, v, mask, slopes=slopes), expected)
    with pytest.raises(ValueError, match="flash-attn knows no prefix, documents or padding"):
        flash.BACKENDS["flash-attn"](q, k, v, Mask(**MASKS["prefix"]))


def test_flex_refuses_what_it_cannot_do():
    q, k, v = (torch.randn(1, 1, 4, 8, requires_grad=True) for _ in range(3))
    with pytest.raises(ValueError, match="for plain masks without gradients: use attend_tiled"):
        flash.BACKENDS["flex"](q, k, v, Mask())


def test_a_tiled_gradient_is_not_differentiated_again():
    q, k, v = (torch.randn(1, 1, 4, 8, requires_grad=True) for _ in range(3))
    out, upstream = flash.attend_tiled(q, k, v, Mask()), torch.ones(1, 1, 4, 8, requires_grad=True)
    grads = torch.autograd.grad(out, q, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grads[0].sum().backward()


# ---- bad calls, the command, the benchmark


@pytest.mark.parametrize(
    "one", [flash.attend_tiled, flash.attend_triton, flash.attend_naive], ids=lambda f: f.__name__
)
def test_bad_calls_are_named(one):
    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 3, 3, 8)
    with pytest.raises(ValueError, match="n_heads must be a multiple of n_kv_heads, got 4 and 3"):
        one(q, k, k, Mask())
    with pytest.raises(ValueError, match="3 queries do not fit in 2 keys"):
        one(q, q[:, :, :2], q[:, :, :2], Mask())
    for name, dtype in (("documents", torch.long), ("keys", torch.bool)):
        with pytest.raises(ValueError, match=f"{name} must describe all 3 keys, cached ones too, got 2"):
            one(q, q, q, Mask(**{name: torch.ones(1, 2, dtype=dtype)}))


def test_info_attention_says_which_and_why(capsys):
    from minillm.cli import main

    assert main.main(["info", "--attention", "--device", "cuda"]) == 0
    cuda = capsys.readouterr().out
    assert main.main(["info", "--attention", "--device", "cpu", "--seq-len", "8192"]) == 0
    cpu = capsys.readouterr().out
    for text in (cuda, cpu):
        assert all(
            kind in text for kind in ("causal", "prefix", "documents", "padding", "ALiBi", "one new token")
        )
        assert "flash-attn" in text
    assert "bfloat16" in cuda
    assert "float32" in cpu
    assert "tiled" in cpu
    assert chosen(mask=PACKED).backend in cuda
    assert main.main(["info", "--attention", "--device", "abacus"]) == 2


def test_the_benchmark_measures_what_it_says(monkeypatch):
    from benchmarks import attention as benchmark

    monkeypatch.setattr(benchmark, "LENGTHS", (64, 128))
    monkeypatch.setattr(benchmark, "HEAD_DIMS", (16,))
    monkeypatch.setattr(benchmark, "free_bytes", lambda device: 5 * 100 * 100 * 4)
    result = benchmark.run(torch.device("cpu"), minutes=0.1)
    assert [(row["backend"], row["length"]) for row in result["rows"]] == [
        ("naive", 64), ("tiled", 64), ("sdpa", 64), ("tiled", 128), ("sdpa", 128),
    ]  # fmt: skip
    assert result["left_out"] == [
        {"head_dim": 16, "backend": "naive", "length": 128, "why": "too much memory"}
    ]
    row = result["rows"][-1]
    assert row["forward_tflops"] == pytest.approx(2 * 128 * 128 * 16 / row["forward_ms"] / 1e9)
    assert 0 < row["peak_mib"] < 2
