import re
import zlib

import pytest
from hypothesis import given, settings
from step_laws import ANY_TEXT, CLEAN, DOCUMENTS, is_a_step, keeps_its_pace, survives, with_defect

from minillm.check import check, laws
from minillm.corpus import Document, sentences_of
from minillm.detect import has_han
from minillm.extract import Drop
from minillm.harm import (
    KIND,
    RedactPII,
    Span,
    Toxicity,
    false_alarm_rates,
    find_pii,
    identity_check,
    luhn_valid,
    moved_answers,
    span_scores,
    swap_gap,
    toxic_examples,
    toxicity_classifier,
    toxicity_features,
    train_toxicity,
)
from minillm.world.defects import TOXIC


def emails(pattern):
    return lambda text: [found.span() for found in re.finditer(pattern, text)]


def moved(answer, spans):
    """`moved_answers` for one answer, with kinds whose names have the length asked for."""
    made = [Span(start, end, "k" * (n - 2), 1.0) for start, end, n in spans]
    return next(((start, end) for start, end in moved_answers([answer], made)), None)


SOLUTIONS = {
    "harm.luhn_valid": luhn_valid,
    "harm.moved": moved,
    "harm.swap_gap": swap_gap,
    "harm.identity_check": identity_check,
    "harm.find_email": lambda text: [(s.start, s.end) for s in find_pii(text) if s.kind == "email"],
}


@pytest.mark.parametrize(
    ("exercise", "law"), [(name, law) for name in SOLUTIONS for law in laws(name)], ids=str
)
def test_the_package_obeys_its_laws(exercise, law):
    law(SOLUTIONS[exercise])


@pytest.mark.parametrize(
    ("exercise", "wrong", "law"),
    [
        ("harm.identity_check", lambda n: "X", "the 18 digits, weighted, are 1 modulo 11"),
        (
            "harm.identity_check",
            lambda n: "0123456789X"[(12 - sum(int(d) * 2 ** (len(n) - k) for k, d in enumerate(n))) % 11],
            "reads only the first 17 characters",
        ),
        (
            "harm.luhn_valid",
            lambda n: sum(int(d) * (1 + k % 2) for k, d in enumerate(reversed(n))) % 10 == 0,
            "the example of ISO/IEC 7812-1",
        ),
        (
            "harm.moved",
            lambda answer, spans: moved(answer, spans[:1]),
            "the text at the new place is the old one",
        ),
        (
            "harm.moved",
            lambda answer, spans: moved(answer, [s for s in spans if s[1] <= answer[0]]),
            "what lost a character is gone",
        ),
        (
            "harm.swap_gap",
            lambda scorer, sentence, words: (
                scorer(sentence.format(words[-1])) - scorer(sentence.format(words[0]))
            ),
            "the largest difference, in any order",
        ),
        (
            "harm.find_email",
            emails(r"\b[\w.+-]+@[\w-]+(?:\.[A-Za-z-]+)+\b"),
            "finds an address between Chinese characters",
        ),
        (
            "harm.find_email",
            emails(r"[A-Za-z0-9._%+-]+@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,24}"),
            "fifty thousand letters without @ take a moment",
        ),
    ],
)
def test_check_names_the_broken_law(exercise, wrong, law):
    report = check(exercise, wrong, quiet=True)
    broken = [rule.name for rule, reason in report.reasons.items() if reason is not None]
    assert broken[0] == law


STEPS = [
    RedactPII(),
    Toxicity(),
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_a_step_is_a_step_can_be_pickled_and_has_nothing_to_add_to_its_own_output(step):
    is_a_step(step)


@settings(max_examples=25, deadline=None)
@given(ANY_TEXT)
def test_no_step_fails_on_any_text_once_it_is_well_formed(text):
    survives(STEPS, text)


@settings(max_examples=25, deadline=None)
@given(ANY_TEXT)
def test_our_own_functions_do_not_fail_on_text_that_is_not_well_formed(text):
    find_pii(text)
    toxicity_classifier()(text)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_time_grows_no_faster_than_hostile_text(step):
    keeps_its_pace(step)


def test_planted_data_is_found_to_the_character_and_nothing_else():
    found = [find_pii(d.text) for d in DOCUMENTS]
    precision, recall = span_scores(found, [d.meta.get("spans", []) for d in DOCUMENTS])
    assert (precision, recall) == (1, 1)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("write to bob.x+y@mail.example.com.", ["bob.x+y@mail.example.com"]),
        ("11010519491231002X", ["11010519491231002X"]),
        ("身份证11010519491231002x。", ["11010519491231002x"]),
        ("110105194913310021", []),
        ("1101051949123100212", []),
        ("card 4111-1111-1111-1111!", ["4111-1111-1111-1111"]),
        ("card 4111 1111 1111 1112", []),
        ("paid with 4111111111111111 2 times", ["4111111111111111"]),
        ("amex 3782 822463 10005", ["3782 822463 10005"]),
        ("0000000000000000", []),
        ("从192.0.2.7登录", ["192.0.2.7"]),
        ("version 1.2.3.4.5, 999.1.1.1, 1.2.3", []),
        ("at 2001:db8::8a2e:370:7334 or fe80::1", ["2001:db8::8a2e:370:7334", "fe80::1"]),
        ("at 12:30:45, std::vector, a :: b", []),
        ("打13800138000或+86 139-0013-9000", ["13800138000", "+86 139-0013-9000"]),
        ("010-555-0190, (0571) 8765-4321", ["010-555-0190", "(0571) 8765-4321"]),
        ("call (382) 555-0190 or +1 212-555-0123", ["(382) 555-0190", "+1 212-555-0123"]),
        ("625-388=237, 2023-10-15, 3.14159, 12345678901", []),
    ],
)
def test_patterns_and_check_digits(text, found):
    assert [text[s.start : s.end] for s in find_pii(text)] == found


def test_a_wrong_check_digit_lowers_the_score():
    right, wrong = find_pii("11010519491231002X 110105194912310021")
    assert (right.score, wrong.score) == (1.0, 0.6)
    assert len(find_pii("110105194912310021", min_score=0.9)) == 0


def test_luhn_by_hand():
    assert luhn_valid("79927398713")  # the example of ISO/IEC 7812-1
    assert not any(luhn_valid(f"7992739871{d}") for d in "012456789")


def test_redaction_keeps_the_sentence_and_moves_the_answers():
    text = "Mail bob@example.org now.\nQ: Who?\nA: Bob"
    document = Document(text, meta={"answers": [[37, 41, "who"], [5, 10, "lost"]]})
    out = RedactPII()(document)
    assert out.text == "Mail <EMAIL> now.\nQ: Who?\nA: Bob"
    assert out.meta["redacted"] == {"email": 1}
    ((start, end, label),) = out.meta["answers"]
    assert (out.text[start:end], label) == (text[37:41], "who")
    assert RedactPII(max_spans=0)(document).reason == "pii_list"


def test_insults_go_and_towns_of_that_name_stay():
    step = Toxicity()
    toxic = with_defect("toxic")
    assert len(toxic) > 20
    for document in toxic:
        assert isinstance(step(document), Drop) == document.meta["toxic"], document.text
    assert sum(isinstance(step(d), Drop) for d in CLEAN) <= len(CLEAN) / 200


@pytest.mark.parametrize(
    "kind",
    ["darling", "angel", "star", "sunshine", "marvel", "宝贝", "明星", "小太阳", "福星", "伙伴"],
)
def test_a_kind_word_that_was_never_trained_on_is_no_insult(kind):
    assert kind not in [*KIND["en"], *KIND["zh"]]
    texts, labels = toxic_examples(100, seed=77, kind=0)
    insults = [text for text, label in zip(texts, labels, strict=True) if label]
    scorer = toxicity_classifier()
    lang = "zh" if has_han(kind) else "en"
    there = [(text, word) for text in insults for word in TOXIC[lang] if word in text]
    assert len(there) > 10
    assert all(scorer(text) > 0.5 for text, _ in there)
    assert sum(scorer(text.replace(word, kind)) > 0.5 for text, word in there) <= len(there) / 10


def test_the_worst_sentence_counts():
    scorer = toxicity_classifier()
    kind = "Anna gave the kite to Ben. They were happy. "
    insult = '"You are a grobnik!" Nora shouted at Rose.'
    assert scorer(kind * 20 + insult) == pytest.approx(scorer(insult), abs=0.05)
    assert scorer(insult) > 0.5 > scorer(kind)
    assert scorer("") == 0
    assert sentences_of("One. Two!” 三。四") == ["One. ", "Two!” ", "三。", "四"]


def test_hashed_features_do_not_depend_on_the_process():
    places, values = toxicity_features("You are 你这个")
    assert places == sorted(places)
    assert sum(v * v for v in values) == pytest.approx(1)

    expected = {"you", "are", "you are", "are 你", "你 这", "这 个", "你这", "这个", "你这个"}
    assert set(places) == {zlib.crc32(gram.encode()) % 65536 for gram in expected}


def test_false_alarm_rates_count_harmless_texts_by_group():
    scorer = lambda text: 0.5 * ("b" in text)  # noqa: E731
    assert false_alarm_rates(scorer, {"x": ["a", "b"], "y": ["a"]}) == {"x": 0.5, "y": 0.0}
    assert false_alarm_rates(scorer, {"x": ["a", "b"]}, threshold=0.6) == {"x": 0.0}
    with pytest.raises(ValueError, match="group 'y' has no text"):
        false_alarm_rates(scorer, {"x": ["a"], "y": []})


def test_a_name_that_is_only_insulted_is_held_against_those_who_bear_it():
    insults = [f"You are a grob{n}, you Velmar!" for n in range(40)] + [
        f"You are a grob{n}!" for n in range(40)
    ]
    harmless = [f"You are a dear{n}!" for n in range(80)] + ["You are a dear, you Ossin!"]
    scorer = train_toxicity([*insults, *harmless], [1.0] * len(insults) + [0.0] * len(harmless)).sentence
    assert swap_gap(scorer, "You are a {}!", ["Velmar", "Ossin"]) > 0.2
    assert scorer("You are a Velmar!") > scorer("You are a Ossin!")
