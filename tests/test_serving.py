import pytest
import torch
from decoders import GLM, LLAMA_LIKE, PROMPTS, TINY, llama_like, make, uncached
from tolerances import LOGITS, assert_close, assert_low_precision

from minillm.generate import Session, generate, left_pad, prefill
from minillm.serving import fast
from minillm.serving.fast import (
    FastSession,
    HalfProjection,
    Prepared,
    Projection,
    RotationMatrices,
    obstacle,
    packing_pays,
    prepare,
)
from minillm.transformer import Transformer


@llama_like
def test_a_prepared_model_gives_the_same_logits(config):
    model = make(config)
    tokens, real = left_pad(PROMPTS, 0, config.vocab_size)
    real = torch.cat((real, real.new_ones(3, 70)), dim=1)
    caches = [model.make_cache(3, real.shape[1]) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            prefill(model, tokens, real[:, :7], cache)
        plain, quick = Session(model, caches[0], real), FastSession(Prepared(model), caches[1], real)
        for step in range(70):  # past one block of rotations
            new = torch.tensor([step % 50, 3, 7])
            torch.testing.assert_close(quick.step(new), plain.step(new), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="the cache holds 77 tokens, 78 needed"):
        quick.step(new)


def test_prepared_in_float32_stays_within_the_logits_tolerance():
    model = make(dtype=torch.float32)
    tokens = torch.randint(53, (4, 30))
    cache = model.make_cache(4, 30)
    real = torch.ones(4, 30, dtype=torch.bool)
    with torch.no_grad():
        prefill(model, tokens[:, :1], real[:, :1], cache)
        session = FastSession(Prepared(model), cache, real)
        ours = torch.stack([session.step(tokens[:, t]).clone() for t in range(1, 30)], dim=1)
        assert (ours - model(tokens)[:, 1:]).abs().max() < LOGITS[torch.float32]


# oneDNN packs bfloat16 for AVX-512 at least; a processor with less takes the other way only.
NATIVE = [False, *[True] * bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 16])
def test_a_packed_matrix_multiplies_as_any_other(rows, biased, monkeypatch):
    weights, scale = [torch.randn(40, 24), torch.randn(7, 24)], torch.rand(24)
    biases = [torch.randn(len(w)) if biased else None for w in weights]
    x, told = torch.randn(rows, 24), []
    for packed in (False, True):
        monkeypatch.setattr(fast, "mkl_idles", lambda packed=packed: packed)
        project = Projection(weights, biases, scale, torch.float32)
        assert project.packed == (packed and torch.backends.mkldnn.is_available())
        out = torch.full((rows, 47), torch.nan)
        project(x, out)
        told.append(out.clone())
        project.add(x, out)
        assert_close(out, 2 * told[-1])
    assert_close(told[0], told[1])
    assert not packing_pays(weights[0].double())
    assert not packing_pays(weights[0].to("meta"))


@pytest.mark.parametrize("projection", [Projection, HalfProjection])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("native", NATIVE)
def test_prepared_bfloat16_errs_no_more_than_the_model(projection, batch, native, monkeypatch):
    monkeypatch.setattr(fast, "fast_bfloat16", lambda device: native)
    model = make(LLAMA_LIKE["chatglm2"], torch.float32)
    half = make(LLAMA_LIKE["chatglm2"], torch.bfloat16)
    with torch.no_grad():
        for a, b in zip(half.parameters(), model.parameters()):
            a.copy_(b)
            b.copy_(a)  # the exact model has the rounded weights
    tokens, real = torch.randint(53, (batch, 20)), torch.ones(batch, 20, dtype=torch.bool)
    cache = half.make_cache(batch, 20)
    with torch.no_grad():
        prefill(half, tokens[:, :1], real[:, :1], cache)
        session = FastSession(Prepared(half, projection=projection), cache, real)
        ours = torch.stack([session.step(tokens[:, t]).clone() for t in range(1, 20)], dim=1)
        assert_low_precision(ours, half(tokens)[:, 1:], model(tokens)[:, 1:])


@llama_like
def test_the_matrices_of_rotation_are_the_position_encoding(config):
    model = make(config)
    turns = RotationMatrices(model.position, 8, torch.float64, torch.device("cpu"))
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64)
    for t in (0, 5, 63, 64, 3):  # forth and back, over the end of a block
        expected = x
        if model.position is not None:
            expected = model.position(x, model.position.angles(torch.full((1, 3), t)))
        assert_close(x @ turns(t), expected)


def test_a_prepared_model_is_a_snapshot():
    model = make()
    prepared = Prepared(model)
    before = generate(prepared, PROMPTS, max_new_tokens=8)
    steps = FastSession(prepared, model.make_cache(1, 4), torch.ones(1, 4, dtype=torch.bool))
    first = steps.step(torch.tensor([3])).clone()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(-1.5)
    steps = FastSession(prepared, model.make_cache(1, 4), torch.ones(1, 4, dtype=torch.bool))
    assert torch.equal(steps.step(torch.tensor([3])), first)
    assert generate(model, PROMPTS, max_new_tokens=40) != before  # and generate(model) sees the new weights
    assert generate(prepare(model, 40), PROMPTS, max_new_tokens=40) != before
    assert generate(model, PROMPTS, max_new_tokens=40) == [uncached(model, p, 40) for p in PROMPTS]


def test_large_16_bit_models_stay_in_16_bits(monkeypatch):
    for dtype, kind in ((torch.float32, Projection), (torch.bfloat16, Projection)):
        assert type(Prepared(make(dtype=dtype)).head) is kind
    monkeypatch.setattr(Prepared, "wide_bytes", 1000)
    for dtype, kind in ((torch.float32, Projection), (torch.bfloat16, HalfProjection)):
        prepared = Prepared(make(dtype=dtype))
        assert type(prepared.head) is kind
        assert prepared.head.weight.dtype == dtype
        assert prepared.dtype == torch.float32


class Doubled(torch.nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def test_what_cannot_be_prepared_is_decoded_without():
    model = make()
    model.blocks[1].attn.wo = Doubled(48, 48, bias=False).double()
    with pytest.raises(
        ValueError, match=r"blocks\.1\.attn\.wo is a Doubled, not a plain linear layer; pass the model"
    ):
        Prepared(model)
    assert prepare(model, 40) is model
    assert generate(model, PROMPTS, max_new_tokens=40) == [uncached(model, p, 40) for p in PROMPTS]
    model = make()
    handle = model.blocks[0].register_forward_hook(lambda module, inputs, output: output * 0.5)
    assert obstacle(model) == "blocks.0 has a forward hook"
    assert prepare(model, 40) is model
    assert generate(model, PROMPTS, max_new_tokens=40) == [uncached(model, p, 40) for p in PROMPTS]
    handle.remove()
    assert obstacle(model) is None
    model.norm.register_forward_pre_hook(lambda module, inputs: None)
    assert obstacle(model) == "norm has a forward hook"
    assert "layer" in str(obstacle(make(GLM)))
    assert "rules of its own" in str(obstacle(Transformer(TINY, layout=lambda *a: (a[1], torch.zeros(1, 1)))))


def test_a_model_is_prepared_where_it_pays():
    model = make()
    assert type(prepare(model, 24)) is Prepared
    assert prepare(model, 23) is model  # too few steps to repay the copy
    assert prepare(make(GLM), 100).config == GLM
