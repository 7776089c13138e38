import codecs
import math

import pytest
import torch
from decoders import GLM, PROMPTS, TINY, all_models, make, uncached
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close

from minillm import generate as g
from minillm.check import check, laws
from minillm.generate import Sampler, generate, generate_text, log_likelihood, stream, stream_text
from minillm.serving.fast import obstacle, prepare

# Laws of the exercises.


def gumbel(logits, generator):
    return (logits - torch.log(-torch.log(torch.rand(logits.shape, generator=generator)))).argmax(-1)


def cached_greedy(model, prompt, n):
    cache = model.make_cache(1, len(prompt) + n)
    tokens, new = torch.tensor([prompt]), []
    for _ in range(n):
        tokens = model(tokens, cache=cache)[:, -1:].argmax(-1)
        new.append(tokens.item())
    return new


def utf8_pieces(chunks):
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for chunk in chunks:
        if piece := decoder.decode(chunk):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


def speculative(p, q):
    rest = (p - q).clamp(min=0)
    return (p / q).clamp(max=1), rest / rest.sum() if rest.sum() > 0 else p


SOLUTIONS = {
    "generate.top_p": g.top_p_filter,
    "generate.draw": gumbel,
    "generate.greedy": cached_greedy,
    "generate.pieces": utf8_pieces,
    "generate.speculative": speculative,
}


@pytest.mark.parametrize(
    ("exercise", "law"), [(name, law) for name in SOLUTIONS for law in laws(name)], ids=str
)
def test_solutions_obey_their_laws(exercise, law):
    law(SOLUTIONS[exercise])


def no_cache_shift(model, prompt, n):
    """Passes the newest token twice: off by one."""
    cache = model.make_cache(1, len(prompt) + 2 * n)
    tokens, new = torch.tensor([prompt]), []
    for _ in range(n):
        tokens = model(tokens, cache=cache)[:, -1:].argmax(-1)
        new.append(tokens.item())
        model(tokens, cache=cache)
    return new


def pieces_with(errors):
    return lambda chunks: (chunk.decode(errors=errors) for chunk in chunks)


@pytest.mark.parametrize(
    ("exercise", "wrong", "broken"),
    [
        ("top_p", lambda x, p: x, "keeps the smallest set that reaches p"),
        ("top_p", lambda x, p: g.min_p_filter(x, p), "keeps the smallest set that reaches p"),
        ("top_p", lambda x, p: g.top_p_filter(x[:1], p).expand_as(x), "each row by itself"),
        ("top_p", lambda x, p: g.top_p_filter(x.log_softmax(-1), p), "leaves kept logits as they are"),
        ("top_p", lambda x, p: x.masked_fill(x.softmax(-1) < 0.3, -math.inf) if p < 1e-5 else g.top_p_filter(x, p), "keeps at least one token"),
        ("draw", lambda x, generator: x.argmax(-1), "one seed, one draw"),
        ("draw", lambda x, generator: gumbel(x, None), "one seed, one draw"),
        ("draw", lambda x, generator: gumbel(x / 2, generator), "frequencies are the softmax"),
        ("draw", lambda x, generator: (x - torch.log(-torch.log(torch.rand(x.shape[-1:], generator=generator)))).argmax(-1), "frequencies are the softmax"),
        ("greedy", lambda model, prompt, n: uncached(model, prompt, n), "reads every token once"),
        ("greedy", no_cache_shift, "equals the uncached result"),
        ("pieces", pieces_with("replace"), "the pieces make up the text"),
        ("pieces", lambda chunks: [b"".join(chunks).decode(errors="replace")], "no character is split"),
        ("pieces", pieces_with("ignore"), "the pieces make up the text"),
        ("speculative", lambda p, q: (torch.minimum(p, q), p), "accepts what the large model likes at least as much"),
        ("speculative", lambda p, q: ((p / q).clamp(max=1), p), "draws exactly from the large model"),
        ("speculative", lambda p, q: ((p / q).clamp(max=1), (p - q).clamp(min=0)), "the rest is a distribution"),
    ],
)  # fmt: skip
def test_check_names_the_broken_law(exercise, wrong, broken):
    report = check(f"generate.{exercise}", wrong, quiet=True)
    assert next(rule.name for rule, reason in report.reasons.items() if reason is not None) == broken


# Filters.


@pytest.mark.parametrize("value", [0.01, 0.3, 0.8, 0.95, 1.0])
def test_top_p_and_min_p_equal_transformers(value):
    from transformers import MinPLogitsWarper, TopPLogitsWarper

    logits = 3 * torch.randn(20, 200)
    assert torch.equal(g.top_p_filter(logits, value), TopPLogitsWarper(value)(None, logits))
    assert torch.equal(g.min_p_filter(logits, value), MinPLogitsWarper(value)(None, logits))


@pytest.mark.parametrize("k", [1, 7, 200, 500])
def test_top_k_equals_transformers(k):
    from transformers import TopKLogitsWarper

    logits = torch.randn(20, 200).round(decimals=1)  # with ties
    assert torch.equal(g.top_k_filter(logits, k), TopKLogitsWarper(k)(None, logits))


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty_equals_transformers(penalty):
    from transformers import RepetitionPenaltyLogitsProcessor

    logits, history = torch.randn(4, 30), torch.randint(30, (4, 12))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(history, logits.clone())
    assert_close(g.repetition_penalty(logits, history, penalty), expected)


def test_repetition_penalty_passes_over_padding():
    logits, history = torch.randn(2, 30), torch.tensor([[4, 5, 4], [-1, -1, 9]])
    out = g.repetition_penalty(logits, history, 2.0)
    assert (out != logits).nonzero().tolist() == [[0, 4], [0, 5], [1, 9]]


def test_sampler_filters_in_transformers_order():
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits, history = 3 * torch.randn(8, 100), torch.randint(100, (8, 20))
    theirs = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(1.2), TemperatureLogitsWarper(0.7), TopKLogitsWarper(30),
         TopPLogitsWarper(0.9), MinPLogitsWarper(0.1)]
    )  # fmt: skip
    sampler = Sampler(temperature=0.7, top_k=30, top_p=0.9, min_p=0.1, repetition_penalty=1.2)
    assert_close(sampler.filtered(logits, history), theirs(history, logits.clone()))


@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30), st.floats(0.001, 1.0))
@settings(max_examples=60, deadline=None)
def test_filters_keep_the_best_and_never_reorder(values, p):
    logits = torch.tensor([values])
    for out in (g.top_p_filter(logits, p), g.min_p_filter(logits, p), g.top_k_filter(logits, 3)):
        kept = out > -math.inf
        assert kept[logits == logits.max()].any()
        assert torch.equal(out[kept], logits[kept])
        if (~kept).any():
            assert logits[~kept].max() <= logits[kept].min()


def test_top_p_at_its_edges():
    even = torch.zeros(1, 4)  # four probabilities of exactly 1/4
    for p, n in ((0.25, 1), (0.5, 2), (0.51, 3), (0.75, 3), (1.0, 4)):
        assert (g.top_p_filter(even, p) > -math.inf).sum() == n
    logits = torch.randn(50, 20)
    kept = g.top_p_filter(logits, 1e-9) > -math.inf
    assert torch.equal(kept.nonzero()[:, 1], logits.argmax(-1))


# Drawing.


def test_draw_inverts_the_distribution_function():
    logits = torch.tensor([0.2, 0.0, 0.5, 0.3]).log()
    for u, token in ((0.0, 0), (0.199, 0), (0.201, 2), (0.699, 2), (0.701, 3), (1 - 2**-53, 3)):
        assert g.draw(logits[None], torch.tensor([u], dtype=torch.float64)).item() == token


def test_draw_never_takes_a_dropped_token():
    logits = torch.full((2, 50), -math.inf)
    logits[0, 49], logits[1, 0] = 3.0, -5.0
    for u in (0.0, 0.5, 1 - 2**-53):
        assert g.draw(logits, torch.full((2,), u, dtype=torch.float64)).tolist() == [49, 0]


def test_frequencies_are_the_filtered_softmax():
    logits, n = torch.tensor([2.0, 1.0, 0.5, -1.0]), 20_000
    sampler = Sampler(temperature=0.8, top_k=3)
    drawn = sampler(logits.expand(n, -1), generator=torch.Generator().manual_seed(0))
    p = (logits[:3] / 0.8).softmax(0)
    counts = torch.bincount(drawn, minlength=4).double()
    assert counts[3] == 0
    assert ((counts[:3] - n * p).square() / (n * p)).sum() < 18.4  # chi-square, 2 degrees: 1 in 10,000


def test_limits_of_temperature():
    logits = torch.randn(200, 20)
    best = logits.argmax(-1)
    assert torch.equal(Sampler.greedy()(logits), best)
    assert torch.equal(Sampler(temperature=1e-4)(logits), best)
    assert torch.equal(Sampler(top_k=1)(logits), best)
    assert torch.equal(Sampler(min_p=1.0)(logits), best)
    assert torch.equal(Sampler(temperature=1.7).filtered(logits), logits / 1.7)
    assert torch.equal(Sampler().filtered(logits), logits)


def test_greedy_penalises_repetition():
    logits = torch.tensor([[2.0, 1.9, -1.0]])
    sampler = Sampler(temperature=0.0, repetition_penalty=1.2)
    assert sampler(logits, torch.tensor([[0]])).tolist() == [1]
    assert sampler(logits, torch.tensor([[2]])).tolist() == [0]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": -0.1}, r"temperature must be 0 \(greedy\) or positive, got -0.1"),
        ({"temperature": math.nan}, "temperature must be 0"),
        ({"temperature": math.inf}, "temperature must be 0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0"),
        ({"min_p": -0.5}, "min_p must be above 0 and at most 1, got -0.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive, got 0.0"),
    ],
)
def test_sampler_says_what_is_wrong(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**kwargs)


# Decoding: cached = uncached, batched = single, prepared = plain.


def test_left_pad():
    tokens, real = g.left_pad([[1, 2], [3, 4, 5, 6], [7]], 9, 10)
    assert tokens.tolist() == [[9, 9, 1, 2], [3, 4, 5, 6], [9, 9, 9, 7]]
    assert real.tolist() == [[False, False, True, True], [True] * 4, [False, False, False, True]]


@all_models
def test_cached_equals_uncached_and_batched_equals_single(config):
    model = make(config)
    expected = [uncached(model, prompt, 40) for prompt in PROMPTS]
    assert len({token for row in expected for token in row}) > 5  # or the test would prove little
    if (
        obstacle(model) is not None
    ):  # the reference has no padding, and this model's layout counts real tokens
        assert [generate(model, [p], max_new_tokens=20)[0] for p in PROMPTS] == [row[:20] for row in expected]
    assert generate(model, PROMPTS, max_new_tokens=40) == expected
    fast = prepare(model, 40)  # prepared, where the model allows it
    assert generate(fast, PROMPTS, max_new_tokens=40) == expected
    assert generate(fast, PROMPTS, max_new_tokens=20) == [row[:20] for row in expected]
    assert generate(model, torch.tensor([PROMPTS[1]] * 2), max_new_tokens=5) == [expected[1][:5]] * 2


@all_models
def test_prefill_in_chunks_is_one_prefill(config):
    model = make(config)
    tokens, real = g.left_pad(PROMPTS, 0, config.vocab_size)
    with torch.no_grad():
        whole, parts = model.make_cache(3, 7), model.make_cache(3, 7)
        expected = g.prefill(model, tokens, real, whole)
        for chunk in (1, 3, 7):
            parts = model.make_cache(3, 7)
            assert_close(g.prefill(model, tokens, real, parts, chunk=chunk), expected)
            assert parts.length == 7


def test_prefill_reads_no_more_than_a_chunk_at_once():
    model, widths = make(), []
    model.embed.register_forward_hook(lambda module, inputs, output: widths.append(inputs[0].shape[1]))
    with torch.no_grad():
        for n in (1, 8, 9, 16):
            tokens = torch.ones(1, n, dtype=torch.long)
            g.prefill(model, tokens, tokens.bool(), model.make_cache(1, n), chunk=8)
    assert widths == [1, 8, 8, 1, 8, 8]


def hugging_face(model):
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.hidden_dim, num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, max_position_embeddings=c.max_seq_len,
            rms_norm_eps=c.norm_eps, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )
    )  # fmt: skip
    names = {
        "embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head", "blocks": "model.layers",
        "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "attn": "self_attn",
        "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj", "w_gate": "gate_proj", "w_up": "up_proj",
        "w_down": "down_proj",
    }  # fmt: skip
    state = {
        ".".join(names.get(part, part) for part in k.split(".")): v for k, v in model.state_dict().items()
    }
    theirs.load_state_dict(state)
    return theirs.to(model.embed.weight.dtype).eval()


def test_greedy_equals_transformers_generate():
    model = make(dtype=torch.float32)
    theirs = hugging_face(model)
    tokens, real = g.left_pad(PROMPTS, 0, 53)
    out = theirs.generate(
        tokens, attention_mask=real.long(), max_new_tokens=40, do_sample=False, pad_token_id=0
    )
    assert generate(model, PROMPTS, max_new_tokens=40) == out[:, 7:].tolist()


@pytest.mark.parametrize("n", [10, 40])
def test_sampled_rows_depend_on_their_own_seed_only(n):
    model, sampler = make(), Sampler(temperature=1.3, top_p=0.95, repetition_penalty=1.1)
    together = generate(model, PROMPTS, max_new_tokens=n, sampler=sampler, seed=[7, 8, 9])
    alone = [
        generate(model, [p], max_new_tokens=n, sampler=sampler, seed=s)[0] for p, s in zip(PROMPTS, (7, 8, 9))
    ]
    assert together == alone
    assert generate(model, PROMPTS, max_new_tokens=n, sampler=sampler, seed=7)[0] == alone[0]
    assert generate(model, [PROMPTS[0]] * 2, max_new_tokens=n, sampler=sampler, seed=7)[1] != alone[0]


def test_no_seed_follows_torch_and_seeds_differ():
    model, sampler = make(), Sampler(temperature=2.0)
    torch.manual_seed(3)
    a, b = (generate(model, PROMPTS, max_new_tokens=12, sampler=sampler) for _ in range(2))
    torch.manual_seed(3)
    assert a == generate(model, PROMPTS, max_new_tokens=12, sampler=sampler)
    assert a != b
    rows = {tuple(generate(model, [[1]], max_new_tokens=12, sampler=sampler, seed=s)[0]) for s in range(8)}
    assert len(rows) == 8
    assert len({tuple(row) for row in g.uniforms(50, 4, 0).tolist()}) == 50


def test_rows_stop_at_eos_and_the_others_go_on():
    model = make()
    free = generate(model, PROMPTS, max_new_tokens=40)
    eos = free[0][5]
    cut = [row[: row.index(eos) + 1] if eos in row else row for row in free]
    assert len(cut[0]) <= 6
    assert generate(model, PROMPTS, max_new_tokens=40, eos_id=eos) == cut
    assert list(stream(model, PROMPTS[0], max_new_tokens=40, eos_id=eos)) == cut[0]


def test_stop_ends_a_row():
    model = make()
    free = generate(model, PROMPTS, max_new_tokens=12)
    stopped = generate(
        model, PROMPTS, max_new_tokens=12, stop=lambda ids: len(ids) == 3 or ids[-1] == free[1][1]
    )
    assert stopped == [row[: min(3, 1 + row.index(free[1][1]) if free[1][1] in row else 3)] for row in free]
    assert list(stream(model, PROMPTS[0], max_new_tokens=12, stop=lambda ids: len(ids) == 4)) == free[0][:4]


def test_no_step_is_taken_after_the_last_row_ends():
    model, calls = make(), []
    model.embed.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0].shape))
    generate(model, PROMPTS, max_new_tokens=30, stop=lambda ids: len(ids) == 4)
    assert len(calls) == 4  # the prompt gives the first token, three steps the others
    calls.clear()
    tokens = stream(model, PROMPTS[0], max_new_tokens=30)
    assert not calls
    next(tokens)
    assert len(calls) == 1
    assert generate(model, PROMPTS, max_new_tokens=0) == [[], [], []]


@pytest.mark.parametrize(
    ("prompts", "kwargs", "message"),
    [
        ([], {}, "no prompts"),
        ([[1], []], {}, "prompt 1 is empty: give it at least one token"),
        ([[1], [2, 53]], {}, "prompt 1 holds the id 53, the vocabulary ends at 52"),
        ([[-1]], {}, "prompt 0 holds the id -1"),
        (
            [[1] * 96],
            {},
            r"96 prompt tokens and 5 new ones exceed the model's context of 100 \(max_seq_len\)",
        ),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
        (
            [[1]],
            {"seed": [1, 2], "sampler": Sampler()},
            "one seed per prompt, or one for all: got 2 for 1 prompts",
        ),
    ],
)
def test_generate_says_what_is_wrong(prompts, kwargs, message):
    with pytest.raises(ValueError, match=message):
        generate(make(), prompts, **{"max_new_tokens": 5, **kwargs})


def test_the_context_may_be_filled_to_the_last_token():
    assert len(generate(make(), [[1] * 95], max_new_tokens=5)[0]) == 5


def test_generation_leaves_the_model_as_it_was():
    model = make().train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    generate(model, PROMPTS, max_new_tokens=40)
    assert model.training
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    model(torch.tensor([[1, 2]])).sum().backward()  # no inference tensor got into the model
    assert model.embed.weight.grad is not None


# Text.


class ByteTokenizer:
    """Ids are bytes; 52 ends."""

    eos_id = 52

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i != 52).decode(errors="replace")


class LetterTokenizer(ByteTokenizer):
    """Ids 0 to 37 stand for letters; the others for the two bytes of é and its like, in whatever order they come."""

    def encode(self, text):
        return [ord(c) - 97 for c in text]

    def decode(self, ids):
        return bytes(97 + i if i < 38 else 195 if i < 43 else 128 + i for i in ids if i != 52).decode(
            errors="replace"
        )


class ChunkTokenizer(ByteTokenizer):
    """Ids stand for given bytes."""

    def __init__(self, chunks):
        self.chunks = chunks

    def decode(self, ids):
        return b"".join(self.chunks[i] for i in ids).decode(errors="replace")


@given(st.text(max_size=30), st.lists(st.integers(1, 5), max_size=60))
@settings(max_examples=80, deadline=None)
def test_pieces_are_whole_characters_and_make_up_the_text(text, cuts):
    data, chunks = text.encode(), []
    for width in cuts:
        chunks.append(data[:width])
        data = data[width:]
    chunks.append(data)
    pieces = list(g.text_pieces(ChunkTokenizer(chunks), list(range(len(chunks)))))
    assert "".join(pieces) == text
    assert all(pieces)


class SpacedTokenizer(ByteTokenizer):
    """Each id is a word with a space before it; the first space of a text is dropped, as SentencePiece does."""

    def decode(self, ids):
        return "".join(f" {i}" for i in ids).removeprefix(" ")


def test_pieces_keep_the_spaces_that_a_decoder_drops_at_the_beginning():
    assert list(g.text_pieces(SpacedTokenizer(), [1, 2, 3])) == ["1", " 2", " 3"]


@given(st.binary(max_size=40))
@settings(max_examples=80, deadline=None)
def test_pieces_of_any_bytes_are_what_decode_gives(data):
    assert "".join(g.text_pieces(ByteTokenizer(), [b for b in data if b != 52])) == ByteTokenizer().decode(
        list(data)
    )


@given(
    st.lists(st.text("abAB", max_size=4), max_size=12),
    st.lists(st.text("abAB", min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=150, deadline=None)
def test_until_cuts_at_the_first_mark_however_the_text_comes(pieces, stop):
    shown = "".join(g.until(pieces, stop))
    text = "".join(pieces)
    assert text.startswith(shown)
    if not any(mark in text for mark in stop):
        assert shown == text
    else:
        first_end = min(text.index(mark) + len(mark) for mark in stop if mark in text)
        assert not any(mark in shown for mark in stop)
        assert any(text.startswith(mark, len(shown)) for mark in stop)
        assert len(shown) < first_end


def test_until_holds_back_no_more_than_it_must():
    assert list(g.until(["ab", "c\n", "\nd"], ["\n\n"])) == ["ab", "c"]
    assert list(g.until(["a\n", "b"], ["\n\n"])) == ["a", "\nb"]
    assert list(g.until(["x", "y"], [])) == ["x", "y"]


@pytest.mark.parametrize("seed", range(4))
def test_streamed_text_is_generated_text(seed):
    model, tokenizer = make(), LetterTokenizer()
    kwargs = {"max_new_tokens": 60, "sampler": Sampler(temperature=1.5), "seed": seed}
    text = generate_text(model, tokenizer, "abc", **kwargs)
    assert isinstance(text, str)
    assert "".join(stream_text(model, tokenizer, "abc", **kwargs)) == text
    assert generate_text(model, tokenizer, ["abc"], **kwargs) == [text]
    assert "\ufffd" in text
    marks = [mark for mark in (text[8:10], text[15:17], text[20]) if "\ufffd" not in mark]
    assert marks
    short = generate_text(model, tokenizer, "abc", stop=marks, **kwargs)
    assert short == text[: min(text.index(mark) for mark in marks)]
    assert "".join(stream_text(model, tokenizer, "abc", stop=marks, **kwargs)) == short


def test_text_ends_at_eos_which_is_not_shown():
    model, tokenizer = make(), LetterTokenizer()
    tokenizer.eos_id = generate(model, [tokenizer.encode("abc")], max_new_tokens=9)[0][8]
    tokenizer.decode = lambda ids: " ".join(map(str, ids))
    new = generate(model, [tokenizer.encode("abc")], max_new_tokens=30, eos_id=tokenizer.eos_id)[0]
    assert len(new) <= 9
    assert new[-1] == tokenizer.eos_id
    assert generate_text(model, tokenizer, "abc", max_new_tokens=30) == " ".join(map(str, new[:-1]))
    assert "".join(stream_text(model, tokenizer, "abc", max_new_tokens=30)) == " ".join(map(str, new[:-1]))


def test_the_books_tokenizer_will_do():
    from minillm.tokenizer import train_bpe

    tokenizer = train_bpe(["One day, Lily found a shell. 有一天，小明捡到一个贝壳。"] * 5, 300)
    assert isinstance(tokenizer, g.TextTokenizer)
    ids = tokenizer.encode("有一天，Lily found 小明。🙂")
    assert "".join(g.text_pieces(tokenizer, ids)) == "有一天，Lily found 小明。🙂"


# Scores.


def naive_log_likelihood(model, prompt, continuation):
    total, tokens = 0.0, list(prompt)
    for token in continuation:
        total += model(torch.tensor([tokens]))[0, -1].log_softmax(-1)[token].item()
        tokens.append(token)
    return total


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("config", [TINY, GLM], ids=["llama", "glm"])
def test_log_likelihood_is_the_sum_over_tokens(config, batch_size):
    model = make(config)
    prompts = [[5, 1], [5, 1], [5, 1], [9] * 20, [5], [5, 1, 7], [5, 1]]
    continuations = [[7], [8], [7, 3], [2, 2, 2], [1, 7], [3], [7]]
    with torch.no_grad():
        expected = [naive_log_likelihood(model, p, c) for p, c in zip(prompts, continuations)]
    assert log_likelihood(model, prompts, continuations, batch_size=batch_size) == pytest.approx(
        expected, rel=1e-5
    )


def test_choices_of_one_token_cost_one_pass():
    model, rows = make(), []
    model.embed.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    scores = log_likelihood(model, [[4, 4, 4]] * 4 + [[5]] * 4, [[1], [2], [3], [4]] * 2)
    assert rows == [2]
    assert len(set(scores)) == 8


def test_probabilities_of_all_tokens_add_up_to_one():
    model = make()
    scores = log_likelihood(model, [[3, 1]] * 53, [[token] for token in range(53)])
    assert sum(map(math.exp, scores)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("prompts", "continuations", "message"),
    [
        ([[1]], [], "one continuation per prompt: got 1 and 0"),
        ([[1], []], [[1], [1]], "pair 1: prompt and continuation need at least one token"),
        ([[1]], [[]], "pair 0"),
        ([[1] * 99], [[1] * 3], r"pair 0: 99 \+ 3 tokens exceed the context of 100"),
    ],
)
def test_log_likelihood_says_what_is_wrong(prompts, continuations, message):
    with pytest.raises(ValueError, match=message):
        log_likelihood(make(), prompts, continuations)
    if len(prompts[0]) == 99:
        log_likelihood(make(), prompts, [[1] * 2])  # the last token needs no place of its own
