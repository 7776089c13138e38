import json
import pickle
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm import corpus, detect, harm
from minillm import extract as q
from minillm.base.errors import MissingPackage
from minillm.check import check, laws
from minillm.corpus import Document, dice
from minillm.vendors import perspective, presidio
from minillm.world.defects import TOXIC
from minillm.world.stream import documents
from minillm.world.task import CorpusConfig

DOCUMENTS = list(documents(CorpusConfig(seed=41, defects=0.4), n_documents=800))
CLEAN = [d for d in DOCUMENTS if "defect" not in d.meta]
ANY_TEXT = st.text(st.characters(), max_size=300)  # lone surrogates and NUL included


def with_defect(name):
    return [d for d in DOCUMENTS if d.meta.get("defect") == name]


# ---- the laws of the exercises

SOLUTIONS = {
    "quality.densest": q.densest,
    "quality.identity_check": harm.identity_check,
    "quality.auroc": detect.auroc,
    "quality.repair": q.repair_line,
    "quality.find_email": lambda text: [(s.start, s.end) for s in harm.find_pii(text) if s.kind == "email"],
}


@pytest.mark.parametrize(
    ("exercise", "law"), [(name, law) for name in SOLUTIONS for law in laws(name)], ids=str
)
def test_the_package_obeys_its_laws(exercise, law):
    law(SOLUTIONS[exercise])


def emails(pattern):
    return lambda text: [found.span() for found in re.finditer(pattern, text)]


@pytest.mark.parametrize(
    ("exercise", "wrong", "law"),
    [
        ("quality.densest", lambda gains: (0, len(gains)), "finds the run of the chapter's example"),
        (
            "quality.densest",
            lambda gains: q.densest([g if g > -3 else -9 for g in gains]),
            "no run is better",
        ),
        (
            "quality.densest",
            lambda gains: q.densest(gains) if any(g > 0 for g in gains) else (1, 1),
            "nothing but losses gives (0, 0)",
        ),
        ("quality.identity_check", lambda n: "X", "the 18 digits, weighted, are 1 modulo 11"),
        (
            "quality.identity_check",
            lambda n: "0123456789X"[(12 - sum(int(d) * 2 ** (len(n) - k) for k, d in enumerate(n))) % 11],
            "reads only the first 17 characters",
        ),
        (
            "quality.auroc",
            lambda a, b: float(np.mean([x < y for x in a for y in b])),
            "ties count half",
        ),
        (
            "quality.repair",
            lambda line: line.encode("latin-1", "ignore").decode("utf-8", "ignore"),
            "what is right stays",
        ),
        (
            "quality.find_email",
            emails(r"\b[\w.+-]+@[\w-]+(?:\.[A-Za-z-]+)+\b"),
            "finds an address between Chinese characters",
        ),
        (
            "quality.find_email",
            emails(r"[A-Za-z0-9._%+-]+@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,24}"),
            "fifty thousand letters without @ take a moment",
        ),
    ],
)
def test_check_names_the_broken_law(exercise, wrong, law):
    report = check(exercise, wrong, quiet=True)
    broken = [rule.name for rule, reason in report.reasons.items() if reason is not None]
    assert broken[0] == law


# ---- every step

STEPS = [
    q.WellFormed(),
    q.ExtractText(),
    q.ExtractText(engine="trafilatura"),
    q.ExtractText(engine="justext"),
    q.RepairEncoding(),
    filter.Length(min_tokens=5),
    filter.Heuristics(),
    filter.Language(),
    filter.Language(engine="py3langid"),
    detect.MachineText(),
    harm.RedactPII(),
    harm.RedactPII(find=presidio.PresidioFinder()),
    harm.Toxicity(),
]
IDS = [f"{step.name}-{getattr(step, 'engine', '')}" for step in STEPS]


@pytest.mark.parametrize("step", STEPS, ids=IDS)
def test_a_step_is_a_step_can_be_pickled_and_has_nothing_to_add_to_its_own_output(step):
    assert isinstance(step, q.Step)
    twin = pickle.loads(pickle.dumps(step))
    some = DOCUMENTS[:100]
    before = [(d.text, json.dumps(d.meta, sort_keys=True)) for d in some]
    for document in some:
        out, again = step(document), twin(document)
        assert type(out) is type(again)
        if isinstance(out, q.Drop):
            assert out == again
            assert re.fullmatch("[a-z0-9_]+", out.reason)
            assert out.detail
        else:
            assert out.text == again.text
            assert (out.lang, out.kind, out.split) == (document.lang, document.kind, document.split)
            once_more = step(out)
            assert isinstance(once_more, Document)
            assert once_more.text == out.text
    assert before == [(d.text, json.dumps(d.meta, sort_keys=True)) for d in some], "the input was changed"


@settings(max_examples=25, deadline=None)
@given(ANY_TEXT)
def test_no_step_fails_on_any_text_once_it_is_well_formed(text):
    document = q.WellFormed()(Document(text))
    if isinstance(document, q.Drop):
        return
    document.text.encode("utf-8")
    assert "\0" not in document.text
    for step in STEPS:
        if "justext" not in str(step) and "presidio" not in str(step):
            step(document)


@settings(max_examples=25, deadline=None)
@given(ANY_TEXT)
def test_our_own_functions_do_not_fail_on_text_that_is_not_well_formed(text):
    for work in (
        q.extract_density,
        q.is_html,
        q.repair_line,
        filter.measure,
        harm.find_pii,
        q.plausible,
        filter.identify_ngram,
    ):
        work(text)
    harm.toxicity_classifier()(text)
    detect.machine_features(text, detect._language_model(3, 104))


HOSTILE = [
    "<",
    "<a ",
    '<a ">"',
    "<!--",
    "<script>",
    "<div><p>x",
    "a@a.",
    "1-",
    "1.",
    "1:",
    "(123)",
    "Ã©",
    "汉",
    "\n",
    "! ",
    "a b ",
]


@pytest.mark.parametrize(
    "step",
    [s for s in STEPS if not getattr(s, "engine", "n").startswith(("tra", "jus", "py3"))][:9],
    ids=lambda step: step.name,
)
def test_time_grows_no_faster_than_hostile_text(step):
    step(Document("warm up"))
    for piece in HOSTILE:
        times = []
        for size in (8_000, 64_000):
            document = Document(piece * (size // len(piece)))
            start = time.process_time()
            step(document)
            times.append(time.process_time() - start)
        # Eight times the text; quadratic time would be 64 times as long.
        assert times[1] < 30 * max(times[0], 0.02), f"{piece!r}: {times}"


def test_a_hundred_megabyte_line_goes_at_once():
    document = Document("x" * 100_000_000)
    start = time.process_time()
    assert q.WellFormed()(document) == q.Drop("too_long", "100000000 characters, at most 1000000")
    assert time.process_time() - start < 1


# ---- pages


def test_markup_is_cut_and_scripts_comments_and_broken_tags_are_left_out():
    page = (
        '<!DOCTYPE html><P class="a>b" x=\'<\'>1 < 2<script>if (a<b) x="<p>"</SCRIPT><!-- <p> --><br/>x</p><b'
    )
    assert list(q.read_markup(page)) == [
        ("open", "p", " class=\"a>b\" x='<'"),
        ("text", "1 ", ""),
        ("text", "<", ""),
        ("text", " 2", ""),
        ("open", "script", ""),
        ("close", "script", ""),
        ("open", "br", "/"),
        ("text", "x", ""),
        ("close", "p", ""),
        ("open", "b", ""),
    ]


def test_an_unclosed_comment_or_quote_does_not_swallow_the_page():
    body = "<p>" + "Anna had six plums and gave two of them to Ben. " * 3
    assert "Anna had" in q.extract_density("<!-- broken >" + body)
    assert "Anna had" in q.extract_density('<a href="x>link</a>' + body)


def test_blocks_count_words_and_links():
    parsed = q.PageParser().parse(
        "<ul><li><a href=/>Home page</a> now</ul><p>one<br>two &amp; three<p>他们<em>去</em>了"
    )
    assert [(b.text, b.n_words, b.n_linked) for b in parsed.blocks[:2]] == [
        ("Home page now", 3, 2),
        ("one\ntwo & three", 3, 0),
    ]
    assert parsed.blocks[2].text == "他们去了"
    assert parsed.blocks[2].n_words == pytest.approx(4 / 1.5)


def test_a_hint_marks_a_box_unless_most_of_the_page_is_in_it():
    story = "<p>" + "Anna had six plums and gave two of them to Ben in the garden. " * 2
    banner = "<p>We store cookies on your device to show you what you do not want to see."
    page = f'<div class="cookie-banner">{banner}</div><div class="post has-sidebar">{story * 3}</div>'
    assert q.PageParser().parse(page).skipped() == [True, False, False, False]
    assert q.PageParser(hints=False).parse(page).skipped() == [False] * 4
    assert "cookies" not in q.extract_density(page)


def test_the_core_grows_to_the_box_around_it_and_no_further():
    inside = "<article><p>" + "long words come here " * 8 + "<p>Q: who?<p>A: six</article>"
    text = q.extract_density(f"<body><div>Share this</div>{inside}<div>Read more</div></body>")
    assert text.split("\n")[1:] == ["Q: who?", "A: six"]


def test_the_corpus_pages_come_out_as_they_went_in():
    scores = [q.token_f1(q.ExtractText()(d).text, d.meta["clean"]) for d in with_defect("html")]
    assert len(scores) > 20
    assert min(scores) > 0.95


def test_hard_pages_better_than_everything_and_hints_help():
    pages = [pages.write_page(("test", n)) for n in range(100)]
    texts = [(q.decode_page(page.data, page.declared)[0], page) for page in pages]

    def mean(extract, some):
        return np.mean([q.token_f1(extract(text), page.text) for text, page in some])

    everything = mean(lambda page: "\n".join(b.text for b in q.PageParser(False).parse(page).blocks), texts)
    assert mean(q.extract_density, texts) > everything + 0.15
    named = [
        (text, page) for text, page in texts if "no names" not in page.traps and "interrupted" in page.traps
    ]
    assert len(named) > 8
    without = mean(lambda page: q.extract_density(page, hints=False), named)
    assert mean(q.extract_density, named) > without + 0.01


@pytest.mark.parametrize("charset", ["utf-8", "gb18030", "cp1252", "utf-16", "utf-16-le"])
def test_every_page_is_decoded_whatever_it_declares(charset):
    pages = [p for p in (pages.write_page(n) for n in range(120)) if charset.removesuffix("-le") in p.traps]
    assert len(pages) > 10
    for page in pages:
        data = page.data[2:] if charset == "utf-16-le" else page.data
        assert q.decode_page(data)[0] == data.decode(charset)


def test_big5_truncated_utf8_and_unknown_charsets():
    text = "<meta charset=big5><p>" + "藍色的蠟燭放在身邊，她再也不害怕了。" * 4
    assert q.decode_page(text.encode("big5")) == (text, "big5hkscs")
    assert q.decode_page(text.encode()[:-1])[0] == text[:-1]
    assert q.decode_page(text.replace("big5", "klingon").encode("big5"))[0] == text.replace("big5", "klingon")
    assert q.decode_page("联通".encode("gb18030"), "gbk")[0] != "", "the famous case: valid UTF-8 by chance"
    assert q.decode_page(b"") == ("", "utf-8")
    assert q.decode_page(bytes(range(256)) * 9)[0]


def test_plain_text_that_speaks_of_tags_is_no_page():
    for text in (
        "Use <p> for a paragraph, and </p> ends it.",
        "if a<b and b>c: return",
        *(d.text for d in CLEAN),
    ):
        assert not q.is_html(text)
        assert q.ExtractText()(Document(text)).text == text
    assert all(q.is_html(d.text) for d in with_defect("html"))


def test_pages_without_text_and_too_long_ones_are_dropped():
    assert q.ExtractText()(Document("<html><nav><a href=x>Home</a></nav></html>")).reason == "no_main_text"
    assert q.ExtractText(max_chars=100)(Document("<p>" + "x " * 100)).reason == "page_too_long"
    with pytest.raises(ValueError, match="engine='magic' is unknown; choose one of density"):
        q.ExtractText(engine="magic")


def test_token_f1_by_hand():
    assert q.token_f1("a b c menu", "a b c") == pytest.approx(2 * 3 / 7)
    assert q.token_f1("", "") == 1
    assert q.token_f1("a", "") == 0
    assert q.token_f1("a a", "a") == pytest.approx(2 / 3)


def test_units_are_words_and_single_chinese_characters():
    assert corpus.units("Lily's 3 kites, 飞走了 re-do_x") == [
        "Lily's",
        "3",
        "kites",
        "飞",
        "走",
        "了",
        "re-do",
        "x",
    ]
    assert corpus.in_words("three words here") == 3
    assert corpus.in_words("三个汉字词语") == pytest.approx(4)


# ---- garbled text


def test_level_one_and_the_two_ways_to_write_come_out_of_the_codecs():
    assert {"的", "国", "國"} <= q.COMMON_HAN
    assert {"国", "蓝"} <= q.ONLY_SIMPLIFIED
    assert {"國", "藍"} <= q.ONLY_TRADITIONAL
    assert not {"山", "水"} & (q.ONLY_SIMPLIFIED | q.ONLY_TRADITIONAL)
    assert len(q.GB2312) == 6763


def test_control_codes_go_pairs_are_joined_and_lone_halves_are_marked():
    out = q.WellFormed()(Document("a\0b\x1b[0m \ud83d\ude00 \ud800!\tc\n"))
    assert out.text == "ab[0m 😀 \ufffd!\tc\n"
    assert q.WellFormed()(Document("\0\0 ")).reason == "empty"


@pytest.mark.parametrize(
    ("wrong", "right", "text"),
    [
        ("latin-1", "utf-8", "“Stay with me,” said Lucy. — déjà vu"),
        ("cp1252", "utf-8", "“Stay with me,’ said Lucy."),
        ("latin-1", "utf-8", "小明在花园里找到了一只风筝。"),
        ("gb18030", "utf-8", "他们把石头都放进了水桶里"),
        ("latin-1", "gb18030", "小明在花园里找到了一只风筝。"),
    ],
)
def test_each_misreading_is_undone_also_twice(wrong, right, text):
    garbled = text.encode(right).decode(wrong)
    assert garbled != text
    assert q.repair_line(garbled) == text
    if (wrong, right) == ("latin-1", "utf-8"):
        assert q.repair_line(garbled.encode(right).decode(wrong)) == text


def test_no_clean_document_is_repaired_or_dropped():
    for document in [
        *CLEAN,
        *with_defect("traditional"),
        Document("Ça va? Voilà l'été, naïve façade à côté."),
    ]:
        assert q.RepairEncoding()(document) is document


def test_what_can_be_undone_is_and_what_cannot_goes():
    for document in with_defect("encoding"):
        out = q.RepairEncoding()(document)
        if document.meta["codec"] == "latin-1":
            assert out.text == document.meta["clean"]
            assert out.meta["repaired"]
        elif isinstance(out, Document):
            assert out.text == document.meta["clean"]
        else:
            assert out.reason == "garbled"


def test_one_garbled_line_is_repaired_alone():
    good, bad = "小明在花园里。", "“You may have a wish,” said the squirrel."
    out = q.RepairEncoding()(Document(good + "\n" + bad.encode().decode("latin-1")))
    assert out.text == good + "\n" + bad


# ---- length and rules


def test_length_counts_units_or_what_it_is_given():
    assert filter.Length(min_tokens=3)(Document("one two")).detail == "2 tokens, at least 3"
    assert filter.Length(min_tokens=3)(Document("三个字")).text == "三个字"
    assert filter.Length(min_tokens=0, max_tokens=2)(Document("one two three")).reason == "too_long"
    assert filter.Length(min_tokens=5, count=len)(Document("abcde")).text == "abcde"
    with pytest.raises(ValueError, match="min_tokens=9 must be between 0 and max_tokens=3"):
        filter.Length(min_tokens=9, max_tokens=3)


def test_repetition_is_counted_as_datatrove_counts_it():
    repetition = pytest.importorskip("datatrove.pipeline.filters.gopher_repetition_filter")
    r = dice("words")
    for _ in range(50):
        words = ["abcdefg"[: 1 + int(r() * 4)] for _ in range(60)]
        text = " ".join(words)
        for n in (2, 3, 5, 7):
            top, again = filter.repeated_share(words, n, len(text))
            grams = repetition.get_n_grams(words, n)
            if len(set(grams)) < len(grams):
                assert top == pytest.approx(repetition.find_top_duplicate(grams) / len(text))
            assert again == pytest.approx(repetition.find_all_duplicate(words, n) / len(text))


def test_gopher_and_fineweb_agree_with_datatrove_on_english():
    gopher = pytest.importorskip("datatrove.pipeline.filters.gopher_repetition_filter")
    texts = [d.text for d in DOCUMENTS if d.lang == "en" and len(corpus.units(d.text)) >= 30][:150]
    for text in texts:
        lines, measured = re.split("\n+", text), filter.measure(text)
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
    rules = [rule for rule in filter.RULES if rule.measure == reason]
    assert rules
    assert filter.Heuristics(rules=tuple(rules))(Document(text)).reason == reason
    assert filter.Heuristics()(Document(text)).reason in {rule.measure for rule in filter.RULES}


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
        assert filter.Heuristics(rules=(filter.GOPHER_LENGTH, *filter.RULES))(document) is document


def test_a_repeated_chinese_phrase_is_found_as_an_english_one_is():
    english = filter.measure("One day Ruby found a lamp. " * 6)
    chinese = filter.measure("有一天小红找到了一盏旧灯。" * 6)
    for name in ("top_3gram", "repeated_5gram", "repeated_10gram"):
        assert english[name] > 0.2
        assert chinese[name] > 0.2


def test_every_rule_names_its_source():
    assert all(
        "arXiv:" in rule.source and rule.least <= rule.most for rule in (filter.GOPHER_LENGTH, *filter.RULES)
    )
    assert set(filter.SHORT_RULES) < set(filter.RULES)
    assert {rule.measure for rule in filter.RULES} <= set(filter.measure("x"))


def test_short_rules_find_loops_and_spam_and_spare_stories():
    step = filter.Heuristics(rules=filter.SHORT_RULES)
    machines = [d for d in with_defect("machine") if d.meta["generator"] in ("loop", "spam")]
    assert all(isinstance(step(d), q.Drop) for d in machines)
    stories = [d for d in CLEAN if d.kind == "stories"]
    assert sum(isinstance(step(d), q.Drop) for d in stories) <= len(stories) / 50


# ---- language

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
    assert filter.identify_ngram(SENTENCES[lang])[0] == lang
    assert filter.identify_ngram(SENTENCES[lang])[1] > 0.5


def test_foreign_sentences_go_and_the_corpus_stays():
    for lang in ("de", "fr", "ja", "ru"):
        out = filter.Language()(Document(SENTENCES[lang]))
        assert out.reason == "language"
        assert out.detail.startswith(lang)
    dropped = [d for d in CLEAN if isinstance(filter.Language()(d), q.Drop)]
    assert len(dropped) <= len(CLEAN) / 100
    wrong = [d for d in CLEAN if d.lang in ("en", "zh") and filter.identify_ngram(d.text)[0] != d.lang]
    assert len(wrong) <= len(CLEAN) / 100


def test_simplified_and_traditional_are_told_apart():
    step = filter.Language(variants=("simplified", "both", ""))
    for document in with_defect("traditional"):
        assert step(document).reason == "han_variant"
        assert filter.Language()(document).meta["variant"] == "traditional"
    assert filter.han_variant("蓝色的蜡烛") == "simplified"
    assert filter.han_variant("山上有水") == ""
    assert filter.han_variant("蓝藍红紅") == "both"
    with pytest.raises(ValueError, match="engine='x' is unknown; choose one of ngram, py3langid"):
        filter.Language(engine="x")


# ---- machines


def test_the_language_model_is_a_distribution_and_counts_by_the_formula():
    lm = detect.NGramLM(3, discount=0.5).fit(["a b a b a c", "b a b"])
    a, b = lm.vocabulary["a"], lm.vocabulary["b"]
    for context in ((), (a,), (b, a), (0,), (0, a), (0, 0)):
        assert lm.distribution(context).sum() == pytest.approx(1, abs=1e-5)
        assert (lm.distribution(context) > 0).all()
    # After "b a" came b once (1 of 2) and c once; after "a": b 3 times, c once.
    p_a = [
        (3 - 0.5) / 4 + 0.5 * 2 / 4 * lm.unigram[b],
        (1 - 0.5) / 4 + 0.5 * 2 / 4 * lm.unigram[lm.vocabulary["c"]],
    ]
    assert lm.distribution((a,))[b] == pytest.approx(p_a[0], abs=1e-5)
    assert lm.distribution((b, a))[b] == pytest.approx((2 - 0.5) / 3 + 0.5 * 2 / 3 * p_a[0], abs=1e-5)


def test_scores_are_log_probabilities_and_ranks_of_the_distribution():
    lm = detect.NGramLM(3).fit(d.text for d in CLEAN[:100])
    text = CLEAN[150].text
    scores, ids = lm(text), lm.ids(text)
    assert len(scores.ranks) == len(ids) == len(corpus.PIECE.findall(text))
    for place in range(len(ids)):
        probs = lm.distribution(tuple(ids[max(0, place - 2) : place]))
        assert scores.log_probs[place] == pytest.approx(np.log(probs[ids[place]]), abs=1e-4)
        assert scores.ranks[place] == (probs > probs[ids[place]]).sum()


def test_text_that_was_seen_is_likelier_and_samples_look_like_it():
    lm = detect.NGramLM(3).fit(d.text for d in CLEAN[:300])
    words = CLEAN[0].text.split(" ")
    assert (
        lm(CLEAN[0].text).log_probs.mean() > lm(" ".join(reversed(words))).log_probs.mean() + 0.5
        or len(words) < 4
    )
    made = lm.sample(dice(1), 40, "One day")
    assert made.startswith("One day")
    assert made == lm.sample(dice(1), 40, "One day") != lm.sample(dice(2), 40, "One day")
    assert pickle.loads(pickle.dumps(lm)).distribution((1, 2)) == pytest.approx(lm.distribution((1, 2)))
    with pytest.raises(ValueError, match="order=0 must be at least 1"):
        detect.NGramLM(0)


def test_a_hugging_face_model_takes_the_place_of_ours():
    from transformers import GPT2Config, GPT2LMHeadModel

    class Letters:
        def __call__(self, text, return_tensors, truncation, max_length):
            return {"input_ids": torch.tensor([[ord(c) % 50 for c in text][:max_length]])}

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=64, n_embd=16, n_layer=1, n_head=2))
    scorer = text.HuggingFaceScorer(model, Letters(), max_tokens=32)
    scores = scorer("a story of a lamp")
    ids = torch.tensor([[ord(c) % 50 for c in "a story of a lamp"]])
    with torch.no_grad():
        log_probs = model(ids).logits.log_softmax(-1)[0]
    for place in range(16):
        truth = log_probs[place, ids[0, place + 1]]
        assert scores.log_probs[place] == pytest.approx(float(truth), abs=1e-4)
        assert scores.ranks[place] == int((log_probs[place] > truth).sum())
    assert len(scorer("x").ranks) == 0
    assert detect.machine_features("a story of a lamp", scorer).shape == (len(detect.FEATURES),)
    assert not detect.machine_features("x", scorer).any()


def test_a_hugging_face_classifier_is_a_detector():
    from transformers import BatchEncoding, BertConfig, BertForSequenceClassification

    def letters(text, return_tensors, truncation, max_length):
        return BatchEncoding({"input_ids": torch.tensor([[ord(c) % 50 for c in text][:max_length]])})

    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = BertForSequenceClassification(config)
    no, yes = (text.HuggingFaceDetector(model, letters, label=label)("a story of a lamp") for label in (0, 1))
    assert no + yes == pytest.approx(1, abs=1e-5)
    assert 0 < yes < 1
    step = detect.MachineText(model=text.HuggingFaceDetector(model, letters), threshold=0.0, min_words=1)
    assert step(Document("a story of a lamp")).reason == "machine_text"


def test_logistic_regression_equals_scikit_learns():
    linear = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 4)) * [1, 3, 0.3, 1]
    y = (x @ [1, -0.5, 2, 0] + rng.normal(size=120) > 0.8).astype(float)
    weights, bias = detect.fit_logistic([(range(4), row) for row in x], y.tolist(), 4, l2=0.05, steps=3000)
    # Both classes weigh one half in ours: theirs is told so, and its C is 1 / l2.
    share = np.where(y == 1, 0.5 / y.sum(), 0.5 / (1 - y).sum())
    theirs = linear.LogisticRegression(C=1 / 0.05, tol=1e-10, max_iter=10_000).fit(x, y, sample_weight=share)
    assert weights == pytest.approx(theirs.coef_[0], abs=1e-3)
    assert bias == pytest.approx(theirs.intercept_[0], abs=1e-3)
    with pytest.raises(ValueError, match="labels must be of both kinds"):
        detect.fit_logistic([([0], [1.0])], [1.0], 1)


def test_the_detector_finds_known_machines_and_keeps_its_promise_on_humans():
    detector = detect.machine_detector()
    human = [d for d in documents(CorpusConfig(seed=42), n_documents=300) if d.kind != "arithmetic"]
    scores = [detector(d.text) for d in human]
    assert np.mean([score >= 0.5 for score in scores]) <= 0.03
    for machine in ("salad", "loop", "spam"):
        made = [detector(detect.machine_text(machine, ("test", n))) for n in range(20)]
        assert detect.auroc(scores, made) > 0.97
        assert np.mean([score >= 0.5 for score in made]) > 0.8


def test_an_unseen_crude_machine_is_found_beside_its_human_twins_and_a_shuffled_story_hardly():
    lm = detect._language_model(4, 104, 3000)
    human = [d.text for d in documents(CorpusConfig(seed=43), n_documents=400) if d.kind != "arithmetic"]
    made = {
        name: [detect.machine_text(name, n) for n in range(60)]
        for name in ("loop", "markov", "ocr", "salad", "shuffle")
    }
    twins = {name: [detect.human_like(text, 0) for text in texts] for name, texts in made.items()}
    others = ("loop", "markov", "ocr")
    detector = detect.train_detector(
        human + [t for name in others for t in twins[name]], [t for name in others for t in made[name]], lm
    )
    found = {
        name: detect.auroc([detector.logit(t) for t in twins[name]], [detector.logit(t) for t in made[name]])
        for name in ("salad", "shuffle")
    }
    assert found["salad"] > 0.9
    assert found["shuffle"] < 0.9
    assert np.mean([detector(t) >= 0.5 for name in made for t in twins[name]]) < 0.05


def test_the_detector_does_not_accuse_the_form_of_a_single_paragraph():
    detector = detect.machine_detector()
    stories = [d.text for d in documents(CorpusConfig(seed=45), n_documents=400) if d.kind == "stories"]
    assert np.mean([detector(text.split("\n")[0]) >= 0.5 for text in stories]) < 0.05


@pytest.mark.parametrize("machine", detect.MACHINES)
def test_a_human_twin_has_the_script_the_lines_and_the_length_and_is_genuine(machine):
    for number in range(15):
        text = detect.machine_text(machine, ("twin", number))
        twin = detect.human_like(text, 0)
        assert twin == detect.human_like(text, 0) != text
        assert detect.has_han(twin) == detect.has_han(text)
        assert abs(twin.count("\n") - text.count("\n")) <= 1
        if "\n" not in text:
            assert len(corpus.units(twin)) == pytest.approx(len(corpus.units(text)), rel=0.16)
            assert "\n" not in twin


def test_machines_are_deterministic_and_unknown_ones_named():
    for machine in detect.MACHINES:
        assert (
            detect.machine_text(machine, 1)
            == detect.machine_text(machine, 1)
            != detect.machine_text(machine, 2)
        )
    with pytest.raises(ValueError, match="machine='hal' is unknown; choose one of salad"):
        detect.machine_text("hal", 1)
    assert detect.MachineText()(Document("12+30=42\n" * 40)).text.startswith("12+30"), "sums are not judged"


def test_auroc_wants_both_kinds():
    with pytest.raises(ValueError, match="0 negatives and 1 positives"):
        detect.auroc([], [1.0])


# ---- personal data


def test_planted_data_is_found_to_the_character_and_nothing_else():
    found = [harm.find_pii(d.text) for d in DOCUMENTS]
    precision, recall = harm.span_scores(found, [d.meta.get("spans", []) for d in DOCUMENTS])
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
    assert [text[s.start : s.end] for s in harm.find_pii(text)] == found


def test_a_wrong_check_digit_lowers_the_score():
    right, wrong = harm.find_pii("11010519491231002X 110105194912310021")
    assert (right.score, wrong.score) == (1.0, 0.6)
    assert len(harm.find_pii("110105194912310021", min_score=0.9)) == 0


def test_luhn_by_hand():
    assert harm.luhn_valid("79927398713")  # the example of ISO/IEC 7812-1
    assert not any(harm.luhn_valid(f"7992739871{d}") for d in "012456789")


def test_redaction_keeps_the_sentence_and_moves_the_answers():
    text = "Mail bob@example.org now.\nQ: Who?\nA: Bob"
    document = Document(text, meta={"answers": [[37, 41, "who"], [5, 10, "lost"]]})
    out = harm.RedactPII()(document)
    assert out.text == "Mail <EMAIL> now.\nQ: Who?\nA: Bob"
    assert out.meta["redacted"] == {"email": 1}
    ((start, end, label),) = out.meta["answers"]
    assert (out.text[start:end], label) == (text[37:41], "who")
    assert harm.RedactPII(max_spans=0)(document).reason == "pii_list"


def test_presidio_alone_stumbles_over_chinese_and_with_our_rules_does_not():
    documents = with_defect("pii")
    truth = [d.meta["spans"] for d in documents]
    alone, ours = (presidio.PresidioFinder(own=own) for own in (False, True))
    assert harm.span_scores([alone(d.text) for d in documents], truth)[1] < 0.8
    assert harm.span_scores([ours(d.text) for d in documents], truth) == (1, 1)
    assert pickle.loads(pickle.dumps(ours))(documents[0].text) == ours(documents[0].text)


# ---- toxicity


def test_insults_go_and_towns_of_that_name_stay():
    step = harm.Toxicity()
    toxic = with_defect("toxic")
    assert len(toxic) > 20
    for document in toxic:
        assert isinstance(step(document), q.Drop) == document.meta["toxic"], document.text
    assert sum(isinstance(step(d), q.Drop) for d in CLEAN) <= len(CLEAN) / 200


@pytest.mark.parametrize(
    "kind",
    ["darling", "angel", "star", "sunshine", "marvel", "宝贝", "明星", "小太阳", "福星", "伙伴"],
)
def test_a_kind_word_that_was_never_trained_on_is_no_insult(kind):
    assert kind not in [*harm.KIND["en"], *harm.KIND["zh"]]
    texts, labels = harm.toxic_examples(100, seed=77, kind=0)
    insults = [text for text, label in zip(texts, labels, strict=True) if label]
    scorer = harm.toxicity_classifier()
    lang = "zh" if detect.has_han(kind) else "en"
    there = [(text, word) for text in insults for word in TOXIC[lang] if word in text]
    assert len(there) > 10
    assert all(scorer(text) > 0.5 for text, _ in there)
    assert sum(scorer(text.replace(word, kind)) > 0.5 for text, word in there) <= len(there) / 10


def test_the_worst_sentence_counts():
    scorer = harm.toxicity_classifier()
    kind = "Anna gave the kite to Ben. They were happy. "
    insult = '"You are a grobnik!" Nora shouted at Rose.'
    assert scorer(kind * 20 + insult) == pytest.approx(scorer(insult), abs=0.05)
    assert scorer(insult) > 0.5 > scorer(kind)
    assert scorer("") == 0
    assert corpus.sentences_of("One. Two!” 三。四") == ["One. ", "Two!” ", "三。", "四"]


def test_hashed_features_do_not_depend_on_the_process():
    places, values = harm.toxicity_features("You are 你这个")
    assert places == sorted(places)
    assert sum(v * v for v in values) == pytest.approx(1)
    import zlib

    expected = {"you", "are", "you are", "are 你", "你 这", "这 个", "你这", "这个", "你这个"}
    assert set(places) == {zlib.crc32(gram.encode()) % 65536 for gram in expected}


def test_profanity_check_behind_the_same_interface():
    assert text.profanity_score("You are a stupid idiot.") > 0.7
    assert text.profanity_score("The lamp stood in the window.") < 0.3
    assert text.profanity_score("") == 0
    assert (
        harm.Toxicity(scorer=text.profanity_score)(Document("A fine day. You stupid idiot!")).reason
        == "toxic"
    )


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "profanity_check", None)
    with pytest.raises(
        MissingPackage, match=r"this needs profanity_check: run pip install 'minillm\[clean\]'"
    ):
        text.profanity_score("x")


# ---- Perspective: a server that speaks its protocol, on this machine


class Perspective(BaseHTTPRequestHandler):
    """Answers from the list `plan` of (status, body, headers, delay_s), then with scores by the word "bad"."""

    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.seen.append((time.monotonic(), parse_qs(urlparse(self.path).query), request))
        score = 0.9 if "bad" in request["comment"]["text"] else 0.1
        (name,) = request["requestedAttributes"]
        good = {
            "attributeScores": {name: {"summaryScore": {"value": score, "type": "PROBABILITY"}}},
            "languages": ["en"],
        }
        status, body, headers, delay_s = server.plan.pop(0) if server.plan else (200, None, {}, 0)
        time.sleep(delay_s)
        data = json.dumps(good).encode() if body is None else body
        if status == 0:
            self.connection.close()
            return
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def service():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Perspective)
    server.plan, server.seen, server.handle_error = [], [], lambda *_: None
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def client(service, **options):
    options = {"queries_per_second": 1000.0, "backoff_s": 0.01, "timeout_s": 5.0, **options}
    return perspective.PerspectiveClient(
        "s3cret", url=f"http://127.0.0.1:{service.server_port}/v1alpha1/comments:analyze", **options
    )


def refusal(status, message, **headers):
    return status, json.dumps({"error": {"code": status, "message": message}}).encode(), headers, 0


def test_perspective_sends_what_the_protocol_asks_and_reads_the_score(service):
    scorer = client(service, attribute="INSULT")
    assert scorer("a bad word 坏") == 0.9
    ((_, query, request),) = service.seen
    assert query == {"key": ["s3cret"]}
    assert request == {
        "comment": {"text": "a bad word 坏"},
        "requestedAttributes": {"INSULT": {}},
        "doNotStore": True,
    }
    assert harm.Toxicity(scorer=scorer)(Document("fine")).text == "fine"
    assert harm.Toxicity(scorer=scorer)(Document("bad")).reason == "toxic"
    assert "s3cret" not in repr(scorer)


@pytest.mark.parametrize(
    "trouble",
    [
        refusal(429, "quota"),
        refusal(500, "oops"),
        refusal(503, "busy"),
        (0, b"", {}, 0),
        (200, b"<html>", {}, 0),
        (200, b'{"a": 1}', {}, 0),
    ],
    ids=["429", "500", "503", "closed", "not json", "no score"],
)
def test_perspective_tries_again_after_passing_trouble(service, trouble):
    service.plan = [trouble, trouble]
    assert client(service)("bad") == 0.9
    assert len(service.seen) == 3


def test_perspective_waits_twice_as_long_each_time_and_as_long_as_it_is_told(service):
    service.plan = [refusal(500, "x"), refusal(500, "x"), refusal(500, "x")]
    client(service, backoff_s=0.1)("good")
    gaps = np.diff([when for when, _, _ in service.seen])
    assert gaps[0] >= 0.1
    assert gaps[1] >= 0.2
    assert gaps[2] >= 0.4
    service.seen.clear()
    service.plan = [refusal(429, "x", **{"Retry-After": "1"})]
    client(service)("good")
    assert np.diff([when for when, _, _ in service.seen])[0] >= 1


def test_perspective_gives_up_with_the_reason_and_without_the_key(service):
    service.plan = [refusal(429, "quota of key s3cret exceeded")] * 3
    with pytest.raises(
        perspective.PerspectiveError,
        match=r"no answer after 3 tries, the last one: HTTP 429: quota of key \*\*\*",
    ):
        client(service, retries=2)("bad")
    assert len(service.seen) == 3


def test_perspective_does_not_repeat_what_cannot_succeed(service):
    service.plan = [refusal(400, "API key not valid: s3cret")]
    with pytest.raises(
        perspective.PerspectiveError, match=r"HTTP 400: API key not valid: \*\*\*; check the key"
    ) as caught:
        client(service)("bad")
    assert "s3cret" not in str(caught.value)
    assert len(service.seen) == 1


def test_perspective_does_not_wait_for_a_slow_server(service):
    service.plan = [(200, None, {}, 30.0), (200, None, {}, 30.0)]
    start = time.monotonic()
    with pytest.raises(perspective.PerspectiveError, match="after 2 tries.*(?i:time)"):
        client(service, timeout_s=0.2, retries=1)("bad")
    assert time.monotonic() - start < 15


def test_perspective_names_a_server_that_is_not_there():
    scorer = perspective.PerspectiveClient(
        "key", url="http://127.0.0.1:9", retries=1, backoff_s=0.01, queries_per_second=1000.0
    )
    with pytest.raises(perspective.PerspectiveError, match="no answer after 2 tries, the last one: URLError"):
        scorer("bad")


def test_perspective_keeps_to_its_quota(service):
    scorer = client(service, queries_per_second=20.0)
    for _ in range(5):
        scorer("good")
    times = [when for when, _, _ in service.seen]
    assert times[-1] - times[0] >= 4 / 20 - 0.02


def test_perspective_asks_about_long_text_in_pieces_and_the_worst_counts(service):
    text = "good 好 " * 20 + "bad"
    assert client(service, max_bytes=64)(text) == 0.9
    sent = [request["comment"]["text"] for _, _, request in service.seen]
    assert len(sent) == -(-len(text.encode()) // 64)
    assert all(len(piece.encode()) <= 64 for piece in sent)
    assert client(service)("   ") == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [({"key": " "}, "a key"), ({"key": "k", "queries_per_second": 0.0}, "queries_per_second=0")],
)
def test_perspective_checks_its_arguments(options, named):
    with pytest.raises(ValueError, match=named):
        perspective.PerspectiveClient(**options)


def test_a_score_outside_its_range_is_refused(service):
    service.plan = [
        (200, json.dumps({"attributeScores": {"TOXICITY": {"summaryScore": {"value": 7}}}}).encode(), {}, 0)
    ]
    with pytest.raises(perspective.PerspectiveError, match="score 7.0 is not between 0 and 1"):
        client(service)("x")


# ---- judging


def test_judge_counts_the_four_cases():
    documents = [Document("bad"), Document("bad"), Document("good"), Document("good but short")]
    step = filter.Length(min_tokens=2, max_tokens=2)
    row = q.judge(step, documents, lambda d: d.text == "bad")
    assert (row.hits, row.false_alarms, row.misses) == (2, 2, 0)
    assert (row.precision, row.recall) == (0.5, 1)
    nothing = q.judge(q.WellFormed(), documents, lambda d: d.text == "bad")
    assert (nothing.hits, nothing.false_alarms, nothing.misses) == (0, 0, 2)
    assert (nothing.precision, nothing.recall) == (1, 0)
