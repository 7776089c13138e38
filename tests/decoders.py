"""Small models of every kind that decodes, and greedy text the slow way, for the tests of chapter 17 and of `serving`."""

import dataclasses

import pytest
import torch

from minillm.transformer import ModelConfig, Transformer

TINY = ModelConfig(
    vocab_size=53, dim=48, n_layers=2, n_heads=6, n_kv_heads=3, hidden_dim=56, max_seq_len=100, norm_eps=1e-3
)


LLAMA_LIKE = {
    "llama": TINY,
    "tied": dataclasses.replace(TINY, tied=True),
    "multi-query": dataclasses.replace(TINY, n_kv_heads=1),
    "multi-head": dataclasses.replace(TINY, n_kv_heads=6),
    "chatglm2": dataclasses.replace(
        TINY, rope_fraction=0.5, rope_interleaved=True, qkv_bias=True, rope_scale=4.0
    ),
    "alibi": dataclasses.replace(TINY, position="alibi", out_bias=True, mlp_bias=True),
    "norm head": dataclasses.replace(TINY, norm_head=True, position="none"),
}


GLM = dataclasses.replace(
    TINY, n_kv_heads=6, norm="layer", mlp="gelu", position="rope2d", residual="glm",
    qkv_bias=True, out_bias=True, mlp_bias=True,
)  # fmt: skip


PROMPTS = [[5, 1, 7], [3, 52, 9, 11, 2, 30, 8], [6]]


def make(config=TINY, dtype=torch.float64):
    """A model whose every weight matters, and whose greedy text does not settle on one token."""
    model = Transformer(config)
    model.reset_parameters(std=0.2)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return model.to(dtype)


def uncached(model, prompt, n):
    """Greedy, the whole text through the model for each token."""
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(n):
            tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
    return tokens[0, len(prompt) :].tolist()


all_models = pytest.mark.parametrize("config", [*LLAMA_LIKE.values(), GLM], ids=[*LLAMA_LIKE, "glm"])


llama_like = pytest.mark.parametrize("config", LLAMA_LIKE.values(), ids=LLAMA_LIKE)
