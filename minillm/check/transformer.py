"""Laws of chapter 13."""

import dataclasses
import math

import torch
from torch import nn
from torch.nn import functional as F

from minillm.attention import Mask
from minillm.check import close, law
from minillm.transformer import ModelConfig

LLAMA = ModelConfig(
    vocab_size=97, dim=48, n_layers=4, n_heads=6, n_kv_heads=2, hidden_dim=64, max_seq_len=32, norm_eps=1e-6
)
GLM = ModelConfig(
    vocab_size=53, dim=32, n_layers=3, n_heads=4, n_kv_heads=4, hidden_dim=72, max_seq_len=32, position="rope2d",
    norm="layer", mlp="gelu", residual="glm", qkv_bias=True, out_bias=True, mlp_bias=True,
)  # fmt: skip


# A whole model: candidate(config) is a module.


@law(
    "transformer.model", "tokens go in, one score for every next token comes out", hint="logits are (B, T, V)"
)
def _(make):
    logits = make(LLAMA)(torch.randint(97, (2, 5)))
    assert logits.shape == (2, 5, 97), f"logits are {tuple(logits.shape)}, expected (2, 5, 97)"


@law("transformer.model", "the head reads a normed stream", hint="norm once more after the last block")
def _(make):
    model, tokens = make(LLAMA), torch.randint(97, (2, 7))
    with torch.no_grad():
        for weight in model.embed.parameters():
            weight.mul_(20)
        size = model.hidden(tokens).square().mean(-1).sqrt()
    close(size, torch.ones_like(size), rtol=1e-2, what="root mean square of the hidden states")


@law(
    "transformer.model",
    "each block has its own weights",
    hint="make n_layers blocks; a list times n repeats one",
)
def _(make):
    dim, kv_dim, hidden_dim = 48, 16, 64
    block = 2 * dim * dim + 2 * dim * kv_dim + 3 * dim * hidden_dim + 2 * dim
    for tied in (False, True):
        found = sum(weight.numel() for weight in make(dataclasses.replace(LLAMA, tied=tied)).parameters())
        expected = (1 if tied else 2) * 97 * dim + LLAMA.n_layers * block + dim
        assert found == expected, f"{found:,} parameters, expected {expected:,}" + " with tied weights" * tied


@law("transformer.model", "no token sees a later one", hint="the default mask is causal, in every layer")
def _(make):
    model, tokens = make(LLAMA), torch.randint(97, (1, 12))
    changed = tokens.clone()
    changed[0, 7:] = (tokens[0, 7:] + 1) % 97
    with torch.no_grad():
        before, after = model(tokens)[0], model(changed)[0]
    close(after[:7], before[:7], what="logits before the change")
    assert not torch.allclose(after[7:], before[7:]), "a changed token changes nothing"


@law(
    "transformer.model",
    "blocks that write nothing change nothing",
    hint="each part adds to the stream it reads",
)
def _(make):
    model, tokens = make(LLAMA), torch.randint(97, (2, 6))
    with torch.no_grad():
        for block in model.blocks:
            block.attn.wo.weight.zero_()
            block.mlp.w_down.weight.zero_()
        x = model.embed(tokens)
        normed = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        close(model(tokens), F.linear(normed, model.head.weight), what="logits")


@law("transformer.model", "every block is read", hint="feed each block with what the one before it returned")
def _(make):
    model, tokens = make(LLAMA), torch.randint(97, (2, 6))
    model(tokens).square().sum().backward()
    for n, block in enumerate(model.blocks):
        silent = [
            name for name, weight in block.named_parameters() if weight.grad is None or not weight.grad.any()
        ]
        assert not silent, f"no gradient reaches {silent[0]} of block {n}"


@law(
    "transformer.model",
    "weights that write to the stream start smaller",
    hint="divide the initial standard deviation of wo and w_down by sqrt(2 n_layers)",
)
def _(make):
    model = make(dataclasses.replace(LLAMA, dim=192, hidden_dim=256, n_layers=8))
    for block in model.blocks:
        for name, linear in (("wo", block.attn.wo), ("w_down", block.mlp.w_down)):
            ratio = (linear.weight.std() / block.attn.wq.weight.std()).item()
            assert abs(ratio * 4 - 1) < 0.1, f"{name} is {ratio:.2f} times as large as wq, expected 0.25"


@law(
    "transformer.model",
    "an untrained model knows nothing",
    hint="small weights: the first loss is close to ln V",
)
def _(make):
    logits = make(dataclasses.replace(LLAMA, vocab_size=512))(torch.randint(512, (4, 16)))
    loss = F.cross_entropy(logits.flatten(0, 1), torch.randint(512, (64,))).item()
    assert abs(loss - math.log(512)) < 0.1, f"first loss {loss:.2f} nats, ln 512 is {math.log(512):.2f}"


@law("transformer.model", "a prefix is read in both directions", hint="hand the mask to every block")
def _(make):
    model, tokens = make(LLAMA), torch.randint(97, (1, 12))
    changed = tokens.clone()
    changed[0, 4] = (tokens[0, 4] + 1) % 97
    mask = Mask(prefix=torch.tensor([5]))
    with torch.no_grad():
        before, after = model(tokens, mask=mask), model(changed, mask=mask)
    moved = (after - before).abs().amax(-1)[0]
    assert (moved > 0).all(), (
        f"token {int(moved.argmin())} does not notice a change at token 4, inside the prefix"
    )


@law(
    "transformer.model",
    "decoding with a cache equals reading all at once",
    hint="positions go on where the cache ends",
)
def _(make):
    model, tokens = make(LLAMA), torch.randint(97, (2, 9))
    cache = model.make_cache(2, 9)
    with torch.no_grad():
        steps = [model(tokens[:, a:b], cache=cache) for a, b in ((0, 4), (4, 5), (5, 9))]
        close(torch.cat(steps, 1), model(tokens), what="logits")


# candidate(x, attn, mlp, attn_norm, mlp_norm) -> x


@law(
    "transformer.block", "the case computed by hand", hint="x = x + attn(norm(x)), then x = x + mlp(norm(x))"
)
def _(block):
    result = block(torch.tensor([3.0]), lambda x: 2 * x, lambda x: 10 * x, torch.sign, torch.sign)
    close(result, torch.tensor([15.0]))


@law(
    "transformer.block",
    "parts that return zero leave the stream alone",
    hint="the stream itself is not normed",
)
def _(block):
    x = torch.randn(2, 3, 8)
    norm = nn.LayerNorm(8)
    close(block(x, torch.zeros_like, torch.zeros_like, norm, norm), x)


@law(
    "transformer.block",
    "the MLP reads what the attention wrote",
    hint="one after the other, not both from the same x",
)
def _(block):
    result = block(torch.tensor([2.0]), lambda x: x, lambda x: x * x, lambda x: x, lambda x: x)
    close(result, torch.tensor([20.0]))


@law("transformer.block", "each part has its own norm", hint="attn_norm before attn, mlp_norm before mlp")
def _(block):
    result = block(torch.tensor([1.0]), lambda x: x, lambda x: 100 * x, lambda x: 3 * x, lambda x: 5 * x)
    close(result, torch.tensor([2004.0]))


# candidate(config) -> int


def _count(config: ModelConfig) -> int:
    """Counted matrix by matrix."""
    dim, kv_dim, hidden = config.dim, config.dim // config.n_heads * config.n_kv_heads, config.hidden_dim
    shapes = [(dim, dim, config.qkv_bias), (kv_dim, dim, config.qkv_bias), (kv_dim, dim, config.qkv_bias)]
    shapes += [(dim, dim, config.out_bias), (dim, hidden, config.mlp_bias), (hidden, dim, config.mlp_bias)]
    if config.mlp == "swiglu":
        shapes.append((hidden, dim, config.mlp_bias))
    block = sum(out * into + out * bias for out, into, bias in shapes)
    norm = dim if config.norm == "rms" else 2 * dim
    tables = config.vocab_size * dim * (1 if config.tied else 2)
    return tables + config.n_layers * (block + 2 * norm) + norm


def _compare(count, config: ModelConfig) -> None:
    found, expected = count(config), _count(config)
    assert found == expected, f"{found:,} for a model of {expected:,}"


@law(
    "transformer.count",
    "LLaMA with as many kv heads as heads",
    hint="per block 4 D² + 3 D F + 2 D; and the last norm",
)
def _(count):
    _compare(count, dataclasses.replace(LLAMA, n_kv_heads=6))


@law("transformer.count", "grouped queries make wk and wv smaller", hint="wk and wv are (K Dh, D)")
def _(count):
    _compare(count, LLAMA)
    _compare(count, dataclasses.replace(LLAMA, n_kv_heads=1))


@law("transformer.count", "a tied head has no weights of its own", hint="count V D once when config.tied")
def _(count):
    _compare(count, dataclasses.replace(LLAMA, tied=True))


@law(
    "transformer.count",
    "ChatGLM2 has biases on q, k and v",
    hint="a bias has as many numbers as its matrix has rows",
)
def _(count):
    _compare(count, dataclasses.replace(LLAMA, qkv_bias=True))


@law(
    "transformer.count",
    "ChatGLM-6B: two matrices, biases everywhere, norms with a shift",
    hint="LayerNorm has 2 D",
)
def _(count):
    _compare(count, GLM)


# candidate(turns) -> (T, T) booleans, True where the row may see the column; turns are (question, answer) lengths

_TURNS = [(3, 2), (1, 4), (4, 1)]


@law("transformer.dialogue_mask", "one row and one column per token", hint="T is the sum of all lengths")
def _(make):
    mask = make(_TURNS)
    assert mask.dtype == torch.bool, f"dtype {mask.dtype}, expected torch.bool"
    assert mask.shape == (15, 15), f"shape {tuple(mask.shape)}, expected (15, 15)"


@law(
    "transformer.dialogue_mask",
    "every token sees itself and all before it",
    hint="begin with torch.ones(T, T).tril()",
)
def _(make):
    assert make(_TURNS)[torch.ones(15, 15, dtype=torch.bool).tril()].all(), "an earlier token is hidden"


@law(
    "transformer.dialogue_mask",
    "a question is read in both directions",
    hint="fill the square of each question",
)
def _(make):
    mask = make(_TURNS)
    assert mask[0:3, 0:3].all(), "the first question does not see all of itself"
    assert mask[10:14, 10:14].all(), "the third question does not see all of itself"


@law(
    "transformer.dialogue_mask",
    "an answer never sees its own future",
    hint="only the squares of questions are two-way",
)
def _(make):
    mask = make(_TURNS)
    for start, stop in ((3, 5), (6, 10), (14, 15)):
        for row in range(start, stop):
            assert not mask[row, row + 1 :].any(), f"token {row}, of an answer, sees a later one"


@law(
    "transformer.dialogue_mask",
    "a new turn changes nothing for the old ones",
    hint="no row may see a later turn",
)
def _(make):
    longer = make(_TURNS)
    for n in (1, 2):
        shorter = make(_TURNS[:n])
        size = len(shorter)
        assert torch.equal(longer[:size, :size], shorter), "the old rows look different once a turn is added"
        assert not longer[:size, size:].any(), "an old token sees a new one"


# candidate(config, n_bytes) -> tokens


@law(
    "transformer.max_context",
    "the cache of one token",
    hint="2 (keys, values) · L · K · Dh numbers of 2 bytes",
)
def _(longest):
    weights, token = 2 * _count(LLAMA), 2 * 2 * 4 * 2 * 8
    for n_tokens in (1, 1000):
        found = longest(LLAMA, weights + n_tokens * token)
        assert found == n_tokens, f"{found} tokens, expected {n_tokens}"


@law("transformer.max_context", "a part of a token is no token", hint="round down")
def _(longest):
    weights, token = 2 * _count(LLAMA), 2 * 2 * 4 * 2 * 8
    found = longest(LLAMA, weights + 8 * token - 1)
    assert found == 7, f"{found} tokens, expected 7"


@law("transformer.max_context", "no room for the weights, no context", hint="never less than 0")
def _(longest):
    found = longest(LLAMA, 1000)
    assert found == 0, f"{found} tokens, expected 0"
