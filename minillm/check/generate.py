"""Laws of chapter 17."""

import math

import torch

from minillm.check import close, law
from minillm.transformer import ModelConfig, Transformer


def _log(*rows):
    return torch.tensor(rows).log()


def _kept(logits):
    assert isinstance(logits, torch.Tensor), f"expected a tensor of logits, got {type(logits).__name__}"
    return [[column for column, value in enumerate(row) if value > -math.inf] for row in logits.tolist()]


@law(
    "generate.top_p",
    "keeps the smallest set that reaches p",
    hint="sort by probability, add up from the top, stop when the sum reaches p",
)
def _(f):
    logits = _log([0.5, 0.2, 0.2, 0.1])
    for p, kept in ((0.3, [0]), (0.6, [0, 1]), (0.8, [0, 1, 2]), (0.95, [0, 1, 2, 3])):
        found = _kept(f(logits + torch.tensor([0, 0.01, 0, 0]), p))[0]  # 0.01: no two are equal
        assert found == kept, f"of (0.5, 0.2, 0.2, 0.1) with p = {p} it keeps {found}, expected {kept}"


@law(
    "generate.top_p",
    "each row by itself",
    hint="sort along the last axis and scatter back into each row's own order",
)
def _(f):
    logits = _log([0.1, 0.6, 0.3], [0.7, 0.2, 0.1], [0.3, 0.1, 0.6])
    found = _kept(f(logits, 0.65))
    assert found == [[1, 2], [0], [0, 2]], f"three rows with p = 0.65: it keeps {found}"


@law("generate.top_p", "leaves kept logits as they are", hint="only write -inf; do not normalise")
def _(f):
    logits = 3 * torch.randn(4, 50) + 1
    out = f(logits.clone(), 0.7)
    kept = out > -math.inf
    assert kept.any(-1).all(), "a row lost all of its tokens"
    close(out[kept], logits[kept])


@law("generate.top_p", "keeps at least one token", hint="the token that crosses p stays")
def _(f):
    found = _kept(f(_log([0.9, 0.06, 0.04], [0.25, 0.4, 0.35]), 1e-9))
    assert found == [[0], [1]], (
        f"with p = 0.000000001 it keeps {found}, expected the most probable one of each row"
    )


@law("generate.top_p", "p = 1 keeps everything", hint="the whole sum never exceeds 1 by more than rounding")
def _(f):
    out = f(torch.randn(3, 20), 1.0)
    assert (out > -math.inf).all(), "with p = 1 a token was dropped"


@law(
    "generate.draw",
    "a certain token is drawn for sure",
    hint="softmax first; a logit of -inf has probability 0",
)
def _(f):
    logits = torch.full((3, 5), -math.inf)
    logits[torch.arange(3), torch.tensor([4, 0, 2])] = 7.0
    tokens = f(logits, torch.Generator().manual_seed(0))
    assert tokens.tolist() == [4, 0, 2], f"drew {tokens.tolist()}, expected [4, 0, 2]"


@law(
    "generate.draw",
    "one seed, one draw",
    hint="take every random number from the generator that is passed in",
)
def _(f):
    logits = torch.randn(64, 100)
    torch.manual_seed(1)
    a = f(logits, torch.Generator().manual_seed(5))
    torch.manual_seed(2)
    assert torch.equal(a, f(logits, torch.Generator().manual_seed(5))), "one seed gave two draws"
    assert not torch.equal(a, f(logits, torch.Generator().manual_seed(6))), "two seeds gave one draw"


@law(
    "generate.draw",
    "frequencies are the softmax",
    hint="Gumbel noise is -log(-log u) with u uniform in (0, 1)",
)
def _(f):
    p = torch.tensor([0.5, 0.25, 0.15, 0.09, 0.01])
    n = 40_000
    counts = torch.bincount(f(p.log().expand(n, -1), torch.Generator().manual_seed(0)), minlength=5)
    chi2 = ((counts - n * p).square() / (n * p)).sum().item()
    assert chi2 < 23.5, f"chi-square {chi2:.0f} with 4 degrees of freedom: happens once in 10,000 by chance"


@law("generate.draw", "rows are independent", hint="a number per row and token, not one for all rows")
def _(f):
    tokens = f(torch.zeros(1000, 2), torch.Generator().manual_seed(0))
    share = tokens.float().mean().item()
    assert 0.4 < share < 0.6, f"of 1000 fair rows {share:.0%} drew token 1"


def _model():
    config = ModelConfig(
        vocab_size=40, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, max_seq_len=64
    )
    model = Transformer(config)
    model.reset_parameters(std=0.3)
    return model.eval()


class _Counting:
    """A model that notes how many tokens it is given."""

    def __init__(self, model):
        self.model, self.config, self.widths = model, model.config, []

    def __call__(self, tokens, **kwargs):
        self.widths.append(tokens.shape[1])
        return self.model(tokens, **kwargs)

    def make_cache(self, batch_size, max_tokens):
        return self.model.make_cache(batch_size, max_tokens)


def _uncached(model, prompt, n):
    tokens = torch.tensor([prompt])
    for _ in range(n):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
    return tokens[0, len(prompt) :].tolist()


@law(
    "generate.greedy", "the first token is right", hint="the logits of the last column choose the next token"
)
def _(f):
    model = _model()
    with torch.no_grad():
        assert list(f(model, [3, 1, 4], 1)) == _uncached(model, [3, 1, 4], 1), "the first new token differs"


@law(
    "generate.greedy",
    "equals the uncached result",
    hint="after the prompt, pass only the newest token, as (1, 1), and always the same cache",
)
def _(f):
    model = _model()
    with torch.no_grad():
        for prompt in ([3, 1, 4, 1, 5], [9]):
            found, expected = list(f(model, prompt, 20)), _uncached(model, prompt, 20)
            assert len(found) == 20, f"{len(found)} new tokens, expected 20"
            same = next((i for i in range(20) if found[i] != expected[i]), 20)
            assert same == 20, f"differs from the uncached result at new token {same}"


@law("generate.greedy", "reads every token once", hint="first call: the prompt; every later call: one token")
def _(f):
    model = _Counting(_model())
    with torch.no_grad():
        f(model, [3, 1, 4, 1, 5], 10)
    assert model.widths[:1] == [5], (
        f"the first call reads {model.widths[:1]} tokens, expected the 5 of the prompt"
    )
    assert set(model.widths[1:]) == {1}, f"later calls read {model.widths[1:]} tokens, expected 1 each"
    assert len(model.widths) <= 11, f"{len(model.widths)} calls for 10 tokens"


@law(
    "generate.pieces",
    "the pieces make up the text",
    hint="keep the bytes that are not shown yet; show them in order",
)
def _(f):
    data = "One day, Lily. 有一天，小明。🙂 done".encode()
    for width in (1, 2, 3, 7):
        chunks = [data[i : i + width] for i in range(0, len(data), width)]
        assert "".join(f(chunks)) == data.decode(), f"bytes in chunks of {width} do not come back as the text"


@law(
    "generate.pieces",
    "no character is split",
    hint="hold bytes back until they decode; UTF-8 takes at most 4 a character",
)
def _(f):
    data = "小明🙂".encode()
    pieces = list(f([data[i : i + 1] for i in range(len(data))]))
    assert "\ufffd" not in "".join(pieces), "a replacement character was shown"
    assert [p for p in pieces if p] == ["小", "明", "🙂"], f"shown {pieces}, expected one piece per character"


@law("generate.pieces", "whole characters are shown at once", hint="do not wait for the end of the stream")
def _(f):
    shown = []

    def chunks():
        for letter in b"abc":
            yield bytes([letter])
            shown.append(letter)

    first = next(iter(f(chunks())))
    assert first == "a", f"the first piece is {first!r}, expected 'a'"
    assert not shown, "the first piece came only after the next chunk was read"


@law(
    "generate.pieces",
    "broken bytes at the end are shown as U+FFFD",
    hint="at the end decode the rest with errors='replace'",
)
def _(f):
    assert "".join(f([b"a", "明".encode()[:2]])) == "a\ufffd", "an unfinished last character was lost"


def _pair():
    p, q = (3 * torch.randn(2, 8, dtype=torch.float64)).softmax(-1)
    return p, q


@law("generate.speculative", "accepts what the large model likes at least as much", hint="min(1, p / q)")
def _(f):
    p, q = _pair()
    accept, _ = f(p, q)
    assert (accept[p >= q] == 1).all(), "a token with p >= q is not always accepted"
    assert ((accept >= 0) & (accept <= 1)).all(), "a probability lies outside 0 … 1"


@law("generate.speculative", "the rest is a distribution", hint="max(p - q, 0), divided by its sum")
def _(f):
    p, q = _pair()
    _, rest = f(p, q)
    assert (rest >= 0).all(), "a negative probability"
    close(rest.sum(), torch.ones((), dtype=torch.float64), what="the sum of the rest")


@law(
    "generate.speculative",
    "draws exactly from the large model",
    hint="q(x) accept(x) + P(rejected) rest(x) must be p(x)",
)
def _(f):
    p, q = _pair()
    accept, rest = f(p, q)
    close(q * accept + (1 - (q * accept).sum()) * rest, p, what="the probability of each token")


@law(
    "generate.speculative",
    "rejects no more than it must",
    hint="the share accepted is the overlap of p and q",
)
def _(f):
    p, q = _pair()
    accept, _ = f(p, q)
    close((q * accept).sum(), torch.minimum(p, q).sum(), what="the share that is accepted")


@law(
    "generate.speculative",
    "equal models accept everything",
    hint="where p = q nothing is left: avoid dividing by zero",
)
def _(f):
    p, _ = _pair()
    accept, rest = f(p, p.clone())
    assert (accept == 1).all(), "p = q and yet a token may be rejected"
    assert torch.isfinite(rest).all(), "the rest is not finite"
