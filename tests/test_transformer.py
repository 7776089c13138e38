import copy
import dataclasses
import math
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import glm_logits_reference
from tolerances import LOGITS, assert_close
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from minillm.attention import Mask
from minillm.check import laws
from minillm.transformer import (
    Block,
    ModelConfig,
    NormHead,
    Transformer,
    Trunk,
    activation_bytes,
    count_parameters,
    flat_layout,
    flops_per_token,
    init_weights,
    kv_cache_bytes,
    prefix_layout,
    training_memory,
)

TINY = ModelConfig(
    vocab_size=61, dim=48, n_layers=3, n_heads=6, n_kv_heads=3, hidden_dim=56, max_seq_len=64, norm_eps=1e-6
)
CHATGLM2 = dataclasses.replace(TINY, n_kv_heads=2, rope_fraction=0.5, rope_interleaved=True, qkv_bias=True)
GLM = dataclasses.replace(
    TINY, n_kv_heads=6, norm="layer", mlp="gelu", position="rope2d", residual="glm",
    qkv_bias=True, out_bias=True, mlp_bias=True,
)  # fmt: skip
VARIANTS = {
    "llama": TINY,
    "tied": dataclasses.replace(TINY, tied=True),
    "multi-query": dataclasses.replace(TINY, n_kv_heads=1),
    "chatglm2": CHATGLM2,
    "interpolated": dataclasses.replace(CHATGLM2, rope_scale=16.0),
    "glm": GLM,
    "alibi": dataclasses.replace(TINY, position="alibi", n_kv_heads=6),
    "norm head": dataclasses.replace(TINY, norm_head=True, position="none"),
}
variants = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


def randomised(config, dtype=torch.float32, **kwargs):
    """A model whose every weight matters: gains that are not 1, biases that are not 0."""
    model = Transformer(config, **kwargs).to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return model


def tokens(batch=2, length=12, config=TINY):
    return torch.randint(config.vocab_size, (batch, length))


def apart(a, b):
    return (a - b).abs().max().item()


# Reference equality.


def hugging_face(model, kind):
    """The transformers model with the weights of ours."""
    from transformers import GlmConfig, GlmForCausalLM, LlamaConfig, LlamaForCausalLM

    config, weight = model.config, model.embed.weight
    settings = {
        "vocab_size": config.vocab_size, "hidden_size": config.dim, "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads, "num_key_value_heads": config.n_kv_heads, "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim, "rms_norm_eps": config.norm_eps, "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_seq_len, "attention_bias": config.qkv_bias, "pad_token_id": 0,
    }  # fmt: skip
    if kind == "glm":
        settings["partial_rotary_factor"] = config.rope_fraction
        rope = {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "partial_rotary_factor": config.rope_fraction,
        }
        if config.rope_scale != 1:
            rope |= {"rope_type": "linear", "factor": config.rope_scale}
        peer = GlmForCausalLM(GlmConfig(**settings, rope_parameters=rope, attn_implementation="sdpa"))
    else:
        peer = LlamaForCausalLM(LlamaConfig(**settings, attn_implementation="sdpa"))
    names = {"embed": "embed_tokens", "blocks": "layers", "attn_norm": "input_layernorm"}
    names |= {"mlp_norm": "post_attention_layernorm", "attn": "self_attn", "head": "lm_head"}
    names |= {f"w{x}": f"{x}_proj" for x in "qkvo"} | {f"w_{x}": f"{x}_proj" for x in ("gate", "up", "down")}
    state = {}
    for name, value in model.state_dict().items():
        name = ".".join(names.get(part, part) for part in name.split("."))
        state[name if name.startswith("lm_head") else "model." + name] = value
    if kind == "glm":  # one matrix for gate and up
        for layer in range(config.n_layers):
            mlp = f"model.layers.{layer}.mlp."
            pair = [state.pop(mlp + f"{part}_proj.weight") for part in ("gate", "up")]
            state[mlp + "gate_up_proj.weight"] = torch.cat(pair)
    peer = peer.to(weight.dtype).eval()  # before the weights, which it would round
    peer.load_state_dict(state, strict=True)
    return peer


@pytest.fixture
def exact_norms(monkeypatch):
    """transformers norms in float32 even in a float64 model; torch's own kernel does not."""
    from transformers.models.glm import modeling_glm
    from transformers.models.llama import modeling_llama

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.variance_epsilon)

    monkeypatch.setattr(modeling_glm.GlmRMSNorm, "forward", forward)
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)


PEERS = {
    "multi-head": ("llama", dataclasses.replace(TINY, n_kv_heads=6)),
    "grouped": ("llama", TINY),
    "multi-query": ("llama", VARIANTS["multi-query"]),
    "tied": ("llama", VARIANTS["tied"]),
    "odd heads": ("llama", dataclasses.replace(TINY, dim=40, n_heads=5, n_kv_heads=1)),
    "chatglm2": ("glm", CHATGLM2),
    "chatglm2-32k": ("glm", VARIANTS["interpolated"]),
}
peers = pytest.mark.parametrize(("kind", "config"), PEERS.values(), ids=PEERS)


@peers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_logits_equal_transformers(kind, config, dtype, exact_norms):
    model, x = randomised(config, dtype), tokens(3, 70)  # longer than max_seq_len
    logits = model(x)
    assert logits.shape == (3, 70, 61)
    assert logits.dtype == dtype
    assert apart(logits, hugging_face(model, kind)(x).logits) < LOGITS[dtype]


@peers
@torch.no_grad()
def test_left_padded_logits_equal_transformers(kind, config):
    model, x = randomised(config), tokens(3, 12)
    real = torch.arange(12) >= torch.tensor([0, 3, 7])[:, None]
    x[~real] = 0
    expected = hugging_face(model, kind)(x, attention_mask=real.long()).logits
    for mask in (real, real.long()):
        assert apart(model(x, attention_mask=mask)[real], expected[real]) < LOGITS[torch.float32]


def test_gradients_equal_transformers():
    model, x = randomised(TINY), tokens()
    peer = hugging_face(model, "llama")
    for logits in (model(x), peer(x).logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
    for block, layer in zip(model.blocks, peer.model.layers):
        assert_close(block.attn.wk.weight.grad, layer.self_attn.k_proj.weight.grad)
        assert_close(block.mlp.w_down.weight.grad, layer.mlp.down_proj.weight.grad)
        assert_close(block.attn_norm.weight.grad, layer.input_layernorm.weight.grad)
    assert_close(model.embed.weight.grad, peer.model.embed_tokens.weight.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_the_glm_block_equals_the_slow_reference(dtype):
    model, x, prefix = randomised(GLM, dtype), tokens(2, 7), torch.tensor([3, 5])
    logits = model(x, mask=Mask(prefix=prefix))
    for row in range(2):
        expected = glm_logits_reference(
            model.state_dict(), GLM.n_layers, GLM.n_heads, x[row].tolist(), int(prefix[row])
        )
        assert apart(logits[row], expected) < LOGITS[dtype]


@torch.no_grad()
def test_the_norm_head_equals_its_definition():
    model, x = randomised(VARIANTS["norm head"]), torch.randn(2, 3, 48)
    rows = [row / row.norm() for row in model.head.weight]
    assert_close(model.logits(x), x @ torch.stack(rows).T)
    assert isinstance(model.head, NormHead)
    model.head.weight.mul_(torch.rand(61, 1) + 1)  # the length of a row does not matter
    assert_close(model.logits(x), x @ torch.stack(rows).T)


# Laws.

SOLUTIONS = {
    "transformer.model": Transformer,
    "transformer.block": lambda x, *parts: (
        Block(*(Part(part) for part in parts))(x[None, None])[0, 0]
        if x.dim() == 1
        else Block(*(Part(part) for part in parts))(x)
    ),
    "transformer.count": lambda config: count_parameters(config).total,
    "transformer.dialogue_mask": lambda turns: dialogue_mask(turns),
    "transformer.max_context": lambda config, n_bytes: max(
        0, (n_bytes - 2 * count_parameters(config).total) // kv_cache_bytes(config, 1)
    ),
}


class Part(nn.Module):
    """A plain function as a part of a block."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, **_):
        return self.function(x)


def dialogue_mask(turns):
    owner = torch.tensor(
        [2 * i + part for i, turn in enumerate(turns) for part in (0, 1) for _ in range(turn[part])]
    )
    same_question = (owner[:, None] == owner) & (owner % 2 == 0)
    return same_question | torch.ones_like(same_question).tril()


@pytest.mark.parametrize(
    ("exercise", "law"), [(name, law) for name in SOLUTIONS for law in laws(name)], ids=str
)
def test_the_package_obeys_its_laws(exercise, law):
    law(SOLUTIONS[exercise])


def first_broken(exercise, candidate):
    for law in laws(exercise):
        try:
            law(candidate)
        except Exception:
            return law.name
    return None


class NoLastNorm(Transformer):
    def __init__(self, config):
        super().__init__(config)
        self.norm = nn.Identity()


class OneBlock(Transformer):
    def __init__(self, config):
        super().__init__(config)
        self.blocks = nn.ModuleList([self.blocks[0]] * config.n_layers)


class LargeWriters(Transformer):
    def reset_parameters(self, std=0.02):
        init_weights(self, 1, std)


class LargeStart(Transformer):
    def reset_parameters(self, std=0.02):
        init_weights(self, self.config.n_layers, 1.0)


class TwoWay(Transformer):
    def hidden(self, tokens, **kwargs):
        return super().hidden(
            tokens, **{"mask": Mask(causal=False), **{k: v for k, v in kwargs.items() if v is not None}}
        )


class Deaf(Transformer):  # does not hand the mask on
    def hidden(self, tokens, **kwargs):
        return super().hidden(tokens, **{**kwargs, "mask": None})


class FromZero(Transformer):  # positions start at 0 at every call
    def hidden(self, tokens, **kwargs):
        return super().hidden(tokens, **{**kwargs, "positions": torch.arange(tokens.shape[1])[None]})


class Skipping(Transformer):
    def hidden(self, tokens, **kwargs):
        blocks, self.blocks = self.blocks, self.blocks[:-1]
        try:
            return super().hidden(tokens, **kwargs)
        finally:
            self.blocks = blocks


class NormedStream(Transformer):
    def __init__(self, config):
        super().__init__(dataclasses.replace(config, residual="glm"))


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        (
            lambda config: Part(lambda tokens: tokens),
            "tokens go in, one score for every next token comes out",
        ),
        (NoLastNorm, "the head reads a normed stream"),
        (OneBlock, "each block has its own weights"),
        (TwoWay, "no token sees a later one"),
        (NormedStream, "blocks that write nothing change nothing"),
        (Skipping, "every block is read"),
        (LargeWriters, "weights that write to the stream start smaller"),
        (LargeStart, "an untrained model knows nothing"),
        (Deaf, "a prefix is read in both directions"),
        (FromZero, "decoding with a cache equals reading all at once"),
    ],
)
def test_check_names_the_broken_law(wrong, law):
    assert first_broken("transformer.model", wrong) == law


@pytest.mark.parametrize(
    ("exercise", "wrong", "law"),
    [
        ("block", lambda x, a, m, n, k: (x := n(x) + a(n(x))) + m(k(x)), "the case computed by hand"),
        ("block", lambda x, a, m, n, k: (x := x + a(n(x))) + m(n(x)), "each part has its own norm"),
        ("block", lambda x, a, m, n, k: x + a(n(x)) + m(k(x)), "the MLP reads what the attention wrote"),
        ("count", lambda c: count_parameters(dataclasses.replace(c, n_kv_heads=c.n_heads)).total, "grouped queries make wk and wv smaller"),
        ("count", lambda c: count_parameters(dataclasses.replace(c, tied=False)).total, "a tied head has no weights of its own"),
        ("count", lambda c: count_parameters(dataclasses.replace(c, qkv_bias=False)).total, "ChatGLM2 has biases on q, k and v"),
        ("count", lambda c: count_parameters(dataclasses.replace(c, norm="rms")).total, "ChatGLM-6B: two matrices, biases everywhere, norms with a shift"),
        ("dialogue_mask", lambda t: dialogue_mask(t)[1:], "one row and one column per token"),
        ("dialogue_mask", lambda t: torch.eye(sum(map(sum, t)), dtype=torch.bool), "every token sees itself and all before it"),
        ("dialogue_mask", lambda t: torch.ones_like(dialogue_mask(t)).tril(), "a question is read in both directions"),
        ("dialogue_mask", lambda t: torch.ones_like(dialogue_mask(t)), "an answer never sees its own future"),
        ("dialogue_mask", lambda t: dialogue_mask(t) | (torch.arange(sum(map(sum, t))) < sum(map(sum, t[:-1])) + t[-1][0]) & (torch.arange(sum(map(sum, t))) % 100 < 3)[:, None], "a new turn changes nothing for the old ones"),
        ("max_context", lambda c, n: (n - 2 * count_parameters(c).total) // kv_cache_bytes(c, 1), "no room for the weights, no context"),
        ("max_context", lambda c, n: -(-(n - 2 * count_parameters(c).total) // kv_cache_bytes(c, 1)), "a part of a token is no token"),
        ("max_context", lambda c, n: n // kv_cache_bytes(c, 1), "the cache of one token"),
    ],
)  # fmt: skip
def test_check_names_the_broken_law_of_the_small_exercises(exercise, wrong, law):
    assert first_broken(f"transformer.{exercise}", wrong) == law


# Equivalences, in every variant.


@variants
@torch.no_grad()
def test_cached_equals_uncached(config):
    model, x = randomised(config, torch.float64), tokens(2, 11)
    cache = model.make_cache(2, 11)
    pieces = [model(part, cache=cache) for part in x.split([4, 1, 1, 5], dim=1)]
    assert_close(torch.cat(pieces, 1), model(x))
    assert cache.length == 11


@variants
@torch.no_grad()
def test_left_padding_changes_nothing(config):
    model, x = randomised(config, torch.float64), tokens(2, 9)
    padded = F.pad(x, (4, 0))
    real = F.pad(torch.ones_like(x, dtype=torch.bool), (4, 0))
    assert_close(model(padded, attention_mask=real)[:, 4:], model(x))
    assert_close(model(padded, mask=Mask(keys=real))[:, 4:], model(x))
    cache = model.make_cache(2, 13)
    model(padded[:, :8], attention_mask=real[:, :8], cache=cache)
    assert_close(model(padded[:, 8:], attention_mask=real, cache=cache), model(x)[:, 4:])


@pytest.mark.parametrize("name", ["llama", "glm", "alibi"])
@torch.no_grad()
def test_prefix_padding_and_cache_together(name):
    model, x = randomised(VARIANTS[name], torch.float64), tokens(1, 9)
    expected = model(x, mask=Mask(prefix=torch.tensor([5])))
    assert (expected - model(x)).abs().max() > 1e-3
    padded, real = F.pad(x, (3, 0)), F.pad(torch.ones_like(x, dtype=torch.bool), (3, 0))
    mask = Mask(prefix=torch.tensor([8]), keys=real)
    assert_close(model(padded, mask=mask)[:, 3:], expected)
    cache = model.make_cache(1, 12)
    pieces = [model(part, mask=mask, cache=cache) for part in padded.split([8, 1, 3], dim=1)]
    assert_close(torch.cat(pieces, 1)[:, 3:], expected)


@torch.no_grad()
def test_given_positions_replace_the_counted_ones():
    model, x = randomised(TINY), tokens(2, 7)
    assert_close(model(x, positions=torch.arange(7)[None] + 100), model(x))  # only distances count
    assert (model(x, positions=3 * torch.arange(7)[None]) - model(x)).abs().max() > 1e-3
    flipped = torch.stack((torch.arange(7), torch.arange(7).flip(0)))
    rows = [model(x[i : i + 1], positions=flipped[i : i + 1]) for i in range(2)]
    assert_close(model(x, positions=flipped), torch.cat(rows))


@torch.no_grad()
def test_packed_documents_do_not_see_each_other():
    model, x = randomised(TINY), tokens(1, 10)
    packed = model(x, mask=Mask(documents=torch.tensor([[0] * 4 + [1] * 6])))
    assert_close(packed, torch.cat([model(x[:, :4]), model(x[:, 4:])], 1))


def test_a_layout_decides_where_tokens_stand_and_what_they_see():
    def layout(tokens, mask, cache):
        prefix = (tokens == 7).int().argmax(1)
        return Mask(prefix=prefix, keys=mask.keys), flat_layout(tokens, mask, cache)[1]

    model = randomised(TINY, layout=layout)
    plain = Transformer(TINY)
    plain.load_state_dict(model.state_dict())
    x = torch.tensor([[1, 2, 3, 4, 7, 5, 6, 8]])
    assert_close(model(x), plain(x, mask=Mask(prefix=torch.tensor([4]))))


def test_the_flat_layout_counts():
    mask = Mask(keys=torch.tensor([[False, False, True, True, True], [True, True, True, True, True]]))
    cache = Transformer(TINY).make_cache(2, 5)
    assert flat_layout(tokens(2, 5), mask)[1].tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert flat_layout(tokens(2, 5), Mask())[1].tolist() == [[0, 1, 2, 3, 4]]
    cache.advance(3)
    assert flat_layout(tokens(2, 2), mask, cache)[1].tolist() == [[1, 2], [3, 4]]
    assert flat_layout(tokens(2, 2), Mask(), cache)[1].tolist() == [[3, 4]]


def test_the_prefix_layout_is_glms():
    first, second = prefix_layout(tokens(1, 6), Mask(prefix=torch.tensor([4])))[1][0].tolist()
    assert first == [0, 1, 2, 3, 3, 3]
    assert second == [0, 0, 0, 0, 1, 2]
    left = Mask(keys=torch.tensor([[False, True, True]]))
    assert prefix_layout(tokens(1, 3), left)[1][0].tolist() == [[0, 0, 0], [0, 1, 2]]
    padded = Mask(prefix=torch.tensor([4]), keys=torch.tensor([[False, True, True, True, True, True]]))
    first, second = prefix_layout(tokens(1, 6), padded)[1][0].tolist()
    assert first == [0, 0, 1, 2, 2, 2]
    assert second == [0, 0, 0, 0, 1, 2]
    assert prefix_layout(tokens(1, 3), Mask())[1][0].tolist() == [[0, 0, 0], [1, 2, 3]]


# The dialogue: what the article says about decoder-only training.


def test_one_causal_pass_has_the_gradient_of_all_turns():
    model, x, turn = randomised(TINY, torch.float64), tokens(1, 24), 8

    def gradient(start, end, mask=None):
        losses = F.cross_entropy(model(x[:, : end - 1], mask=mask)[0], x[0, 1:end], reduction="none")
        answers = torch.arange(1, end) % turn >= 4
        loss = losses[answers & (torch.arange(1, end) >= start)].sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    causal = [gradient(i * turn, (i + 1) * turn) for i in range(3)]
    assert_close(gradient(0, 24), sum(causal))
    prefixes = [Mask(prefix=torch.tensor([i * turn + 4])) for i in range(3)]
    copies = sum(gradient(i * turn, (i + 1) * turn, prefixes[i]) for i in range(3))
    assert (gradient(0, 24, prefixes[0]) - copies).norm() > 0.01 * copies.norm()


@torch.no_grad()
def test_the_glm_block_is_deep_norm():
    model, x = randomised(GLM, torch.float64), tokens()
    angles = model.position.angles(prefix_layout(x, Mask())[1])
    norms = [norm for block in model.blocks for norm in (block.attn_norm, block.mlp_norm)] + [model.norm]
    y, alpha = norms[0](model.embed(x)), math.sqrt(56)
    for n, block in enumerate(model.blocks):
        y = norms[2 * n + 1](alpha * y + block.attn(y, angles=angles))
        y = norms[2 * n + 2](alpha * y + block.mlp(y))
    assert_close(model.hidden(x), y)


# Counts.


def configs():
    sizes = st.integers(1, 4)
    return st.builds(
        lambda groups, kv, head, layers, vocab, hidden, **more: ModelConfig(
            dim=groups * kv * 4 * head, n_heads=groups * kv, n_kv_heads=kv, n_layers=layers, vocab_size=vocab,
            hidden_dim=hidden, max_seq_len=8, **more,
        ),
        sizes, sizes, sizes, sizes, st.integers(2, 40), st.integers(1, 40),
        norm=st.sampled_from(["rms", "layer"]), mlp=st.sampled_from(["swiglu", "gelu"]),
        residual=st.sampled_from(["pre", "glm"]), tied=st.booleans(), qkv_bias=st.booleans(), out_bias=st.booleans(),
        mlp_bias=st.booleans(), position=st.sampled_from(["rope", "rope2d", "alibi", "none"]), norm_head=st.booleans(),
    )  # fmt: skip


@given(configs())
@settings(max_examples=40, deadline=None)
def test_the_counted_parameters_are_the_real_ones(config):
    with torch.device("meta"):
        model = Transformer(config)
    count = count_parameters(config)
    assert count.total == sum(weight.numel() for weight in model.parameters())
    parts = {"attention": ".attn.", "mlp": ".mlp.", "norms": "norm.", "embedding": "embed.", "head": "head."}
    for part, mark in parts.items():
        found = sum(w.numel() for name, w in model.named_parameters() if mark in name)
        assert found == getattr(count, part), part


@pytest.mark.parametrize("name", ["llama", "tied", "multi-query", "chatglm2", "norm head"])
def test_the_counted_operations_are_the_real_ones(name):
    config = VARIANTS[name]
    with torch.device("meta"):
        model, x = Transformer(config), torch.zeros(2, 9, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        logits = model(x)
    assert counter.get_total_flops() == 18 * flops_per_token(config, 9)
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    assert counter.get_total_flops() == 18 * (
        flops_per_token(config, 9, backward=True) - flops_per_token(config, 9)
    )


def test_biases_are_no_matrix_products():
    assert flops_per_token(GLM, 9) == flops_per_token(
        dataclasses.replace(GLM, qkv_bias=False, mlp_bias=False), 9
    )


@variants
def test_the_counted_cache_is_the_real_one(config):
    for dtype in (torch.float32, torch.bfloat16):
        cache = Transformer(config).to(dtype).make_cache(3, 17)
        assert kv_cache_bytes(config, 17, batch_size=3, dtype=dtype) == cache.n_bytes


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_counted_activations_are_the_real_ones(config, dtype):
    model, kept = Transformer(config).to(dtype), {}
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def note(saved):
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        output = model(tokens(2, 9))
    found = sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)
    assert output.requires_grad
    assert activation_bytes(config, batch_size=2, seq_len=9, dtype=dtype) == found


def test_training_takes_sixteen_bytes_per_parameter():
    for dtype in (torch.float32, torch.bfloat16):
        memory = training_memory(TINY, batch_size=2, seq_len=9, dtype=dtype)
        assert memory.weights + memory.gradients + memory.optimizer == 16 * count_parameters(TINY).total
        assert memory.activations == activation_bytes(TINY, batch_size=2, seq_len=9, dtype=dtype)
        assert memory.total == 16 * count_parameters(TINY).total + memory.activations


# Start, dtypes, compilation.


@pytest.mark.parametrize("name", ["llama", "tied", "glm"])
def test_the_start(name):
    model = Transformer(
        dataclasses.replace(VARIANTS[name], dim=192, hidden_dim=256, n_layers=8, vocab_size=300)
    )
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            assert (weight == (1.0 if name.endswith("norm.weight") else 0.0)).all(), name
        else:
            expected = 0.02 / 4 if "wo" in name or "w_down" in name else 0.02
            assert abs(weight.std().item() / expected - 1) < 0.05, name
            assert abs(weight.mean().item()) < 0.1 * expected, name


def test_the_stream_keeps_its_size_at_any_depth():
    final = {}
    for n_layers in (4, 32):
        trunk = Trunk(dataclasses.replace(TINY, n_layers=n_layers))
        init_weights(trunk, n_layers, std=48**-0.5)
        with torch.no_grad():
            x = trunk.embed(tokens(4, 16))
            for block in trunk.blocks:
                x = block(x)
        final[n_layers] = x.square().mean().sqrt().item()
    assert 0.6 < final[32] / final[4] < 1.6


def test_a_model_made_on_the_meta_device_is_the_same_model():
    with torch.device("meta"):
        model = Transformer(TINY)
    model.to_empty(device="cpu")
    x = tokens()
    torch.manual_seed(1)
    model.reset_parameters()
    torch.manual_seed(1)
    expected = Transformer(TINY)
    expected.reset_parameters()  # the first start has moved the generator
    torch.manual_seed(1)
    expected.reset_parameters()
    assert torch.equal(model(x), expected(x))
    with torch.device("meta"):
        loaded = Transformer(TINY)
    loaded.load_state_dict(expected.state_dict(), assign=True)
    assert torch.equal(loaded(x), expected(x))


@pytest.mark.parametrize("name", ["llama", "chatglm2", "glm", "alibi"])
@torch.no_grad()
def test_bfloat16_weights_and_autocast(name):
    config = dataclasses.replace(VARIANTS[name], max_seq_len=600)
    model = randomised(config).to(torch.bfloat16)  # the weights round; nothing else may
    exact = Transformer(config).double()
    exact.load_state_dict(model.state_dict())
    x = tokens(1, 600)  # far enough that rounded frequencies would show
    expected = exact(x)

    def error(logits):
        return ((logits - expected).norm() / expected.norm()).item()

    assert model(x).dtype == torch.bfloat16
    assert error(model(x)) < 0.02
    with torch.autocast("cpu", torch.bfloat16):
        assert error(exact.float()(x)) < 0.02


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_gets_a_finite_gradient(config, dtype):
    model, x = randomised(config, dtype), tokens()
    F.cross_entropy(model(x)[:, :-1].flatten(0, 1).float(), x[:, 1:].flatten()).backward()
    for name, weight in model.named_parameters():
        if name.endswith("wk.bias") and config.position in ("alibi", "none"):
            continue
        assert weight.grad is not None, name
        assert weight.grad.dtype == dtype
        assert weight.grad.isfinite().all(), name
        assert weight.grad.any(), name


COMPILE = """
import dataclasses, torch
from torch.nn import functional as F
from minillm.attention import Mask
from minillm.transformer import ModelConfig, Transformer

tiny = ModelConfig(vocab_size=61, dim=48, n_layers=2, n_heads=6, n_kv_heads=3, hidden_dim=56, max_seq_len=64)
glm = dict(norm="layer", mlp="gelu", position="rope2d", residual="glm", qkv_bias=True, out_bias=True, mlp_bias=True)
x = torch.randint(61, (2, 12))
packed = Mask(documents=torch.arange(12)[None].expand(2, -1) // 5)
chatglm2 = dict(rope_fraction=0.5, rope_interleaved=True, norm_head=True)
for change, mask in (({}, None), ({}, packed), (chatglm2, None), (glm, packed), (dict(position="alibi"), None)):
    torch._dynamo.reset()
    model = Transformer(dataclasses.replace(tiny, **change))
    gradients = []
    for run in (model, torch.compile(model, backend="eager", fullgraph=True)):
        loss = F.cross_entropy(run(x, mask=mask)[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for eager, traced in zip(*gradients):
        torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-6)
    print("compiled")
"""


def test_training_compiles_without_a_graph_break():
    """In a process of its own: the checks of shapes that these tests run under cannot be traced."""
    run = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True)
    assert run.stdout.count("compiled") == 5, run.stderr[-2000:]


# Bad input.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 50}, "dim must be a multiple of n_heads, got 50 and 6"),
        ({"n_kv_heads": 4}, "n_heads must be a multiple of n_kv_heads, got 6 and 4"),
        ({"n_layers": 0}, "n_layers must be a whole number of at least 1, got 0"),
        ({"vocab_size": -3}, "vocab_size must be a whole number of at least 1, got -3"),
        ({"hidden_dim": 56.0}, "hidden_dim must be a whole number of at least 1, got 56.0"),
        ({"n_heads": True}, "n_heads must be a whole number of at least 1, got True"),
        ({"norm": "batch"}, "norm must be one of 'rms', 'layer', got 'batch'"),
        ({"mlp": "relu"}, "mlp must be one of 'swiglu', 'gelu', got 'relu'"),
        ({"position": None}, "position must be one of 'rope', 'rope2d', 'alibi', 'none', got None"),
        ({"residual": "post"}, "residual must be one of 'pre', 'glm', got 'post'"),
        ({"norm_eps": 0.0}, "norm_eps must be a finite number above 0, got 0.0"),
        ({"rope_theta": math.nan}, "rope_theta must be a finite number above 0, got nan"),
        ({"rope_scale": math.inf}, "rope_scale must be a finite number above 0, got inf"),
        ({"tied": 1}, "tied must be True or False, got 1"),
        ({"rope_fraction": 1.5}, "rope_fraction must turn an even number of head_dim = 8, got 1.5: 12"),
        ({"rope_fraction": 0.4}, "rope_fraction must turn an even number of head_dim = 8, got 0.4: 3"),
        ({"rope_fraction": 0.1}, "rope_fraction must turn an even number of head_dim = 8, got 0.1: 0"),
        ({"dim": 36, "position": "rope2d"}, "head_dim must be a multiple of 4 for 2D rotary, got 6"),
        (
            {"position": "alibi", "rope_theta": 5e5},
            "rope_theta has no effect with position='alibi': leave it out",
        ),
        (
            {"position": "rope2d", "rope_scale": 2.0},
            "rope_scale has no effect with position='rope2d': leave it out",
        ),
    ],
)
def test_a_bad_shape_is_named(change, message):
    config = copy.copy(TINY)  # not `replace`: the tests' own check of types would come first
    for name, value in change.items():
        object.__setattr__(config, name, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        config.__post_init__()


def test_bad_calls_are_named():
    model = Transformer(TINY)
    hidden = getattr(Trunk.hidden, "__wrapped__", Trunk.hidden)  # without the tests' own check of shapes
    with pytest.raises(
        ValueError, match=re.escape("tokens must be (B, T), got (5,): one sequence is tokens[None]")
    ):
        hidden(model, torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match="give mask or attention_mask, not both"):
        model(tokens(), mask=Mask(), attention_mask=torch.ones(2, 12, dtype=torch.bool))
    cache = model.make_cache(2, 4)
    with pytest.raises(ValueError, match="max_tokens"):
        model(tokens(2, 5), cache=cache)


def test_a_shape_is_frozen_and_round_trips():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.dim = 3
    assert ModelConfig(**dataclasses.asdict(GLM)) == GLM
    assert TINY.head_dim == 8
    assert CHATGLM2.rotary_dim == 4


def test_the_names_of_the_weights_do_not_change():
    names = [
        name.removeprefix("blocks.0.")
        for name, _ in Transformer(dataclasses.replace(TINY, n_layers=1)).named_parameters()
    ]
    assert sorted(names) == [
        "attn.wk.weight", "attn.wo.weight", "attn.wq.weight", "attn.wv.weight", "attn_norm.weight", "embed.weight",
        "head.weight", "mlp.w_down.weight", "mlp.w_gate.weight", "mlp.w_up.weight", "mlp_norm.weight", "norm.weight",
    ]  # fmt: skip
