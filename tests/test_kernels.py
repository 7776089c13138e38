"""Laws of the room where a student need not read: blocks on a CPU, Triton without a GPU, matrix products."""

import json
import subprocess
import sys

import interpreted
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import plain_attention, random_qkv
from tolerances import assert_close, assert_low_precision
from torch.nn import functional as F

from minillm.attention import Mask, score_bias, visible
from minillm.base import machine
from minillm.flash import attend_by_block
from minillm.kernels import blocks, matmul
from minillm.kernels.blocks import weights_by_block
from minillm.kernels.operators import document_edges, triton_kernels
from minillm.position import alibi_slopes

# ---- blocks of queries on a CPU


@pytest.mark.parametrize("n_kv_heads", [1, 4])
@pytest.mark.parametrize("bias", ["none", "mask of each row", "penalty of each head"])
@pytest.mark.parametrize(("T", "S"), [(150, 150), (130, 150)])
def test_training_by_blocks_equals_the_library(n_kv_heads, bias, T, S):
    q, k, v = (x.requires_grad_() for x in random_qkv(H=4, K=n_kv_heads, T=T, S=S, dtype=torch.float64))
    documents = (torch.arange(S) // torch.tensor([[40], [90]])).expand(2, S)
    mask = Mask(documents=documents) if bias == "mask of each row" else Mask()
    slopes = alibi_slopes(4) if bias == "penalty of each head" else None
    dense = score_bias(mask.dense(T, S), torch.float64, slopes)
    out = attend_by_block(q, k, v, mask, slopes=slopes)
    assert "blocks_forward" in type(out.grad_fn).__name__
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=True)
    assert_close(out, expected)
    upstream = torch.randn_like(out)
    for ours, theirs in zip(*(torch.autograd.grad(o, (q, k, v), upstream) for o in (out, expected))):
        assert_close(ours, theirs)


def test_training_by_blocks_keeps_no_weights_and_touches_no_later_key():
    q, k, v = (x.requires_grad_() for x in random_qkv(H=4, K=2, T=150, S=150, Dh=8))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        attend_by_block(q, k, v, Mask())
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in (q, k, v)}
    places = [(at, keys.shape[1]) for at, _, keys, _, _ in weights_by_block(q, k, v, None, True)]
    assert [(at[2].start, seen) for at, seen in places] == [(0, 64), (64, 128), (128, 150)]
    # Both rows, and all heads, fit together.
    assert {(at[0].start, at[1].start) for at, _ in places} == {(0, 0)}


@pytest.mark.parametrize(("B", "S", "together"), [(20, 150, (6, 2)), (3, 2100, (1, 1))])
def test_blocks_of_rows_and_heads_fit_into_the_cache(B, S, together):
    q, k, v = random_qkv(B=B, H=8, K=2, T=S, S=S, Dh=8)
    n_rows, n_heads = together
    starts = {(at[0].start, at[1].start) for at, *_ in weights_by_block(q, k, v, None, True)}
    assert starts == {(row, head) for row in range(0, B, n_rows) for head in range(0, 2, n_heads)}
    for *_, weights in weights_by_block(q, k, v, None, True):
        assert weights.nbytes <= max(2**21, 4 * 64 * S * 4)  # one kv head at least
    assert_close(attend_by_block(q, k, v, Mask()), plain_attention(q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("H", "T", "S"), [(4, 128, 128), (64, 128, 128), (4, 130, 300)])
def test_reading_by_blocks_equals_the_library(dtype, H, T, S):
    """Without gradients too, also where the queries are the last of the keys, and where many heads share a kv head."""
    q, k, v = random_qkv(H=H, K=2, T=T, S=S, dtype=torch.float64)
    low = [x.to(dtype) for x in (q, k, v)]
    bias = score_bias(visible(T, S), torch.float64, None)
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
    library = F.scaled_dot_product_attention(*low, attn_mask=bias.to(dtype), enable_gqa=True)
    with torch.inference_mode():
        out = attend_by_block(*low, Mask())
    assert_low_precision(out, library, exact)
    assert out.transpose(1, 2).is_contiguous()  # joining the heads copies nothing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_by_blocks(dtype):
    exact = random_qkv(H=4, K=2, T=140, S=140, Dh=16, dtype=torch.float64)
    upstream = torch.randn(2, 4, 140, 16, dtype=torch.float64)

    def gradients(function, qkv):
        qkv = [x.detach().clone().requires_grad_() for x in qkv]
        out = function(*qkv)
        return [out, *torch.autograd.grad(out, qkv, upstream.to(out.dtype))]

    low = [x.to(dtype) for x in exact]
    before = torch.backends.mkldnn.matmul.fp32_precision
    ours = gradients(lambda q, k, v: attend_by_block(q, k, v, Mask()), low)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    for a, b, c in zip(ours, gradients(plain_attention, low), gradients(plain_attention, exact)):
        assert a.dtype == dtype
        assert_low_precision(a, b, c)


def test_blocks_multiply_in_float32_where_16_bits_are_emulated(monkeypatch):
    q, k, v = (x.bfloat16() for x in random_qkv(H=4, K=2, T=140, S=140, Dh=16))
    seen = []
    monkeypatch.setattr(blocks, "fast_bfloat16", lambda device: seen.append(device) or False)
    slow = attend_by_block(q, k, v, Mask())
    assert seen
    assert blocks.product_dtype(q) == torch.float32
    monkeypatch.setattr(blocks, "fast_bfloat16", lambda device: True)
    assert blocks.product_dtype(q) == torch.bfloat16
    assert blocks.product_dtype(q.half()) == torch.float32
    torch.testing.assert_close(attend_by_block(q, k, v, Mask()), slow, atol=0.02, rtol=0.02)


def test_the_blocks_pass_torchs_own_checks_of_an_operator():
    q, k, v = (x.requires_grad_() for x in random_qkv(B=1, H=2, K=1, T=5, S=7, Dh=4, dtype=torch.float64))
    for bias in (None, torch.randn(1, 2, 5, 7, dtype=torch.float64)):
        torch.library.opcheck(blocks.blocks_forward, (q, k, v, bias, True))
        assert torch.autograd.gradcheck(blocks.blocks_forward, (q, k, v, bias, True))


@pytest.fixture(scope="module")
def interpreter():
    with interpreted.pool() as executor:
        yield executor


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_document_edges_equal_a_search(data):
    ids = data.draw(st.lists(st.lists(st.integers(-2, 3), min_size=9, max_size=9), min_size=1, max_size=3))
    first, last = document_edges(torch.tensor(ids))
    assert first.dtype == last.dtype == torch.int32
    assert first.tolist() == [[row.index(d) for d in row] for row in ids]
    assert last.tolist() == [[8 - row[::-1].index(d) for d in row] for row in ids]


# ---- Triton, without a GPU

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # not installed
import torch
from minillm import flash, transformer
from minillm.attention import Mask
from minillm.base.errors import MiniLLMError
assert flash.attend_fast(*(torch.randn(1, 2, 5, 8) for _ in range(3)), Mask()).shape == (1, 2, 5, 8)
try:
    flash.attend_triton(*(torch.randn(1, 2, 5, 8) for _ in range(3)), Mask())
except MiniLLMError as error:
    print(error)
"""
NOT_IMPORTED = (
    "import sys, minillm.transformer; print('triton' in sys.modules, 'torch._dynamo' in sys.modules)"
)
COMPILED = """
import json, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from minillm.kernels import triton_flash as flash

class Card:  # a GPU that only says what it is
    def get_current_device(self): return capability
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", capability, 32)

class Built:  # a kernel that is compiled for the arguments of its call, by Triton's own reading of them, and not run
    def __init__(self, name):
        self.kernel, self.name = getattr(flash, name), name
    def __getitem__(self, grid):
        return self
    def __call__(self, *arguments, **given):
        kernel = self.kernel
        if self.name in flash.TILES:
            m, n, warps, stages = flash.TILES[self.name][-1]
            given |= {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
            kernel = kernel.fn  # inside the tuner
        code = kernel.warmup(*arguments, grid=(1,), **given).asm["ptx"]
        if self.name in flash.TILES:
            print(json.dumps([self.name, capability, code.count(instruction)]))

for name in (*flash.TILES, "delta_kernel"):
    setattr(flash, name, Built(name))
shapes = {"q": (2, 4, 256, 64), "k": (2, 2, 256, 64), "v": (2, 2, 256, 64), "out": (2, 4, 256, 64), "lse": (2, 4, 256)}
shapes |= {"grad": shapes["q"], "delta": shapes["lse"], "dq": shapes["q"], "dk": shapes["k"], "dv": shapes["v"]}
dtypes = dict.fromkeys(("lse", "delta"), torch.float32)
tensors = flash.Tensors(**{name: torch.empty(shape, dtype=dtypes.get(name, torch.bfloat16)) for name, shape in shapes.items()})
ids, real = torch.zeros(2, 256, dtype=torch.int32), torch.ones(2, 256, dtype=torch.int8)
masks = flash.Masks(ids[:, 0].contiguous(), ids, ids, ids, real, torch.ones(4))
for capability, instruction in ((80, "mma.sync"), (90, "wgmma.mma_async")):
    driver.set_active(Card())
    flash.forward(tensors, masks, True)
    flash.backward(tensors, masks, True)
"""


def run_python(code, **environment):
    import os

    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_the_package_works_without_triton():
    assert "Triton is not installed" in run_python(WITHOUT_TRITON)


def test_nothing_heavy_is_imported_with_the_models():
    assert run_python(NOT_IMPORTED) == "False False"


def test_the_interpreter_must_be_switched_on_first():
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        triton_kernels(interpreted=True)


def test_the_kernels_compile_for_ampere_and_hopper():
    pytest.importorskip("triton")
    from minillm.kernels.triton_flash import TILES

    rows = [json.loads(line) for line in run_python(COMPILED).splitlines()]
    assert [(name, capability) for name, capability, _ in rows] == [
        (name, capability) for capability in (80, 90) for name in TILES
    ]
    assert all(count > 0 for *_, count in rows), rows  # the matrix units of that generation are used


def test_the_kernels_are_an_operator_that_compiles_into_a_graph(interpreter):
    pytest.importorskip("triton")
    assert interpreter.submit(interpreted.compiled_job).result(timeout=300) < 1e-6
    outcome = interpreter.submit(interpreted.library_check).result(timeout=300)
    assert set(outcome.values()) == {"SUCCESS"}, outcome


# ---- matrix products and memory


MATRIX_PRODUCTS = """
import torch
from minillm.kernels.matmul import tune_matmul

def pairs():
    g = torch.Generator().manual_seed(0)
    for n, k, m in ((8, 3, 5), (300, 64, 1), (17, 33, 65), (0, 4, 4), (9, 0, 4), (9, 4, 0), (1, 8, 8)):
        yield torch.randn(n, k, generator=g), torch.randn(k, m, generator=g)
        yield torch.randn(k, n, generator=g).t(), torch.randn(m, k, generator=g).t()
        yield torch.randn(n, 2 * k, generator=g)[:, ::2], torch.randn(2 * k, m, generator=g)[::2]
    yield torch.ones(1, 64).expand(300, 64), torch.randn(64, 1, generator=g).expand(64, 5)
    yield torch.randn(9, 4, generator=g).double(), torch.randn(4, 3, generator=g).double()

done = tune_matmul(force=True)
for a, b in pairs():
    bias = torch.arange(b.shape[1]).to(a.dtype)
    exact = a.double() @ b.double()
    close = lambda x, y: torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=2e-5)
    close(a @ b, exact)
    close(torch.addmm(bias, a, b), exact + bias)
    close(torch.addmm(bias, a, b, beta=0.5, alpha=2), 2 * exact + 0.5 * bias)
    for out in (torch.empty(0, dtype=a.dtype), torch.empty(b.shape[1], a.shape[0], dtype=a.dtype).t()):
        close(torch.mm(a, b, out=out), exact)
x = torch.randn(2, 9, 16, requires_grad=True)
layer = torch.nn.Linear(16, 8)
layer(x).square().sum().backward()
close(layer.weight.grad, (2 * layer(x).double().flatten(0, 1).T @ x.double().flatten(0, 1)).detach())
try:
    torch.randn(9, 3) @ torch.randn(4, 5)
except RuntimeError as error:
    assert "cannot be multiplied" in str(error)

wide = torch.randn(16, 64)
for b, gaps in ((wide, False), (wide[:, :32], True), (wide[:8].t(), False), (wide[:8, :32].t(), True)):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        torch.randn(9, len(b)) @ b
    copied = any("clone" in event.key for event in record.key_averages())
    assert copied == (gaps and done), (b.shape, b.stride(), copied)
print(done)
"""


def test_tuned_matrix_products_are_right_whatever_shape_and_stride():
    # in a process of its own: the kernels are replaced for good
    run = subprocess.run([sys.executable, "-c", MATRIX_PRODUCTS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert [line for line in run.stderr.splitlines() if "profiler_st" not in line] == []
    able = torch.backends.mkldnn.is_available() and hasattr(torch.library, "get_kernel")
    assert run.stdout.strip() == str(able)


def test_matrix_products_are_left_alone_where_mkl_is_at_home(monkeypatch):
    # a command that ran earlier in this process may have tuned it
    monkeypatch.setattr(matmul, "_kernels", [])
    monkeypatch.setattr(machine, "_cpu_name", lambda: "Intel(R) Xeon(R) Processor")
    assert matmul.tune_matmul() is False


def test_the_allocator_says_whether_it_was_tuned():
    assert matmul.tune_allocator() in (True, False)
