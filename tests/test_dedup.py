import gzip
import json
import pickle
import re
import subprocess
import sys
import unicodedata
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm import dedup
from minillm.check import check, laws
from minillm.corpus import Document, jaccard, sentences_of, shingles
from minillm.extract import Drop
from minillm.world.defects import benchmark_item
from minillm.world.documents import clean_document
from minillm.world.stream import documents
from minillm.world.task import CorpusConfig

SOLUTIONS = {
    "dedup.minhash": lambda hashes, a, b: dedup.minhash(hashes, (a, b)),
    "dedup.agreement": dedup.agreement,
    "dedup.first_copies": dedup.first_copies,
    "dedup.contaminated": lambda text, items, n: isinstance(
        dedup.Decontaminate(items, n=n, n_zh=n, min_n=min(n, 3))(Document(text)), Drop
    ),
}
TEXT = st.text(
    st.one_of(st.sampled_from(" \t\n　aAbBＡé́猫狗。，ﬁß①\0"), st.characters(exclude_categories=[])),
    max_size=40,
)
QUICK = settings(max_examples=60, deadline=None, derandomize=True)
STEP = dedup.NearDuplicates()
CONFIG = CorpusConfig(defects=0.3)


@pytest.fixture(scope="module")
def corpus():
    return list(documents(CONFIG, n_documents=3000))


@pytest.mark.parametrize(
    ("exercise", "law"), [(name, law) for name in SOLUTIONS for law in laws(name)], ids=str
)
def test_the_package_obeys_its_laws(exercise, law):
    law(SOLUTIONS[exercise])


def components_one_step(n, pairs):
    first = list(range(n))
    for a, b in np.asarray(pairs).tolist():
        first[max(a, b)] = min(first[a], first[b])
    return [None if first[x] == x else first[x] for x in range(n)]


@pytest.mark.parametrize(
    ("exercise", "wrong", "law"),
    [
        (
            "dedup.minhash",
            lambda h, a, b: (h[:, None] * a + b).max(axis=0),
            "a = 1 and b = 0 give the smallest hash",
        ),
        (
            "dedup.minhash",
            lambda h, a, b: (h[:, None].astype(np.float64) * a + b).min(axis=0),
            "products are taken modulo 2³²",
        ),
        (
            "dedup.agreement",
            lambda s, p: (s[p[:, 0]] == s[p[:, 1]]).sum(axis=1),
            "a sketch agrees with itself",
        ),
        (
            "dedup.agreement",
            lambda s, p: (s[p[:, 0]] == s[p[:, 1]]).mean(axis=1),
            "bins that both leave empty do not count",
        ),
        ("dedup.first_copies", lambda n, p: [None] * n, "the first of a pair stays"),
        ("dedup.first_copies", components_one_step, "a friend's friend is in the group"),
        ("dedup.contaminated", lambda t, i, n: t in i, "the run may stand anywhere in a longer text"),
        (
            "dedup.contaminated",
            lambda t, i, n: any(
                len(set(re.findall(r"\w+", t.lower())) & set(re.findall(r"\w+", x.lower()))) >= n for x in i
            ),
            "words in another order are no leak",
        ),
        (
            "dedup.contaminated",
            lambda t, i, n: SOLUTIONS["dedup.contaminated"](t, i, n - 1),
            "n - 1 words in common are not enough",
        ),
    ],
)
def test_check_names_the_broken_law(exercise, wrong, law):
    report = check(exercise, wrong, quiet=True)
    assert next(rule.name for rule, reason in report.reasons.items() if reason is not None) == law


# Folding


@QUICK
@given(TEXT)
def test_folding_twice_is_folding_once(text):
    assert dedup.fold_text(dedup.fold_text(text)) == dedup.fold_text(text)


@QUICK
@given(st.lists(TEXT, max_size=6))
def test_arrays_of_code_points_are_the_folded_texts(texts):
    codes, lengths = dedup.code_points(texts)
    ends = np.cumsum(lengths)
    assert ["".join(map(chr, codes[e - n : e])) for e, n in zip(ends, lengths)] == list(
        map(dedup.fold_text, texts)
    )


def test_folding_forgets_case_width_composition_and_space_and_keeps_the_rest():
    assert dedup.fold_text("  Ｔｈｅ　ＣＡＴ\n\n，é ") == dedup.fold_text("the cat ,é")
    assert dedup.fold_text("ﬁ ß 貓") == "ﬁ ß 貓"
    assert dedup.fold_text("\ud800 x") == "\ud800 x"
    for code in range(0x3000):  # where one character becomes one, it is what the standard says
        plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", chr(code)).casefold())
        if len(plain) == 1 and not chr(code).isspace():
            assert dedup.fold_map().get(code, code) == ord(plain)


# Hashes of shingles


def hashes_of(texts, n=5, unit="char", seed=0):
    step = dedup.NearDuplicates(shingle=n, unit=unit, seed=seed)
    hashes, lengths = step.shingle_hashes(texts)
    return [row[row != dedup.NOTHING] for row in np.split(hashes, np.cumsum(lengths)[:-1])]


@QUICK
@given(st.lists(TEXT, min_size=1, max_size=6), st.integers(1, 7))
def test_equal_runs_have_equal_hashes_and_no_run_crosses_texts(texts, n):
    alone = [hashes_of([text], n)[0] for text in texts]
    together = hashes_of(texts, n)
    assert all((a == b).all() for a, b in zip(alone, together, strict=True))
    for text, row in zip(texts, together, strict=True):
        folded = dedup.fold_text(text)
        assert len(row) == max(1, len(folded) - n + 1)
        runs = [folded[i : i + n] for i in range(len(row))]
        assert len(set(zip(runs, row.tolist()))) == len(set(runs)) == len(set(row.tolist()))


def test_hashes_of_many_different_runs_do_not_collide_more_than_chance():
    texts = [
        d.text for d in documents(CorpusConfig(stories=1.0, facts=0.0, arithmetic=0.0), n_documents=3000)
    ]
    runs = {run for text in texts for run in shingles(dedup.fold_text(text))}
    n = len({h for row in hashes_of(texts) for h in row.tolist()})
    assert len(runs) > 30_000
    assert len(runs) - n <= 10 + 4 * len(runs) ** 2 / 2**33


@QUICK
@given(st.lists(TEXT, min_size=1, max_size=6))
def test_word_hashes_are_the_words_of_the_pattern(texts):
    hashes, counts = dedup.word_hashes(texts)
    found = [dedup.WORD.findall(dedup.fold_text(text)) for text in texts]
    words = [word for row in found for word in row]
    assert counts.tolist() == list(map(len, found))
    assert len(set(zip(words, hashes.tolist()))) == len(set(words)) == len(set(hashes.tolist()))


def test_word_hashes_know_the_order_of_letters_and_long_words():
    hashes, _ = dedup.word_hashes(["abc", "acb", "x" * 300 + "ab", "x" * 300 + "ba"])
    assert len(set(hashes.tolist())) == 4


# MinHash


def test_minhash_equals_datasketch():
    from datasketch import MinHash
    from datasketch.hashfunc import sha1_hash32

    for seed, text in enumerate(["a cat sat on the mat", "一只猫坐在垫子上", "x"]):
        members = [shingle.encode() for shingle in shingles(text)]
        theirs = MinHash(num_perm=64, seed=seed + 1)
        theirs.update_batch(members)
        hashes = dedup.mix(np.array([sha1_hash32(member) for member in members], np.uint32))
        assert (dedup.minhash(hashes, dedup.permutations(64, seed + 1)) == theirs.hashvalues).all()


def test_one_permutation_keeps_the_smallest_of_each_bin():
    hashes = np.random.RandomState(0).randint(0, 1 << 32, 1000, dtype=np.uint32)
    hashes[[5, 700]] = dedup.NOTHING
    lengths, n_bins = np.array([300, 0, 700]), 16
    expected = np.full((3, n_bins), dedup.NOTHING)
    for row, part in enumerate((hashes[:300], hashes[:0], hashes[300:])):
        for h in part.tolist():
            expected[row, h * n_bins >> 32] = min(expected[row, h * n_bins >> 32], h)
    assert (dedup.one_permutation(hashes, lengths, n_bins) == expected).all()


@QUICK
@given(st.lists(st.sampled_from([65535, 65535, 1, 2, 3]), min_size=8, max_size=8))
def test_densify_borrows_from_the_left_round_the_corner(bins):
    got = dedup.densify(np.array([bins], np.uint16))[0].tolist()
    for place, value in enumerate(got):
        back = [bins[place - i] for i in range(8) if bins[place - i] != 65535]
        assert value == (back[0] if back else 65535)


def test_the_estimate_has_no_bias_and_the_error_of_the_formula():
    rng = np.random.RandomState(1)
    for similarity, size in ((0.5, 150), (0.8, 150), (0.8, 3000), (0.95, 900)):
        shared = round(2 * size * similarity / (1 + similarity))
        draws = rng.randint(0, 1 << 32, (300, 2 * size - shared), dtype=np.uint32)
        sets = np.stack([draws[:, :size], draws[:, size - shared :]], axis=1).reshape(600, size)
        sketches = dedup.one_permutation(sets.ravel(), np.full(600, size), 256).astype(np.uint16)
        estimates = dedup.agreement(sketches, np.arange(600).reshape(300, 2))
        exact = shared / (2 * size - shared)
        deviation = (exact * (1 - exact) / 256) ** 0.5
        assert abs(estimates.mean() - exact) < 4 * deviation / 300**0.5
        assert estimates.std() < 1.25 * deviation * (1.5 if size < 256 else 1)


@pytest.mark.parametrize("shape", [(16, 8), (42, 6), (64, 4)])
def test_candidates_follow_the_s_curve_within_binomial_error(shape):
    bands, rows = shape
    rng, n, size = np.random.RandomState(2), 300, 3000
    for similarity in (0.5, 0.65, 0.8, 0.9):
        shared = round(2 * size * similarity / (1 + similarity))
        draws = rng.randint(0, 1 << 32, (n, 2 * size - shared), dtype=np.uint32)
        sets = np.stack([draws[:, :size], draws[:, size - shared :]], axis=1).reshape(2 * n, size)
        sketches = dedup.densify(
            dedup.one_permutation(sets.ravel(), np.full(2 * n, size), 256).astype(np.uint16)
        )
        keys = dedup.band_keys(sketches, bands, rows)
        share, curve = (
            (keys[::2] == keys[1::2]).any(axis=1).mean(),
            float(dedup.s_curve(similarity, bands, rows)),
        )
        assert abs(share - curve) <= 4 * max((curve * (1 - curve) / n) ** 0.5, 1 / n)


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_chosen_bands_are_the_most_selective_that_reach_the_recall(threshold):
    bands, rows = dedup.choose_bands(threshold, 256, 0.99)
    assert bands * rows <= 256
    assert dedup.s_curve(threshold, bands, rows) >= 0.99
    assert rows == 256 or dedup.s_curve(threshold, 256 // (rows + 1), rows + 1) < 0.99


def test_band_keys_are_equal_exactly_where_the_rows_are():
    sketches = np.random.RandomState(3).randint(0, 3, (400, 32)).astype(np.uint16)
    keys = dedup.band_keys(sketches, 8, 4)
    for band in range(8):
        rows = [tuple(sketch[band::8]) for sketch in sketches.tolist()]
        assert (
            len(set(zip(rows, keys[:, band].tolist()))) == len(set(rows)) == len(set(keys[:, band].tolist()))
        )


@QUICK
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=30))
def test_candidates_connect_exactly_what_shares_keys(rows):
    keys = np.array(rows, np.uint64).reshape(len(rows), 2)
    pairs = dedup.candidate_pairs(keys)
    assert list(map(tuple, pairs.tolist())) == sorted(set(map(tuple, pairs.tolist())))
    assert all(a < b and any(x == y for x, y in zip(rows[a], rows[b])) for a, b in pairs.tolist())
    everything = [
        (a, b) for b in range(len(rows)) for a in range(b) if any(x == y for x, y in zip(rows[a], rows[b]))
    ]
    assert dedup.first_copies(len(rows), pairs) == dedup.first_copies(
        len(rows), np.array(everything).reshape(-1, 2)
    )


def test_a_large_group_does_not_make_all_pairs():
    assert len(dedup.candidate_pairs(np.zeros((5000, 4), np.uint64))) < 2 * 5000


@QUICK
@given(
    st.integers(1, 30).flatmap(
        lambda n: st.tuples(st.just(n), st.lists(st.tuples(*2 * [st.integers(0, n - 1)])))
    )
)
def test_union_find_equals_walking_the_graph(case):
    n, pairs = case
    expected = []
    for start in range(n):
        seen, grown = {start}, True
        while grown:
            grown = False
            for a, b in pairs:
                if (a in seen) != (b in seen):
                    seen |= {a, b}
                    grown = True
        expected.append(min(seen))
    groups = dedup.UnionFind(n)
    for a, b in pairs:
        groups.union(a, b)
    assert groups.firsts() == expected


# The steps


def run_step(step, documents):
    decisions = step.resolve([step.sketch(document) for document in documents])
    return [step.apply(document, decision) for document, decision in zip(documents, decisions, strict=True)]


def test_exact_duplicates_keeps_the_first_of_each(corpus):
    results = run_step(dedup.ExactDuplicates(), corpus)
    seen = set()
    for document, result in zip(corpus, results):
        folded = dedup.fold_text(document.text)
        assert isinstance(result, Drop) == (folded in seen)
        assert result is document or result.reason == "exact_duplicate"
        seen.add(folded)
    assert all(isinstance(r, Drop) for d, r in zip(corpus, results) if d.meta.get("defect") == "duplicate")


def groups_by_comparing_all(texts, threshold):
    sets = [shingles(dedup.fold_text(text)) for text in texts]
    pairs = [
        (a, b)
        for b in range(len(sets))
        for a in range(b)
        if len(sets[a] & sets[b]) >= threshold * len(sets[a] | sets[b])
    ]
    return dedup.first_copies(len(texts), np.array(pairs).reshape(-1, 2))


def test_near_duplicates_equal_comparing_all_pairs(corpus):
    texts = [document.text for document in corpus[:500]]
    for threshold in (0.6, 0.8):
        expected = groups_by_comparing_all(texts, threshold)
        found = dedup.find_near_duplicates(texts, dedup.NearDuplicates(threshold=threshold))
        wrong = sum((a is None) != (b is None) for a, b in zip(found, expected))
        gone = sum(first is not None for first in expected)
        assert gone > 10
        assert wrong <= 1 + 0.02 * gone
        assert not any(
            a is not None and b is None for a, b in zip(found, expected)
        )  # exact, so precision is one


def test_recall_and_precision_where_it_matters(corpus):
    """At 0.9 and above at least 0.99 are found from sketches alone; below 0.7 hardly any is taken for a copy."""
    pairs = [
        (d.text, clean_document(CONFIG, d.meta["of"]).text)
        for d in corpus
        if d.meta.get("defect") == "near_duplicate"
    ]
    for number, document in enumerate(d for d in corpus if d.kind == "stories"):
        words = document.text.split(" ") if document.lang == "en" else list(document.text)
        words[number % len(words)] = "zzz" if document.lang == "en" else "龘"
        pairs.append((document.text, (" " if document.lang == "en" else "").join(words)))
    sketches = STEP.sketch_batch([text for pair in pairs for text in pair])
    candidates, similarity = STEP.pairs(sketches)
    found = set(map(tuple, candidates[similarity >= 0.8].tolist()))
    exact = [jaccard(*map(dedup.fold_text, pair)) for pair in pairs]
    hit = [(2 * number, 2 * number + 1) in found for number in range(len(pairs))]
    high = [h for h, s in zip(hit, exact) if 0.9 <= s < 1]
    low = [h for h, s in zip(hit, exact) if s < 0.7]
    assert len(high) > 300
    assert np.mean(high) >= 0.99
    assert len(low) > 20
    assert np.mean(low) <= 0.01


@QUICK
@given(st.lists(TEXT, max_size=8))
def test_any_texts_can_be_sketched_and_equal_texts_are_found(texts):
    found = dedup.find_near_duplicates([*texts, *texts])
    for number, text in enumerate(texts):
        folded = dedup.fold_text(text)
        twins = [n for n, other in enumerate([*texts, *texts]) if dedup.fold_text(other) == folded]
        firsts = {number if found[number] is None else found[number] for number in twins}
        assert len(firsts) == 1


def test_empty_and_tiny_documents():
    texts = ["", " \n", "a", "a", "ab", "猫", "猫"]
    assert dedup.find_near_duplicates(texts) == [None, 0, None, 2, None, None, 5]
    assert dedup.find_near_duplicates([]) == []
    assert dedup.NearDuplicates().resolve([]) == []
    assert dedup.ExactDuplicates().resolve([]) == []
    assert dedup.RepeatedSentences().resolve([]) == []
    assert dedup.find_near_duplicates([""], dedup.NearDuplicates(unit="word")) == [None]
    assert dedup.RepeatedSentences().resolve([dedup.RepeatedSentences().sketch(Document(""))] * 2) == [
        None,
        None,
    ]


def test_short_unrelated_documents_are_not_copies_of_each_other():
    texts = ["Snow fell.", "A dog barks.", "Six owls.", "我看见一只猫。", "今天下雨。", "Go home now."]
    step = dedup.NearDuplicates()
    assert step.resolve(step.sketch_batch(texts)) == [None] * len(texts)


def test_a_huge_document_is_read_in_pieces(monkeypatch):
    text = " ".join(f"{i * 7919 % 104729:x}" for i in range(20_000))
    whole = STEP.sketch_batch([text])
    monkeypatch.setattr(dedup, "BATCH_CHARS", 5000)
    pieces = STEP.sketch_batch(["short", text, "short"])
    assert (pieces[0] == pieces[2]).all()
    assert (pieces[1] == whole[0]).mean() > 0.99  # a space at a cut may add a run
    batches = list(dedup.batches_by_size([4000, 2000, 9000, 1, 1, 1]))
    assert batches == [(0, 1), (1, 2), (2, 3), (3, 6)]
    assert list(dedup.batches_by_size([])) == []
    assert list(dedup.batches_by_size([0, 0])) == [(0, 2)]


def test_memory_of_a_huge_document_is_bounded():
    import tracemalloc

    text = "abcdefghij " * 1_000_000
    STEP.sketch_batch(["warm"])
    tracemalloc.start()
    STEP.sketch_batch([text])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6


def test_sketches_do_not_depend_on_batches_processes_or_order(corpus):
    documents = corpus[:150]
    batch = STEP.sketch_batch([d.text for d in documents])
    assert (np.stack([STEP.sketch(d) for d in documents]) == batch).all()
    script = (
        "import sys, hashlib; from minillm.dedup import *; from minillm.world.stream import documents; from minillm.world.task import CorpusConfig;"
        "d = list(documents(CorpusConfig(defects=0.3), n_documents=150));"
        "s = [x for step in (NearDuplicates(), ExactDuplicates(), RepeatedSentences()) for x in map(step.sketch, d)];"
        "print(hashlib.sha256(b''.join(x.tobytes() for x in s)).hexdigest())"
    )
    import hashlib

    steps = (dedup.NearDuplicates(), dedup.ExactDuplicates(), dedup.RepeatedSentences())
    here = hashlib.sha256(
        b"".join(x.tobytes() for step in steps for x in map(step.sketch, documents))
    ).hexdigest()
    there = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)},
    )
    assert there.stdout.strip() == here


def test_steps_can_be_pickled():
    for step in (
        dedup.ExactDuplicates(),
        STEP,
        dedup.RepeatedSentences(),
        dedup.Decontaminate(["one two three four five six seven eight nine"]),
    ):
        copy = pickle.loads(pickle.dumps(step))
        assert copy.name == step.name
        if not isinstance(copy, dedup.Decontaminate):
            assert (copy.sketch(Document("a cat")) == step.sketch(Document("a cat"))).all()


def test_seed_and_unit_and_shingle_change_the_sketch():
    text = ["the cat sat on the mat and looked at the dog"]
    sketches = [
        dedup.NearDuplicates(**options).sketch_batch(text).tobytes()
        for options in ({}, {"seed": 1}, {"unit": "word"}, {"shingle": 4})
    ]
    assert len(set(sketches)) == 4


def test_words_as_shingles():
    step = dedup.NearDuplicates(unit="word", shingle=2, threshold=0.5)
    texts = ["the cat sat on the old mat", "The cat -- sat on the OLD mat!", "mat old the on sat cat the"]
    assert dedup.find_near_duplicates(texts, step) == [None, 0, None]
    exact = dedup.exact_similarity(step, texts, np.array([[0, 1], [0, 2]]))
    assert exact.tolist() == [1.0, 0.0]


def test_exact_similarity_equals_sets(corpus):
    texts = [document.text for document in corpus[:60]]
    pairs = np.array([(a, b) for b in range(60) for a in range(b)])
    expected = [jaccard(dedup.fold_text(texts[a]), dedup.fold_text(texts[b])) for a, b in pairs.tolist()]
    np.testing.assert_allclose(dedup.exact_similarity(STEP, texts, pairs), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, "threshold=0.0"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"n_hashes": 100}, "n_hashes=100 must be a power of two"),
        ({"shingle": 0}, "shingle=0"),
        ({"unit": "byte"}, "unit='byte'"),
        ({"threshold": 0.001, "n_hashes": 16}, "raise n_hashes or the threshold"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dedup.NearDuplicates(**options)


# Sentences


@QUICK
@given(st.text(st.sampled_from('ab .!?。！”"\n'), max_size=40))
def test_sentences_join_to_the_text(text):
    assert "".join(sentences_of(text)) == text


def test_sentences_of_both_languages():
    text = 'It cost 3.50. "Why?" she asked! 他说：“好。”然后走了。\nEnd'
    assert [s.strip() for s in sentences_of(text)] == [
        "It cost 3.50.",
        '"Why?"',
        "she asked!",
        "他说：“好。”",
        "然后走了。",
        "End",
    ]


@pytest.mark.parametrize("max_copies", [1, 2, 5])
def test_each_sentence_stays_so_many_times(max_copies):
    rows = ["Read our terms. One fish swam away.", "READ our terms. Two fish. Yes."] * 3 + ["Read our terms."]
    step = dedup.RepeatedSentences(max_copies=max_copies, min_chars=10)
    results = run_step(step, [Document(row) for row in rows])
    kept = Counter(
        dedup.fold_text(s)
        for result in results
        if isinstance(result, Document)
        for s in sentences_of(result.text)
    )
    assert kept["read our terms."] == min(max_copies, 7)
    assert kept["one fish swam away."] == min(max_copies, 3)
    assert kept["yes."] == kept["two fish."] == 3  # too short to count
    assert isinstance(results[-1], Drop) == (max_copies < 7)
    changed = [r for r in results if isinstance(r, Document) and "sentences_removed" in r.meta]
    assert (len(changed) > 0) == (max_copies < 7)


def test_repeated_sentences_keep_the_first_in_order():
    step = dedup.RepeatedSentences(max_copies=1, min_chars=0)
    results = run_step(step, [Document("The sky is blue. A."), Document("B. The sky is blue.")])
    assert [r.text for r in results] == ["The sky is blue. A.", "B."]


def test_repeated_sentences_refuse_nonsense():
    with pytest.raises(ValueError, match="max_copies=0"):
        dedup.RepeatedSentences(max_copies=0)


# Decontamination

ITEM = "Which planet of the solar system has the largest number of known moons, Jupiter or Saturn?"


@QUICK
@given(
    st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f"]), max_size=12),
    st.lists(st.integers(1, 5), min_size=1, unique=True),
)
def test_hashes_of_runs_equal_exactly_where_runs_do(words, lengths):
    found = dedup.gram_hashes(words, lengths)
    assert set(found) == {n for n in lengths if n <= len(words)}
    for n, hashes in found.items():
        runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        assert len(runs) == len(hashes)
        assert len(set(zip(runs, hashes.tolist()))) == len(set(runs)) == len(set(hashes.tolist()))


def test_thirteen_words_are_a_leak_and_twelve_are_not():
    step = dedup.Decontaminate([ITEM])
    words = ITEM.split()
    assert isinstance(step(Document("He read: " + " ".join(words[1:14]).upper() + " and left.")), Drop)
    document = Document("He read: " + " ".join(words[1:13]) + " and left.")
    assert step(document) is document
    assert step(Document(ITEM)).reason == "benchmark"
    assert "solar system" in step(Document(ITEM)).detail


def test_chinese_items_use_their_own_length():
    item = "太阳系中已知卫星数量最多的行星是木星还是土星呢？请选择。"
    step = dedup.Decontaminate([item], n=13, n_zh=15)
    assert isinstance(step(Document("有人问：" + item[2:17] + "。")), Drop)
    kept = Document("有人问：" + item[2:16] + "啊。")
    assert step(kept) is kept


def test_short_items_count_as_a_whole_and_too_short_ones_not():
    step = dedup.Decontaminate(["one two three four five six seven eight", "yes or no"], min_n=8)
    assert step.too_short == 1
    assert isinstance(step(Document("zero ONE, two three four five six seven eight nine")), Drop)
    assert isinstance(step(Document("is it yes or no here")), Document)
    with pytest.raises(ValueError, match="no item has min_n=8 words"):
        dedup.Decontaminate(["too short"])


def test_cutting_takes_the_run_and_its_window():
    before, after = "B" * 50 + " left. " + "x" * 30, "y" * 30 + " right " + "A" * 50
    step = dedup.Decontaminate([ITEM], on_hit="cut", window=10, min_piece=20)
    result = step(Document(f"{before} {ITEM} {after}", meta={"k": 1}))
    assert isinstance(result, Document)
    assert "planet" not in result.text
    assert "moons" not in result.text
    assert result.text.startswith("B" * 50)
    assert result.text.endswith("A" * 50)
    assert result.meta["k"] == 1
    assert result.meta["benchmark_cuts"] > 0
    assert isinstance(dedup.Decontaminate([ITEM], on_hit="cut")(Document(f"{before} {ITEM} {after}")), Drop)
    many = f" {'z' * 60} ".join([ITEM] * 5)
    assert isinstance(
        dedup.Decontaminate([ITEM], on_hit="cut", window=0, min_piece=5, max_pieces=2)(Document(many)), Drop
    )
    assert isinstance(
        dedup.Decontaminate([ITEM], on_hit="cut", window=0, min_piece=5, max_pieces=9)(Document(many)),
        Document,
    )


@QUICK
@given(st.text("abc ", max_size=30), st.lists(st.tuples(st.integers(-5, 35), st.integers(0, 10)), max_size=4))
def test_pieces_between_hold_what_no_cut_holds(text, cuts):
    ranges = [(a, a + n) for a, n in cuts]
    left = "".join(c for i, c in enumerate(text) if not any(a <= i < b for a, b in ranges))
    assert "".join(dedup.pieces_between(text, ranges, 1)).replace(" ", "") == left.replace(" ", "")


@pytest.mark.parametrize("name", ["exam.jsonl", "exam.jsonl.gz", "exam.txt"])
def test_a_benchmark_comes_from_files(tmp_path, name):
    items = [ITEM, "What is the name of the river that flows through the capital of France into the sea?"]
    data = (
        "\n<|endoftext|>\n".join(items)
        if name == "exam.txt"
        else "".join(json.dumps({"text": t}) + "\n" for t in items)
    )
    path = tmp_path / name
    path.write_bytes(gzip.compress(data.encode()) if name.endswith("gz") else data.encode())
    step = dedup.Decontaminate.from_files(path)
    assert all(isinstance(step(Document("So: " + item)), Drop) for item in items)
    assert isinstance(step(Document("The river was wide.")), Document)


def test_common_runs_are_spared_on_request():
    proverb = "all work and no play makes jack a dull boy said the old miller again"
    step = dedup.Decontaminate([ITEM, proverb])
    documents = [Document(f"{n}: {proverb}") for n in range(11)] + [Document(ITEM)]
    spared = step.without_common(documents, max_documents=10)
    assert [isinstance(spared(d), Drop) for d in documents] == [False] * 11 + [True]
    assert isinstance(step(documents[0]), Drop)  # the step itself is unchanged
    assert isinstance(step.without_common(documents, max_documents=11)(documents[0]), Drop)


def test_planted_leaks_are_all_found(corpus):
    leaks = [d for d in corpus if d.meta.get("defect") == "leak"]
    step = dedup.Decontaminate(benchmark_item(CONFIG, n) for n in sorted({d.meta["item"] for d in leaks}))
    assert len(leaks) > 50
    assert all(isinstance(step(d), Drop) for d in leaks)
    clean = [d for d in corpus if not d.meta.get("defect")]
    assert np.mean([isinstance(step(d), Drop) for d in clean]) < 0.05


@QUICK
@given(TEXT)
def test_any_text_can_be_checked_and_split(text):
    step = dedup.Decontaminate([ITEM])
    assert step(Document(text)) == Document(text)
    run_step(dedup.RepeatedSentences(max_copies=1, min_chars=0), [Document(text), Document(text)])
    run_step(dedup.ExactDuplicates(), [Document(text)])


def test_wrong_numbers_for_decontamination_are_refused():
    for options, message in (({"n": 5}, "min_n=8"), ({"on_hit": "burn"}, "on_hit='burn'")):
        with pytest.raises(ValueError, match=message):
            dedup.Decontaminate([ITEM], **options)
