import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import glm_logits_reference
from tolerances import LOGITS, assert_close
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from minillm import transformer
from minillm.attention import Mask
from minillm.transformer import ModelConfig, NormHead, Transformer

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
        rope = {"rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": config.rope_fraction}
        if config.rope_scale != 1:
            rope |= {"rope_type": "linear", "factor": config.rope_scale}
        peer = GlmForCausalLM(GlmConfig(**settings, rope_parameters=rope, attn_implementation="eager"))
    else:
        peer = LlamaForCausalLM(LlamaConfig(**settings, attn_implementation="eager"))
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
    peer.load_state_dict(state, strict=True)
    return peer.to(weight.dtype).eval()


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
    assert (logits - hugging_face(model, kind)(x).logits).abs().max() < LOGITS[dtype]


@peers
@torch.no_grad()
def test_left_padded_logits_equal_transformers(kind, config):
    model, x = randomised(config), tokens(3, 12)
    real = torch.arange(12) >= torch.tensor([0, 3, 7])[:, None]
    x[~real] = 0
    expected = hugging_face(model, kind)(x, attention_mask=real.long()).logits
    for mask in (real, real.long()):
        assert (model(x, attention_mask=mask) - expected)[real].abs().max() < LOGITS[torch.float32]


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
    model, x, prefix = randomised(GLM, dtype), tokens(2, 10), torch.tensor([4, 7])
    logits = model(x, mask=Mask(prefix=prefix))
    for row in range(2):
        expected = glm_logits_reference(model.state_dict(), GLM.n_layers, GLM.n_heads, x[row].tolist(), int(prefix[row]))
        assert (logits[row] - expected).abs().max() < LOGITS[dtype]


@torch.no_grad()
def test_the_norm_head_equals_its_definition():
    model, x = randomised(VARIANTS["norm head"]), torch.randn(2, 3, 48)
    rows = [row / row.norm() for row in model.head.weight]
    assert_close(model.logits(x), x @ torch.stack(rows).T)
    assert isinstance(model.head, NormHead)
    model.head.weight.mul_(torch.rand(61, 1) + 1)  # the length of a row does not matter
    assert_close(model.logits(x), x @ torch.stack(rows).T)
