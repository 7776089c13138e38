import math
import re

import pytest
from hypothesis import given, settings
from step_laws import ANY_TEXT, CLEAN, DOCUMENTS, is_a_step, keeps_its_pace, survives, with_defect

from minillm.check import check, laws
from minillm.corpus import Document, dice, units
from minillm.extract import ONLY_SIMPLIFIED, ONLY_TRADITIONAL, Drop
from minillm.filter import (
    GOPHER_LENGTH,
    RULES,
    SHORT_RULES,
    Heuristics,
    Language,
    Length,
    han_variant,
    identify_ngram,
    measure,
    repeated_share,
)


def surely_below(k, n, p):
    def log_term(i):
        return (
            math.lgamma(n + 1)
            - math.lgamma(i + 1)
            - math.lgamma(n - i + 1)
            + i * math.log(p)
            + (n - i) * math.log(1 - p)
        )

    return sum(math.exp(log_term(i)) for i in range(k + 1)) < 0.05


SOLUTIONS = {
    "filter.allowed": lambda base, recall, precision: min(
        1.0, base * recall / (1 - base) * (1 - precision) / precision
    ),
    "filter.repeated_share": repeated_share,
    "filter.surely_below": surely_below,
    "filter.han_variant": han_variant,
}


@pytest.mark.parametrize(
    ("exercise", "law"), [(name, law) for name in SOLUTIONS for law in laws(name)], ids=str
)
def test_the_package_obeys_its_laws(exercise, law):
    law(SOLUTIONS[exercise])


def share_of_all(text):
    simple, other = (sum(c in kind for c in text) for kind in (ONLY_SIMPLIFIED, ONLY_TRADITIONAL))
    if not simple + other:
        return ""
    share = other / max(1, len(text))
    return "simplified" if share < 0.2 else "traditional" if share > 0.8 else "both"


def overlapping(words, n, total):
    runs, seen, again = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)], set(), 0
    for run in runs:
        again += (run in seen) * n
        seen.add(run)
    return repeated_share(words, n, total)[0], again / total


def ignoring_blanks(words, n, total):
    return repeated_share(words, n, total, 0)


def whole_sum(k, n, p):
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1)) < 0.05


@pytest.mark.parametrize(
    ("exercise", "wrong", "law"),
    [
        ("allowed", lambda base, recall, precision: 1 - precision, "the chapter's example"),
        (
            "allowed",
            lambda base, recall, precision: base * recall / (1 - base) * (1 - precision),
            "the chapter's example",
        ),
        (
            "allowed",
            lambda base, recall, precision: base * recall / (1 - base) * (1 - precision) / precision,
            "a share is never above 1",
        ),
        ("repeated_share", ignoring_blanks, "the chapter's example"),
        ("repeated_share", overlapping, "the chapter's example"),
        ("surely_below", lambda k, n, least: k / n < least, "a short text is never accused"),
        ("surely_below", lambda k, n, least: n > 23 and k / n < least, "it is the sum"),
        (
            "surely_below",
            lambda k, n, least: n > 23 and k < n * least - 1.645 * (n * least * (1 - least)) ** 0.5,
            "it is the sum",
        ),
        ("surely_below", whole_sum, "ten thousand lines are no trouble"),
        (
            "han_variant",
            lambda text: "traditional" if set(text) & ONLY_TRADITIONAL else "simplified",
            "most characters tell nothing",
        ),
        (
            "han_variant",
            lambda text: (
                han_variant(text) and ("traditional" if set(text) & ONLY_TRADITIONAL else "simplified")
            ),
            "one slip does not decide",
        ),
        ("han_variant", share_of_all, "one way of writing"),
    ],
)
def test_check_names_the_broken_law(exercise, wrong, law):
    report = check(f"filter.{exercise}", wrong, quiet=True)
    broken = [rule.name for rule, reason in report.reasons.items() if reason is not None]
    assert broken[0] == law


STEPS = [
    Length(min_tokens=5),
    Heuristics(),
    Language(),
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
    for work in (measure, identify_ngram):
        work(text)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_time_grows_no_faster_than_hostile_text(step):
    keeps_its_pace(step)


def test_length_counts_units_or_what_it_is_given():
    assert Length(min_tokens=3)(Document("one two")).detail == "2 tokens, at least 3"
    assert Length(min_tokens=3)(Document("三个字")).text == "三个字"
    assert Length(min_tokens=0, max_tokens=2)(Document("one two three")).reason == "too_long"
    assert Length(min_tokens=5, count=len)(Document("abcde")).text == "abcde"
    with pytest.raises(ValueError, match="min_tokens=9 must be between 0 and max_tokens=3"):
        Length(min_tokens=9, max_tokens=3)


def test_repetition_is_counted_as_datatrove_counts_it():
    repetition = pytest.importorskip("datatrove.pipeline.filters.gopher_repetition_filter")
    r = dice("words")
    for _ in range(50):
        words = ["abcdefg"[: 1 + int(r() * 4)] for _ in range(60)]
        text = " ".join(words)
        for n in (2, 3, 5, 7):
            top, again = repeated_share(words, n, len(text))
            grams = repetition.get_n_grams(words, n)
            if len(set(grams)) < len(grams):
                assert top == pytest.approx(repetition.find_top_duplicate(grams) / len(text))
            assert again == pytest.approx(repetition.find_all_duplicate(words, n) / len(text))


def test_gopher_and_fineweb_agree_with_datatrove_on_english():
    gopher = pytest.importorskip("datatrove.pipeline.filters.gopher_repetition_filter")
    texts = [d.text for d in DOCUMENTS if d.lang == "en" and len(units(d.text)) >= 30][:150]
    for text in texts:
        lines, measured = re.split("\n+", text), measure(text)
        n, chars = gopher.find_duplicates(lines)
        assert measured["repeated_lines"] == pytest.approx(n / len(lines))
        assert measured["repeated_line_chars"] == pytest.approx(chars / len(text))
        assert measured["short_lines"] == sum(len(line) <= 30 for line in lines) / len(lines)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("the cat and the dog " * 9 + ".", "top_2gram"),
        ("I b a c o d u f. " * 3 + "the and of be it is.", "word_length"),
        ("# one the # two and # six of. Yes. No.", "hashes"),
        ("- the first and best thing\n- the second of them all\n- that have a third", "bullet_lines"),
        ("Look at the lamps and the shells...\nThen go to the old house and wait...", "ellipses"),
        ("Seventeen lamps stood there. Nobody came. Everybody slept.", "stop_words"),
        ("def f(x) { return the and of to be with it. Yes. No. }", "curly"),
        ("Lorem ipsum dolor sit amet. And so to the end of it. Stop.", "lorem"),
        ("the first line of it\nand then that one\nwith no full stop", "ended_lines"),
    ],
)
def test_each_rule_finds_its_case(text, reason):
    rules = [rule for rule in RULES if rule.measure == reason]
    assert rules
    assert Heuristics(rules=tuple(rules))(Document(text)).reason == reason
    assert Heuristics()(Document(text)).reason in {rule.measure for rule in RULES}


def test_an_ordinary_paragraph_passes_every_rule_in_both_languages():
    english = (
        "The old lamp stood in the kitchen window for many years, and nobody remembered who had put it there. "
        "One winter evening the lights of the whole village went out at once. Ruby found the lamp, filled it with oil "
        "and carried it to the library, where people waited in the dark with their children. They stayed until morning."
    )
    chinese = (
        "厨房的窗台上放着一盏旧灯，很多年来谁也不记得是谁把它放在那里的。有一个冬天的晚上，整个村子的灯一下子全灭了。"
        "小红找到了那盏灯，加满了油，提着它走到图书馆，大人和孩子们正在黑暗中等着。他们一直坐到了天亮，才回家去。"
    )
    for text in (english, chinese):
        document = Document(text)
        assert Heuristics(rules=(GOPHER_LENGTH, *RULES))(document) is document


def test_a_repeated_chinese_phrase_is_found_as_an_english_one_is():
    english = measure("One day Ruby found a lamp. " * 6)
    chinese = measure("有一天小红找到了一盏旧灯。" * 6)
    for name in ("top_3gram", "repeated_5gram", "repeated_10gram"):
        assert english[name] > 0.2
        assert chinese[name] > 0.2


def test_every_rule_names_its_source():
    assert all("arXiv:" in rule.source and rule.least <= rule.most for rule in (GOPHER_LENGTH, *RULES))
    assert set(SHORT_RULES) < set(RULES)
    assert {rule.measure for rule in RULES} <= set(measure("x"))


def test_short_rules_find_loops_and_spam_and_spare_stories():
    step = Heuristics(rules=SHORT_RULES)
    machines = [d for d in with_defect("machine") if d.meta["generator"] in ("loop", "spam")]
    assert all(isinstance(step(d), Drop) for d in machines)
    stories = [d for d in CLEAN if d.kind == "stories"]
    assert sum(isinstance(step(d), Drop) for d in stories) <= len(stories) / 50


SENTENCES = {
    "en": "She opened the window and looked out at the sea.",
    "de": "Sie öffnete das Fenster und blickte auf das Meer hinaus.",
    "fr": "Elle ouvrit la fenêtre et regarda la mer.",
    "es": "Abrió la ventana y miró hacia el mar.",
    "it": "Aprì la finestra e guardò verso il mare.",
    "pt": "Ela abriu a janela e olhou para o mar.",
    "nl": "Ze opende het raam en keek uit over de zee.",
    "zh": "她打开窗户，望着大海。",
    "ja": "彼女は窓を開けて海を眺めた。",
    "ko": "그녀는 창문을 열고 바다를 바라보았다.",
    "ru": "Она открыла окно и посмотрела на море.",
    "el": "Άνοιξε το παράθυρο και κοίταξε τη θάλασσα.",
    "ar": "فتحت النافذة ونظرت إلى البحر.",
    "th": "เธอเปิดหน้าต่างและมองออกไปที่ทะเล",
    "und": "12 + 30 = 42",
}


@pytest.mark.parametrize("lang", SENTENCES)
def test_a_sentence_tells_its_language(lang):
    assert identify_ngram(SENTENCES[lang])[0] == lang
    assert identify_ngram(SENTENCES[lang])[1] > 0.5


def test_foreign_sentences_go_and_the_corpus_stays():
    for lang in ("de", "fr", "ja", "ru"):
        out = Language()(Document(SENTENCES[lang]))
        assert out.reason == "language"
        assert out.detail.startswith(lang)
    dropped = [d for d in CLEAN if isinstance(Language()(d), Drop)]
    assert len(dropped) <= len(CLEAN) / 100
    wrong = [d for d in CLEAN if d.lang in ("en", "zh") and identify_ngram(d.text)[0] != d.lang]
    assert len(wrong) <= len(CLEAN) / 100


def test_simplified_and_traditional_are_told_apart():
    step = Language(variants=("simplified", "both", ""))
    for document in with_defect("traditional"):
        assert step(document).reason == "han_variant"
        assert Language()(document).meta["variant"] == "traditional"
    assert han_variant("蓝色的蜡烛") == "simplified"
    assert han_variant("山上有水") == ""
    assert han_variant("蓝藍红紅") == "both"
    with pytest.raises(TypeError, match="identify"):
        Language(identify="x")
