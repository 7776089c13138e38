import codecs
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from step_laws import ANY_TEXT, CLEAN, is_a_step, keeps_its_pace, survives, with_defect

from minillm.check import check, laws
from minillm.corpus import Document, units
from minillm.extract import (
    COMMON_HAN,
    GB2312,
    ONLY_SIMPLIFIED,
    ONLY_TRADITIONAL,
    Drop,
    ExtractText,
    RepairEncoding,
    WellFormed,
    boilerplate,
    decode_page,
    densest,
    extract_density,
    is_html,
    judge,
    parse_page,
    plausible,
    read_markup,
    repair_line,
    token_f1,
)
from minillm.filter import Length
from minillm.world.pages import write_page


def may_be_utf8(data, final=False):
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data, final)
    except UnicodeDecodeError:
        return False
    return True


def whole_utf8(data):
    return may_be_utf8(data, final=True)


SOLUTIONS = {
    "extract.densest": densest,
    "extract.repair": repair_line,
    "extract.token_f1": token_f1,
    "extract.may_be_utf8": may_be_utf8,
}


@pytest.mark.parametrize(
    ("exercise", "law"), [(name, law) for name in SOLUTIONS for law in laws(name)], ids=str
)
def test_the_package_obeys_its_laws(exercise, law):
    law(SOLUTIONS[exercise])


@pytest.mark.parametrize(
    ("exercise", "wrong", "law"),
    [
        ("extract.densest", lambda gains: (0, len(gains)), "finds the run of the chapter's example"),
        (
            "extract.densest",
            lambda gains: densest([g if g > -3 else -9 for g in gains]),
            "no run is better",
        ),
        (
            "extract.densest",
            lambda gains: densest(gains) if any(g > 0 for g in gains) else (1, 1),
            "nothing but losses gives (0, 0)",
        ),
        (
            "extract.repair",
            lambda line: line.encode("latin-1", "ignore").decode("utf-8", "ignore"),
            "what is right stays",
        ),
        ("extract.token_f1", lambda found, truth: float(found == truth), "the chapter's example"),
        (
            "extract.token_f1",
            lambda a, b: 2 * len({*units(a)} & {*units(b)}) / max(1, len({*units(a)}) + len({*units(b)})),
            "what was there once counts once",
        ),
        (
            "extract.token_f1",
            lambda a, b: sum(u in units(b) for u in units(a)) / max(len(units(a)), len(units(b)), 1),
            "the chapter's example",
        ),
        (
            "extract.token_f1",
            lambda a, b: (
                2 * (Counter(units(a)) & Counter(units(b))).total() / max(1, len(units(a) + units(b)))
            ),
            "nothing found where nothing was is right",
        ),
        ("extract.may_be_utf8", lambda data: True, "another code breaks the pattern"),
        ("extract.may_be_utf8", whole_utf8, "a last character may be cut"),
        (
            "extract.may_be_utf8",
            lambda data: any(whole_utf8(data[: len(data) - cut]) for cut in range(4)),
            "only what has begun is forgiven",
        ),
    ],
)
def test_check_names_the_broken_law(exercise, wrong, law):
    report = check(exercise, wrong, quiet=True)
    broken = [rule.name for rule, reason in report.reasons.items() if reason is not None]
    assert broken[0] == law


STEPS = [
    WellFormed(),
    ExtractText(),
    RepairEncoding(),
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
    for work in (extract_density, is_html, repair_line, plausible):
        work(text)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_time_grows_no_faster_than_hostile_text(step):
    keeps_its_pace(step)


def test_a_hundred_megabyte_line_goes_at_once():
    document = Document("x" * 100_000_000)
    start = time.process_time()
    assert WellFormed()(document) == Drop("too_long", "100000000 characters, at most 1000000")
    assert time.process_time() - start < 1


def test_markup_is_cut_and_scripts_comments_and_broken_tags_are_left_out():
    page = (
        '<!DOCTYPE html><P class="a>b" x=\'<\'>1 < 2<script>if (a<b) x="<p>"</SCRIPT><!-- <p> --><br/>x</p><b'
    )
    assert list(read_markup(page)) == [
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
    assert "Anna had" in extract_density("<!-- broken >" + body)
    assert "Anna had" in extract_density('<a href="x>link</a>' + body)


def test_blocks_count_words_and_links():
    parsed = parse_page(
        "<ul><li><a href=/>Home page</a> now</ul><p>one<br>two &amp; three<p>他们<em>去</em>了"
    )
    assert [(b.text, b.n_words, b.n_linked) for b in parsed.blocks[:2]] == [
        ("Home page now", 3, 2),
        ("one\ntwo & three", 3, 0),
    ]
    assert parsed.blocks[2].text == "他们去了"
    assert parsed.blocks[2].n_words == pytest.approx(4 / 1.5)


def skipped(page, **options):
    parsed = parse_page(page, **options)
    return boilerplate(parsed.blocks, parsed.boxes)


def test_a_hint_marks_a_box_unless_most_of_the_page_is_in_it():
    story = "<p>" + "Anna had six plums and gave two of them to Ben in the garden. " * 2
    banner = "<p>We store cookies on your device to show you what you do not want to see."
    page = f'<div class="cookie-banner">{banner}</div><div class="post has-sidebar">{story * 3}</div>'
    assert skipped(page) == [True, False, False, False]
    assert skipped(page, hints=False) == [False] * 4
    assert "cookies" not in extract_density(page)


def test_the_core_grows_to_the_box_around_it_and_no_further():
    inside = "<article><p>" + "long words come here " * 8 + "<p>Q: who?<p>A: six</article>"
    text = extract_density(f"<body><div>Share this</div>{inside}<div>Read more</div></body>")
    assert text.split("\n")[1:] == ["Q: who?", "A: six"]


def test_the_corpus_pages_come_out_as_they_went_in():
    scores = [token_f1(ExtractText()(d).text, d.meta["clean"]) for d in with_defect("html")]
    assert len(scores) > 20
    assert min(scores) > 0.95


def test_hard_pages_better_than_everything_and_hints_help():
    pages = [write_page(("test", n)) for n in range(100)]
    texts = [(decode_page(page.data, page.declared)[0], page) for page in pages]

    def mean(extract, some):
        return np.mean([token_f1(extract(text), page.text) for text, page in some])

    everything = mean(lambda page: "\n".join(b.text for b in parse_page(page, hints=False).blocks), texts)
    assert mean(extract_density, texts) > everything + 0.15
    named = [
        (text, page) for text, page in texts if "no names" not in page.traps and "interrupted" in page.traps
    ]
    assert len(named) > 8
    without = mean(lambda page: extract_density(page, hints=False), named)
    assert mean(extract_density, named) > without + 0.01


@pytest.mark.parametrize("charset", ["utf-8", "gb18030", "cp1252", "utf-16", "utf-16-le"])
def test_every_page_is_decoded_whatever_it_declares(charset):
    pages = [p for p in (write_page(n) for n in range(120)) if charset.removesuffix("-le") in p.traps]
    assert len(pages) > 10
    for page in pages:
        data = page.data[2:] if charset == "utf-16-le" else page.data
        assert decode_page(data)[0] == data.decode(charset)


def test_big5_truncated_utf8_and_unknown_charsets():
    text = "<meta charset=big5><p>" + "藍色的蠟燭放在身邊，她再也不害怕了。" * 4
    assert decode_page(text.encode("big5")) == (text, "big5hkscs")
    assert decode_page(text.encode()[:-1])[0] == text[:-1]
    assert decode_page(text.replace("big5", "klingon").encode("big5"))[0] == text.replace("big5", "klingon")
    assert decode_page("联通".encode("gb18030"), "gbk")[0] != "", "the famous case: valid UTF-8 by chance"
    assert decode_page(b"") == ("", "utf-8")
    assert decode_page(bytes(range(256)) * 9)[0]


def test_plain_text_that_speaks_of_tags_is_no_page():
    for text in (
        "Use <p> for a paragraph, and </p> ends it.",
        "if a<b and b>c: return",
        *(d.text for d in CLEAN),
    ):
        assert not is_html(text)
        assert ExtractText()(Document(text)).text == text
    assert all(is_html(d.text) for d in with_defect("html"))


def test_pages_without_text_and_too_long_ones_are_dropped():
    assert ExtractText()(Document("<html><nav><a href=x>Home</a></nav></html>")).reason == "no_main_text"
    assert ExtractText(max_chars=100)(Document("<p>" + "x " * 100)).reason == "page_too_long"
    with pytest.raises(TypeError, match="extract"):
        ExtractText(extract="magic")


def test_token_f1_by_hand():
    assert token_f1("a b c menu", "a b c") == pytest.approx(2 * 3 / 7)
    assert token_f1("", "") == 1
    assert token_f1("a", "") == 0
    assert token_f1("a a", "a") == pytest.approx(2 / 3)


def test_level_one_and_the_two_ways_to_write_come_out_of_the_codecs():
    assert {"的", "国", "國"} <= COMMON_HAN
    assert {"国", "蓝"} <= ONLY_SIMPLIFIED
    assert {"國", "藍"} <= ONLY_TRADITIONAL
    assert not {"山", "水"} & (ONLY_SIMPLIFIED | ONLY_TRADITIONAL)
    assert len(GB2312) == 6763


def test_control_codes_go_pairs_are_joined_and_lone_halves_are_marked():
    out = WellFormed()(Document("a\0b\x1b[0m \ud83d\ude00 \ud800!\tc\n"))
    assert out.text == "ab[0m 😀 \ufffd!\tc\n"
    assert WellFormed()(Document("\0\0 ")).reason == "empty"


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
    assert repair_line(garbled) == text
    if (wrong, right) == ("latin-1", "utf-8"):
        assert repair_line(garbled.encode(right).decode(wrong)) == text


def test_no_clean_document_is_repaired_or_dropped():
    for document in [
        *CLEAN,
        *with_defect("traditional"),
        Document("Ça va? Voilà l'été, naïve façade à côté."),
    ]:
        assert RepairEncoding()(document) is document


def test_what_can_be_undone_is_and_what_cannot_goes():
    for document in with_defect("encoding"):
        out = RepairEncoding()(document)
        if document.meta["codec"] == "latin-1":
            assert out.text == document.meta["clean"]
            assert out.meta["repaired"]
        elif isinstance(out, Document):
            assert out.text == document.meta["clean"]
        else:
            assert out.reason == "garbled"


def test_one_garbled_line_is_repaired_alone():
    good, bad = "小明在花园里。", "“You may have a wish,” said the squirrel."
    out = RepairEncoding()(Document(good + "\n" + bad.encode().decode("latin-1")))
    assert out.text == good + "\n" + bad


def test_judge_counts_the_four_cases():
    documents = [Document("bad"), Document("bad"), Document("good"), Document("good but short")]
    step = Length(min_tokens=2, max_tokens=2)
    row = judge(step, documents, lambda d: d.text == "bad")
    assert (row.hits, row.false_alarms, row.misses) == (2, 2, 0)
    assert (row.precision, row.recall) == (0.5, 1)
    nothing = judge(WellFormed(), documents, lambda d: d.text == "bad")
    assert (nothing.hits, nothing.false_alarms, nothing.misses) == (0, 0, 2)
    assert (nothing.precision, nothing.recall) == (1, 0)
