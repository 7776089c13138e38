import base64
import json
import pickle
import random
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from references import bpe_encode_reference, bpe_learn_reference
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers, trainers

from minillm import tokenizer as module
from minillm.check import check, laws
from minillm.tokenizer import (
    BPETokenizer,
    CutTable,
    MergeTable,
    PieceCache,
    TokenizerError,
    _text_blocks,
    compression,
    keeps_characters,
    learn_merges,
    load_tokenizer,
    pretoken_pattern,
    train_bpe,
    train_sentencepiece,
)

TEXTS = [
    "The cat sat on the mat, and the cat ate 12 of the 345 rats in 2025.\n",
    "小猫坐在垫子上，小猫吃了12只老鼠。小猫很高兴，老鼠不高兴。\n",
    "def f(x_1):\n    return x_1 + 1  # don't\n\n",
    "猫が好きです。ネコも好きです。",
    "Ünïcödé \U0001f469\u200d\U0001f469 e\u0301 \u0627\u0644\u0642\u0637\u0629 ١٢٣ 한국어 ไทย\n",
] * 4
# Everything that a Python string can hold, with more of what is delicate.
ANY_TEXT = st.text(
    st.characters()
    | st.characters(categories=["Cs"])
    | st.sampled_from(" \t\n\u2581\u3000_09aé猫小。1\ud83d\U0001f469"),
    max_size=40,
)


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS, 500)


@pytest.fixture(scope="module")
def piece():
    return train_sentencepiece(TEXTS, 420)


@pytest.fixture(scope="module", params=["bpe", "bpe, digits merged", "sentencepiece", "unigram"])
def any_tokenizer(request):
    if request.param.startswith("bpe"):
        return train_bpe(TEXTS, 500, split_digits=request.param == "bpe")
    return train_sentencepiece(TEXTS, 345, model_type="unigram" if request.param == "unigram" else "bpe")


# --- the laws of the exercises


def chat(tokenizer, turns):
    ids = []
    for role, content in turns:
        ids += [tokenizer.special(f"<|{role}|>"), *tokenizer.encode(content), tokenizer.special("<|end|>")]
    return ids


def stream(chunks):
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for chunk in chunks:
        if text := decoder.decode(chunk):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


SOLUTIONS = {
    "tokenizer.learn": lambda counts, n_merges: learn_merges(counts, n_merges, min_count=1),
    "tokenizer.encode": lambda merges, data: PieceCache(MergeTable(merges), 0).split(data),
    "tokenizer.chat": chat,
    "tokenizer.stream": stream,
}


@pytest.mark.parametrize(
    ("exercise", "law"), [(name, law) for name in SOLUTIONS for law in laws(name)], ids=str
)
def test_the_package_obeys_its_laws(exercise, law):
    law(SOLUTIONS[exercise])


def longest_first(merges, data):
    tokens = {bytes([i]): i for i in range(256)}
    for rank, pair in enumerate(merges):
        tokens[b"".join(next(t for t, i in tokens.items() if i == part) for part in pair)] = 256 + rank
    ids = []
    while data:
        token = max((t for t in tokens if data.startswith(t)), key=len)
        ids.append(tokens[token])
        data = data[len(token) :]
    return ids


def learn(counts, n_merges, weight=lambda n: n, tie=lambda pair: pair, unit=str.encode):
    words = {word: list(unit(word)) for word in counts}
    merges = []
    for new in range(256, 256 + n_merges):
        pairs = Counter()
        for word, ids in words.items():
            for pair in zip(ids, ids[1:]):
                pairs[pair] += weight(counts[word])
        best = min(pairs, key=lambda pair: (-pairs[pair], tie(pair)))
        merges.append(best)
        for word, ids in words.items():
            out = []
            for i in ids:
                out[-1:] = [new] if out[-1:] == [best[0]] and i == best[1] else [*out[-1:], i]
            words[word] = out
    return merges


@pytest.mark.parametrize(
    ("exercise", "wrong", "law"),
    [
        ("tokenizer.learn", lambda counts, n: [(0, 0)] * n, "the most frequent pair comes first"),
        (
            "tokenizer.learn",
            lambda counts, n: learn(counts, n, weight=lambda n: 1),
            "the most frequent pair comes first",
        ),
        (
            "tokenizer.learn",
            lambda counts, n: learn(counts, n, tie=lambda p: (-p[0], p[1])),
            "of equally frequent pairs the smallest ids win",
        ),
        (
            "tokenizer.learn",
            lambda counts, n: learn(counts, n, unit=lambda w: map(ord, w)),
            "characters of several bytes",
        ),
        ("tokenizer.encode", lambda merges, data: data.decode(), "without merges the ids are the bytes"),
        ("tokenizer.encode", lambda merges, data: list(data), "a pair becomes 256 plus its rank"),
        ("tokenizer.encode", longest_first, "the oldest merge goes first"),
        (
            "tokenizer.chat",
            lambda t, turns: t.encode("".join(f"<|{r}|>{c}<|end|>" for r, c in turns)),
            "a turn is its role, its text and an end",
        ),
        (
            "tokenizer.chat",
            lambda t, turns: t.encode("".join(f"<|{r}|>{c}<|end|>" for r, c in turns), allowed_special="all"),
            "what a user writes makes no special token",
        ),
        (
            "tokenizer.stream",
            lambda chunks: (c.decode(errors="replace") for c in chunks),
            "a character is never cut",
        ),
        (
            "tokenizer.stream",
            lambda chunks: [b"".join(chunks).decode(errors="replace")],
            "text comes out as it comes in",
        ),
    ],
)
def test_check_names_the_broken_law(exercise, wrong, law):
    report = check(exercise, wrong, quiet=True)
    broken = [rule.name for rule, reason in report.reasons.items() if reason is not None]
    assert broken[0] == law


# --- pre-tokens


@given(ANY_TEXT, st.booleans())
def test_pretokens_lose_nothing(text, split_digits):
    assert "".join(pretoken_pattern(split_digits).findall(text)) == text


def test_pretokens_are_what_the_chapter_says():
    findall = pretoken_pattern().findall
    assert findall("In 2025, don't!") == ["In", " ", "2", "0", "2", "5", ",", " don", "'", "t", "!"]
    assert findall("我用 Python写3行") == ["我用", " Python", "写", "3", "行"]
    assert findall("a\n\n    b") == ["a", "\n", "\n", "   ", " b"]
    assert findall("a \n") == ["a", " ", "\n"]
    assert findall("x_1 __init__") == ["x", "_", "1", " ", "__", "init", "__"]
    assert findall("ひらがなとカタカナー。") == ["ひらがなとカタカナー", "。"]
    assert findall("한국어 문장") == ["한국어", " 문장"]
    assert pretoken_pattern(False).findall("a 12 345") == ["a", " 12", " 345"]


def test_no_token_of_a_trained_vocabulary_holds_two_digits():
    tokens = [
        module._whole_text(t) for t in train_bpe(["1234567890 " * 9, "１２３" * 9, "١٢٣" * 9], 300).tokens
    ]
    assert not any(len(re.findall(r"\d", token)) > 1 for token in tokens)
    merged = train_bpe(["1234567890 " * 9], 300, split_digits=False)
    assert len(merged.encode("1234567890")) == 1


# --- learning


def counts_of(texts, split_digits=True):
    return Counter(word for text in texts for word in pretoken_pattern(split_digits).findall(text))


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.text("aab猫狗é ", min_size=1, max_size=12), st.integers(1, 5), max_size=12),
    st.integers(0, 30),
    st.integers(1, 3),
)
def test_learning_equals_the_naive_trainer(counts, n_merges, min_count):
    assert learn_merges(counts, n_merges, min_count=min_count) == bpe_learn_reference(
        counts, n_merges, min_count
    )


def test_learning_equals_the_naive_trainer_on_text():
    counts = counts_of(TEXTS)
    assert learn_merges(counts, 200) == bpe_learn_reference(counts, 200, 2)


def as_characters(data):
    return "".join(chr(0x4E00 + byte) for byte in data)


def test_learning_equals_hugging_face_tokenizers():
    """Each byte as one Han character, in the order of the bytes: then ids, ties and merges are the same."""
    rng = random.Random(0)
    words = Counter("".join(rng.choices("aabbcde", k=rng.randrange(1, 9))) for _ in range(400))
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 100,
        initial_alphabet=list(as_characters(range(256))),
        show_progress=False,
        min_frequency=2,
    )
    fast.train_from_iterator(
        [" ".join([as_characters(word.encode())] * n) for word, n in words.items()], trainer
    )
    theirs = [tuple(pair) for pair in json.loads(fast.to_str())["model"]["merges"]]
    table = MergeTable(learn_merges(words, 100))
    ours = [(as_characters(table.tokens[a]), as_characters(table.tokens[b])) for a, b in table.merges]
    assert len(ours) == 100
    assert ours == theirs


def test_encoding_equals_hugging_face_tokenizers(bpe):
    tokens = [as_characters(token) for token in bpe.table.tokens]
    merges = [(tokens[a], tokens[b]) for a, b in bpe.table.merges]
    fast = FastTokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    rng = random.Random(1)
    for text in [*TEXTS[:5], *("".join(rng.choices("".join(TEXTS), k=30)) for _ in range(200))]:
        for word in pretoken_pattern().findall(text):
            data = word.encode()
            assert bpe.pieces.split(data) == fast.encode(as_characters(data)).ids


def test_a_small_vocabulary_is_a_prefix_of_a_large_one():
    assert train_bpe(TEXTS, 300).table.merges == train_bpe(TEXTS, 500).table.merges[: 300 - 256 - 7]


def test_learning_does_not_depend_on_the_order_of_texts():
    assert train_bpe(TEXTS, 400).state() == train_bpe(TEXTS[::-1], 400).state()


def test_tokens_keep_characters_and_stay_short():
    table = MergeTable(
        learn_merges(Counter({"-" * 1000: 3, "一丁一七一万丈三上下不与" * 3: 5}), 300, min_count=1)
    )
    assert max(map(len, table.tokens)) == module.MAX_TOKEN_BYTES
    assert all(map(keeps_characters, table.tokens))
    assert not keeps_characters("丁".encode()[1:] + b"a")
    assert not keeps_characters("a".encode() + "丁".encode()[:2])
    assert not keeps_characters(b"\xff\xff")
    assert keeps_characters("\ud800".encode("utf-8", "surrogatepass") * 2)


def test_training_says_what_it_cannot_do(caplog):
    with pytest.raises(
        ValueError, match="vocab_size 200 is too small: 256 bytes and 7 special tokens need 263"
    ):
        train_bpe(TEXTS, 200)
    with pytest.raises(ValueError, match=r"write \[text\]"):
        train_bpe("one string", 300)
    with pytest.raises(ValueError, match=r"write \[text\]"):
        train_sentencepiece("one string", 300)
    assert train_bpe(["ab ab"], 300).vocab_size == 256 + 7 + 1
    assert "vocabulary of 264 instead of 300" in caplog.text
    assert train_bpe([], 300).vocab_size == 263
    with pytest.raises(ValueError, match="SentencePiece cannot train this: .*too high"):
        train_sentencepiece(["a b c"], 5000)


def test_every_merge_shortens_the_training_text_as_counted():
    counts = counts_of(TEXTS)
    merges = learn_merges(counts, 60)
    before = sum(len(word.encode()) * n for word, n in counts.items())
    for k in range(1, 61):
        pieces = PieceCache(MergeTable(merges[:k]), 0)
        after = sum(len(pieces.split(word.encode())) * n for word, n in counts.items())
        assert after < before
        before = after


# --- encoding


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("aab", min_size=1, max_size=10), min_size=1, max_size=20), st.text("aab", max_size=40)
)
def test_encoding_equals_the_definition(words, text):
    merges = learn_merges(Counter(words), 30, min_count=1)
    table = MergeTable(merges)
    ids = PieceCache(table, 0).split(text.encode())
    assert ids == bpe_encode_reference(merges, text.encode())
    assert all(table.agree(a, b) for a, b in pairwise(ids))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("aab", min_size=1, max_size=10), min_size=1, max_size=20))
def test_two_tokens_agree_if_bpe_writes_them_so(words):
    merges = learn_merges(Counter(words), 12, min_count=1)
    table = MergeTable(merges)
    used = [97, 98, *range(256, len(table.tokens))]
    for a in used:
        for b in used:
            together = bpe_encode_reference(merges, table.tokens[a] + table.tokens[b]) == [a, b]
            assert table.agree(a, b) == together


def test_every_token_is_its_own_encoding(bpe):
    assert all(bpe.pieces.split(token) == [i] for i, token in enumerate(bpe.table.tokens))


def test_encoding_steps_back_where_the_longest_token_was_wrong():
    merges = learn_merges(Counter({"bcd": 9, "abc": 3, "ab": 5}), 4, min_count=1)
    table = MergeTable(merges)
    rng = random.Random(0)
    for _ in range(500):
        data = bytes(rng.choices(b"abcd", k=12))
        assert PieceCache(table, 0).split(data) == bpe_encode_reference(merges, data)


def test_a_long_piece_takes_time_in_proportion():
    table = MergeTable(learn_merges(Counter({"a" * 63: 5, "ab" * 20: 4}), 20, min_count=1))
    data = b"a" * 50_001
    ids = PieceCache(table, 0).split(data)
    assert b"".join(table.tokens[i] for i in ids) == data
    assert all(table.agree(a, b) for a, b in pairwise(ids))


@settings(max_examples=150, deadline=None)
@given(st.lists(ANY_TEXT, max_size=5))
def test_a_batch_is_encoded_as_its_texts(bpe_and_merged, texts):
    for tokenizer in bpe_and_merged:
        naive = [
            [
                7 + i
                for word in tokenizer.findall(text)
                for i in bpe_encode_reference(tokenizer.table.merges, word.encode("utf-8", "surrogatepass"))
            ]
            for text in texts
        ]
        assert [tokenizer.encode(text) for text in texts] == naive
        assert tokenizer.encode_batch(texts) == naive


@pytest.fixture(scope="module")
def bpe_and_merged():
    return [
        train_bpe([*TEXTS, "a    b  \t\t  c   \u3000 d    \n"] * 2, 450, split_digits=split)
        for split in (True, False)
    ]


def test_long_texts_and_batches_take_the_fast_way_to_the_same_ids(bpe, monkeypatch):
    long = "".join(TEXTS) * 5
    slow = [i for word in bpe.findall(long) for i in bpe.pieces[word]]
    assert len(long) > 2000
    assert bpe.encode(long) == slow
    monkeypatch.setattr(module, "_text_blocks", lambda text: _text_blocks(text, 100))
    assert bpe.encode(long) == slow
    monkeypatch.setattr(CutTable, "LIMIT", 4)
    other = BPETokenizer.from_state(bpe.state())
    assert other.cuts is None
    assert other.encode(long) == slow
    assert other.encode_batch(TEXTS) == bpe.encode_batch(TEXTS)


@given(ANY_TEXT, st.integers(1, 10))
def test_blocks_are_the_text_and_begin_at_newlines(text, n_chars):
    blocks = list(_text_blocks(text, n_chars))
    assert "".join(blocks) == text
    assert all(block.startswith("\n") for block in blocks[1:])


def test_several_processes_give_the_same_ids(bpe, piece):
    for tokenizer in (bpe, piece):
        assert tokenizer.encode_batch(TEXTS, workers=2) == tokenizer.encode_batch(TEXTS)
        assert tokenizer.encode_batch([], workers=2) == []
    with pytest.raises(ValueError, match=r"write \[text\]"):
        bpe.encode_batch("one string")


def test_the_caches_stay_bounded(bpe):
    pieces = PieceCache(bpe.table, 0, limit=10)
    for i in range(100):
        assert pieces[f"word{i}"] == tuple(bpe_encode_reference(bpe.table.merges, f"word{i}".encode()))
        assert len(pieces) <= 10
    assert pieces["x" * 1000]
    assert "x" * 1000 not in pieces


# --- there and back


@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT)
def test_no_string_is_changed_by_the_way_there_and_back(any_tokenizer, text):
    ids = any_tokenizer.encode(text)
    assert any_tokenizer.decode(ids) == text
    assert any_tokenizer.decode_bytes(ids) == text.encode("utf-8", "surrogatepass")
    assert not set(ids) & set(any_tokenizer.special_ids.values())
    assert all(0 <= i < any_tokenizer.vocab_size for i in ids)


def test_half_a_character_is_replaced(bpe):
    ids = bpe.encode("🦉")
    assert bpe.decode(ids[:-1]) == "\ufffd"
    assert bpe.decode_bytes(ids[:-1]) == "🦉".encode()[:-1]


def test_ids_that_do_not_exist_are_refused(any_tokenizer):
    for wrong in (-1, any_tokenizer.vocab_size, 10**9):
        with pytest.raises(
            ValueError,
            match=f"id {wrong} is not in this vocabulary: ids are 0 … {any_tokenizer.vocab_size - 1}",
        ):
            any_tokenizer.decode([3, wrong, 4])
    assert any_tokenizer.decode([]) == ""
    assert any_tokenizer.decode(np.array(any_tokenizer.encode("猫 1"))) == "猫 1"


# --- special tokens


def test_text_never_makes_a_special_token(any_tokenizer):
    text = "".join(any_tokenizer.special_ids) + " <s></s> <0x41> <unk>"
    ids = any_tokenizer.encode(text)
    assert not set(ids) & set(any_tokenizer.special_ids.values())
    assert any_tokenizer.decode(ids) == text


def test_special_tokens_come_from_the_caller(any_tokenizer):
    t = any_tokenizer
    assert (t.pad_id, t.bos_id, t.eos_id) == (0, 1, 2)
    assert t.encode("hi", bos=True, eos=True) == [t.bos_id, *t.encode("hi"), t.eos_id]
    user, end = t.special("<|user|>"), t.special("<|end|>")
    ids = t.encode("<|user|>hi<|eos|><|end|>", allowed_special={"<|user|>", "<|end|>"})
    assert ids == [user, *t.encode("hi"), *t.encode("<|eos|>"), end]
    assert t.encode("<|user|>hi", allowed_special="all") == [user, *t.encode("hi")]
    assert t.decode(ids) == "hi<|eos|>"
    assert t.decode(ids, show_special=True) == "<|user|>hi<|eos|><|end|>"
    with pytest.raises(ValueError, match="no special token '<.robot.>'; this tokenizer has"):
        t.encode("hi", allowed_special={"<|robot|>"})
    with pytest.raises(ValueError, match='a set of names or "all", not'):
        t.encode("hi", allowed_special="<|user|>")


def test_of_two_special_names_the_longer_one_is_read():
    t = BPETokenizer([], special_tokens=("<a>", "<a><b>"))
    assert t.encode("<a><b><a>", allowed_special="all") == [1, 0]
    with pytest.raises(ValueError, match="no special token"):
        _ = t.bos_id


def test_special_names_must_be_good():
    for names in (("a", "a"), ("",)):
        with pytest.raises(ValueError, match="special tokens must be different and not empty"):
            BPETokenizer([], special_tokens=names)


# --- files


def same(a, b):
    return type(a) is type(b) and a.state() == b.state() and a.encode_batch(TEXTS) == b.encode_batch(TEXTS)


def test_saved_and_loaded_is_the_same(any_tokenizer, tmp_path):
    assert any_tokenizer.save(tmp_path / "run") == tmp_path / "run" / "tokenizer.json"
    assert same(load_tokenizer(tmp_path / "run"), any_tokenizer)
    assert any_tokenizer.save(tmp_path / "v1.0" / "mine.json") == tmp_path / "v1.0" / "mine.json"
    assert same(load_tokenizer(tmp_path / "v1.0" / "mine.json"), any_tokenizer)
    assert same(pickle.loads(pickle.dumps(any_tokenizer)), any_tokenizer)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["mine.json", "tokenizer.json"]


def test_sentencepiece_reads_our_model_file(piece, tmp_path):
    path = piece.save(tmp_path / "tokenizer.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in TEXTS:
        assert processor.encode(text) == piece.encode(text)
        assert processor.decode(piece.encode(text)) == text
    assert same(load_tokenizer(tmp_path), piece)


def test_a_published_model_behaves_as_published(tmp_path):
    """LLaMA's settings: a space in front, and no padding token."""
    import io

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=360, model_type="bpe", split_digits=True,
        byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    (tmp_path / "tokenizer.json").write_text(
        '{"version": "1.0", "model": {}}'
    )  # Hugging Face's own file beside it
    tokenizer, processor = (
        load_tokenizer(tmp_path),
        sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()),
    )
    for text in ("the cat", "小猫", "a\u2581b"):
        assert tokenizer.encode(text) == processor.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == processor.decode(processor.encode(text))
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.encode("x", bos=True)[0] == processor.bos_id()


GOOD = {
    "format": "minillm.bpe",
    "version": 1,
    "split_digits": True,
    "special_tokens": ["<|pad|>"],
    "merges": [[97, 98]],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not a tokenizer of minillm"),
        ({"version": 2}, "not a tokenizer of minillm"),
        ({"split_digits": "yes"}, "split_digits true or false"),
        ({"special_tokens": [1]}, "special_tokens must be strings"),
        ({"special_tokens": ["a", "a"]}, "must be different"),
        ({"merges": {"a": 1}}, "must be lists"),
        ({"merges": [[97]]}, "pairs of integers"),
        ({"merges": [[97, "b"]]}, "pairs of integers"),
        ({"merges": [[97, True]]}, "pairs of integers"),
        ({"merges": [[97, 1e3]]}, "pairs of integers"),
        ({"merges": [[97, -1]]}, "merge 0 joins ids 97 and -1"),
        ({"merges": [[97, 256]]}, "merge 0 joins ids 97 and 256, but before it there are only 0 … 255"),
        ({"merges": [[97, 98], [97, 98]]}, "merge 1 of 97 and 98 can never happen"),
        ({"merges": [[97, 98], [98, 99], [97, 257]]}, "merge 2 of 97 and 257 can never happen"),
        ({"merges": [[97, 97], *([i, i] for i in range(256, 300))]}, "longer than 64 bytes"),
        ({"merges": [[0xAF, 0xE8]]}, "cuts a character"),
        ({"merges": [[0xFF, 0xFF]]}, "cuts a character"),
        ({"merges": [[49, 50]]}, "crosses the border of a pre-token"),
        ({"merges": [[10, 97]]}, "crosses the border of a pre-token"),
    ],
)
def test_a_hostile_file_is_refused(tmp_path, change, message):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(GOOD))
    assert load_tokenizer(path).encode("ab") == [257]
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(TokenizerError, match=re.escape(str(path))) as caught:
        load_tokenizer(path)
    assert message in str(caught.value)


def test_a_damaged_file_is_refused(bpe, piece, tmp_path):
    path = tmp_path / "tokenizer.json"
    for tokenizer in (bpe, piece):
        whole = tokenizer.save(path).read_bytes()
        for size in (0, 1, 30, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(TokenizerError, match=re.escape(str(path))):
                load_tokenizer(path)
    for bad in (b"\xff\xfe\x00", b"[" * 100_000, b"null", b'"text"', b"[1]", b'{"format": {}}'):
        path.write_bytes(bad)
        with pytest.raises(TokenizerError, match=re.escape(str(path))):
            load_tokenizer(path)
    for model in (
        "",
        "!",
        base64.b64encode(b"no model").decode(),
        base64.b64encode(piece.model[:200]).decode(),
        3,
    ):
        path.write_text(json.dumps({"format": "minillm.sentencepiece", "version": 1, "model": model}))
        with pytest.raises(TokenizerError, match=re.escape(str(path))):
            load_tokenizer(path)
    model = tmp_path / "x.model"
    for data in (b"", piece.model[:100], b"\x00" * 50):
        model.write_bytes(data)
        with pytest.raises(TokenizerError, match="x.model"):
            load_tokenizer(model)


def test_a_missing_or_huge_file_is_refused(tmp_path, monkeypatch, bpe):
    with pytest.raises(TokenizerError, match="neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="nothing.json"):
        load_tokenizer(tmp_path / "nothing.json")
    bpe.save(tmp_path)
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 100)
    with pytest.raises(TokenizerError, match="larger than"):
        load_tokenizer(tmp_path)


def test_a_failed_save_leaves_the_old_file(bpe, tmp_path, monkeypatch):
    path = bpe.save(tmp_path)
    old = path.read_bytes()
    monkeypatch.setattr(BPETokenizer, "state", lambda self: {"merges": object()})
    with pytest.raises(TypeError):
        bpe.save(tmp_path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


# --- compression


def test_compression_counts(bpe):
    bare = BPETokenizer([])
    rate = compression(bare, ["ab", "猫"])
    assert (rate.tokens, rate.chars, rate.bytes) == (5, 3, 5)
    assert rate.tokens_per_char == pytest.approx(5 / 3)
    assert rate.tokens_per_byte == 1
    assert compression(bpe, TEXTS).tokens == sum(len(bpe.encode(text)) for text in TEXTS)
    with pytest.raises(ValueError, match="compression needs text"):
        compression(bare, ["", ""])


def test_a_bilingual_vocabulary_compresses_chinese_better_than_an_english_one():
    english, chinese = [t for t in TEXTS if t.isascii()], [t for t in TEXTS if "小猫" in t]
    both, one = train_bpe(english + chinese, 330), train_bpe(english, 330)
    assert compression(both, chinese).tokens_per_char < 0.7 * compression(one, chinese).tokens_per_char
    assert compression(one, chinese).tokens_per_byte == pytest.approx(1, abs=0.05)
