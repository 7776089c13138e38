"""The world: stories and their reader, people, every writer against a slow solver, exams, the stream, planted defects."""

import datetime
import hashlib
import html
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.corpus import Page, dice, jaccard, split_of
from minillm.world import lexicon, reasoning
from minillm.world.defects import benchmark_item, canary, to_traditional
from minillm.world.documents import WRITERS, extract_answer, questions, write_document
from minillm.world.people import invent_people
from minillm.world.reading import score_story, surface_words
from minillm.world.stories import PLOTS, plan_story, tell
from minillm.world.stream import DEFECTS, document, documents
from minillm.world.task import PARTS, CorpusConfig, Task
from minillm.world.writers import scratchpad


def only(part, **changes):
    return CorpusConfig(**({"stories": 0.0, "facts": 0.0, "arithmetic": 0.0, part: 1.0} | changes))


EVERYTHING = CorpusConfig(**dict.fromkeys(PARTS, 1.0))


def fingerprint(stream):
    return hashlib.sha256("\0".join(d.text + json.dumps(d.meta) for d in stream).encode()).hexdigest()


def test_the_same_configuration_gives_the_same_documents_in_any_process():
    code = (
        "import hashlib, json; from minillm.world.stream import documents; from minillm.world.task import PARTS, CorpusConfig; "
        "c = CorpusConfig(**dict.fromkeys(PARTS, 1.0), defects=0.3); "
        "print(hashlib.sha256('\\0'.join(d.text + json.dumps(d.meta) for d in documents(c, n_documents=200)).encode()).hexdigest())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "77", "PATH": ""},
    )
    assert out.stdout.strip() == fingerprint(documents(replace(EVERYTHING, defects=0.3), n_documents=200))


def test_a_document_depends_on_its_number_alone():
    config = replace(EVERYTHING, defects=0.3)
    stream = list(documents(config, n_documents=60))
    assert [document(config, i) for i in reversed(range(60))] == stream[::-1]
    assert list(documents(config, n_documents=10, start=25)) == stream[25:35]
    assert list(itertools.islice(documents(config), 60)) == stream


def test_another_seed_gives_other_documents_and_people():
    one, two = (fingerprint(documents(CorpusConfig(seed=s), n_documents=20)) for s in (0, 1))
    assert one != two
    assert invent_people(0, 40)[0] != invent_people(1, 40)[0]


def meaning_of(d):
    meta, task = d.meta, d.meta["task"]
    if "sums" in meta:
        return [(op, min(a, b), max(a, b)) for a, op, b in meta["sums"]]
    if task == "boolean":
        return meta["expressions"]
    if task == "choice":
        return [(meta["subject"], meta["row"])]
    if task == "recall":
        return meta["people"]
    if task in (
        "ordering",
        "counting",
        "date",
        "tracking",
        "graph",
        "copy",
        "passkey",
        "moves",
        "talk",
        "harmful",
        "lookalike",
        "story",
    ):
        return [
            json.dumps(
                {k: v for k, v in meta.items() if k not in ("answers", "task", "depth", "length", "turns")}
            )
        ]
    return []


@pytest.mark.parametrize(
    "part", ["stories", "facts", "arithmetic", "reasoning", "knowledge", "length", "dialogue"]
)
def test_no_meaning_is_on_both_sides_of_the_split(part):
    config = only(part, max_digits=2, max_length=2)
    train = {
        m for d in documents(config, n_documents=1500) if d.meta["task"] != "biography" for m in meaning_of(d)
    }
    held = {m for d in documents(config, n_documents=300, split="heldout") for m in meaning_of(d)}
    assert train
    assert held
    assert not train & held


def test_dialogue_and_preferences_ask_nothing_that_is_held_out():
    silent = {p.called(lang) for p in invent_people(0, 40) if not p.questioned for lang in ("en", "zh")}
    for part in ("dialogue", "preference"):
        for d in documents(only(part), n_documents=800):
            assert not any(name in d.text for name in silent)
            for a, b in re.findall(r"(\d+)\+(\d+)(?:\?|等于)", d.text):
                assert split_of("+", *sorted((int(a), int(b)))) == "train"


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from(["en", "zh"]))
def test_a_story_can_be_read_back_to_its_plan(seed, lang):
    plan, page = plan_story(dice("test", seed)), Page()
    tell(plan, lang, dice("words", seed), page, n_questions=2)
    score = score_story(page.text, lang)
    assert {"plot": score.plot, **score.roles} == plan
    assert score.consistent


def test_every_plot_is_told_and_there_are_enough_of_them():
    assert len(PLOTS) >= 12
    assert {d.meta["plan"]["plot"] for d in documents(only("stories"), n_documents=600)} == set(PLOTS)


@pytest.mark.parametrize(
    ("lang", "story", "clash"),
    [
        ("en", "Anna had a red kite. It was the birthday of Ben. Anna gave the ball to Ben. Ben took it and smiled.", "x: kite becomes ball"),
        ("en", "Anna had a red kite. It was the birthday of Ben. Tom gave the kite to Ben. Ben took it and smiled.", "a: Anna becomes Tom"),
        ("en", "Anna had seven apples. Ben had no apples. Anna gave Ben two apples. Now Anna had four apples left.", "the counts break n=m+k"),
        ("zh", "安娜有七个苹果。本杰没有苹果。安娜给了本杰两个苹果。现在安娜还剩四个苹果。", "the counts break n=m+k"),
        ("zh", "安娜有一只风筝，安娜有一本书。安娜说：“我喜欢你的书。”", "one name plays two roles"),
        ("en", "Ben took it and smiled. It was the birthday of Ben.", "a step is told twice or out of order"),
    ],
)  # fmt: skip
def test_score_story_finds_the_contradiction(lang, story, clash):
    score = score_story(story, lang)
    assert clash in score.clashes
    assert not score.consistent


def test_score_story_counts_what_it_cannot_read():
    good = "Kate hid a car in the chest. The moon is made of cheese. Then Ben opened the chest and laughed."
    score = score_story(good, "en")
    assert (score.n_sentences, score.n_known, score.clashes, score.consistent) == (3, 2, (), False)
    assert score_story("全都不认识。完全不认识。", "zh").plot is None
    assert score_story("", "en").n_sentences == 0
    assert not score_story("安娜有一本风筝，本杰有一只书。", "zh").n_known  # wrong measure words


def test_chinese_counts_with_measure_words():
    assert lexicon.count_phrase(2, "book", "zh") == "两本书"
    text = "".join(d.text for d in documents(only("stories", chinese=1.0), n_documents=400))
    nouns = {noun.zh: noun.measure for noun in lexicon.ITEMS.values()}
    pattern = re.compile("(一|两|三|四|五|六|七|八|九|十)(.)(" + "|".join(nouns) + ")")
    found = pattern.findall(text)
    assert len(found) > 200
    assert all(nouns[noun] == measure for _, measure, noun in found)
    assert "二" not in text.replace("第二", "")


def test_english_and_chinese_questions_have_the_same_answers():
    for seed in range(200):
        plan, pages = plan_story(dice("both", seed)), {}
        for lang in ("en", "zh"):
            pages[lang] = Page()
            tell(plan, lang, dice("ask", 0), pages[lang], n_questions=9)
        answers = {
            lang: {label: page.text[start:end].strip() for start, end, label in page.answers}
            for lang, page in pages.items()
        }
        assert set(answers["en"]) == set(answers["zh"])
        words = {lang: surface_words(lang) for lang in ("en", "zh")}
        for label, en in answers["en"].items():
            zh = answers["zh"][label]
            for kind in ("a", "p", "h", "c"):
                if en in words["en"][kind]:
                    assert words["en"][kind][en] == words["zh"][kind][zh]
            if en in words["en"]["n"]:
                number = next(
                    n
                    for word, n in sorted(words["zh"]["n"].items(), key=lambda w: -len(w[0]))
                    if zh.startswith(word)
                )
                assert words["en"]["n"][en] == number


def test_people_have_different_names_and_balanced_groups():
    people = invent_people(3, 2000)
    assert len({p.name for p in people}) == len({p.name_zh for p in people}) == 2000
    groups = Counter((p.langs, p.questioned) for p in people)
    assert groups == {
        (("en", "zh"), True): 600, (("en", "zh"), False): 600, (("en",), True): 200,
        (("en",), False): 200, (("zh",), True): 200, (("zh",), False): 200,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"n_people=9999999 must be between 1 and 331776"):
        invent_people(0, 9_999_999)


def test_facts_are_told_in_the_right_languages_and_asked_of_the_right_people():
    people = invent_people(0, 40)
    for d in documents(only("facts"), n_documents=800):
        for index in d.meta["people"]:
            assert d.lang in people[index].langs
            assert people[index].called(d.lang) in d.text
            assert d.meta["task"] == "biography" or people[index].questioned
    for d in documents(only("facts"), n_documents=200, split="heldout"):
        assert not any(people[index].questioned for index in d.meta["people"])


def test_a_biography_states_all_facts():
    people = invent_people(0, 40)
    for d in documents(only("facts"), n_documents=200):
        if d.meta["task"] == "biography":
            person = people[d.meta["people"][0]]
            assert all(person.value(fact, d.lang) in d.text for fact in person.facts)


def test_crossing_asks_in_the_language_that_does_not_know_the_person():
    for lang in ("en", "zh"):
        for q in questions(CorpusConfig(), "facts.crossing", lang, "heldout", 20):
            person = invent_people(0, 40)[q.meta["people"][0]]
            assert lang not in person.langs
            assert person.called(lang) in q.prompt


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.sampled_from("+-"))
def test_a_scratchpad_spells_the_result(a, b, op):
    a, b = (max(a, b), min(a, b)) if op == "-" else (a, b)
    steps = scratchpad(a, b, op).split(",")
    for step in steps:
        left, _, right = step.partition("=")
        assert eval(left) == int(right)
    results = [step.partition("=")[2] for step in steps]
    spelt = results[-1] + "".join(result[-1] for result in reversed(results[:-1]))
    assert int(spelt) == (a + b if op == "+" else a - b)


def test_a_scratchpad_refuses_what_it_cannot_write():
    for arguments in ((1, 2, "-"), (-1, 2, "+"), (1, 2, "*")):
        with pytest.raises(ValueError, match="operands and result must not be negative"):
            scratchpad(*arguments)


@pytest.mark.parametrize("lang", ["en", "zh", "und"])
def test_sums_and_problems_are_right(lang):
    found = questions(CorpusConfig(), "arithmetic", lang, "heldout", 150)
    assert len(found) == 150
    for q in found:
        if "sums" in q.meta:
            a, op, b = q.meta["sums"][0]
            result = a + b if op == "+" else a - b
            assert q.answer in (str(result), "~" + str(result)[::-1])
            assert str(a) in q.prompt
            assert str(b) in q.prompt
        assert q.grade(q.meta["target"])
        assert not q.grade(q.meta["target"] + "0")


def solve_graph(prompt, lang):
    amounts, asked = {}, None
    if lang == "en":
        base, more = r"(\w+) has (\d+) \w+\.", r"(\w+) has (\d+) (more|fewer) than (\w+)\."
        twice, total, ask = (
            r"(\w+) has twice as many as (\w+)\.",
            r"(\w+) has as many as (\w+) and (\w+) together\.",
            r"does (\w+) have\?",
        )
    else:
        n = "|".join(lexicon.NAMES.values())
        base, more = rf"(?:^|。)({n})有(\d+)", rf"({n})比({n})(多|少)(\d+)"
        twice, total, ask = (
            rf"({n})的\w+是({n})的两倍",
            rf"({n})的\w+等于({n})与({n})的总和",
            rf"问：({n})有多少",
        )
    rules = [(a, lambda get, v=int(v): v) for a, v in re.findall(base, prompt)]
    for found in re.findall(more, prompt):
        a, k, sign, b = found if lang == "en" else (found[0], found[3], found[2], found[1])
        rules.append((a, lambda get, b=b, k=int(k) * (1 if sign in ("more", "多") else -1): get(b) + k))
    rules += [(a, lambda get, b=b: 2 * get(b)) for a, b in re.findall(twice, prompt)]
    rules += [(a, lambda get, b=b, d=d: get(b) + get(d)) for a, b, d in re.findall(total, prompt)]
    table = dict(rules)
    asked = re.search(ask, prompt)[1]

    def get(name):
        if name not in amounts:
            amounts[name] = table[name](get)
        return amounts[name]

    return get(asked), set(amounts)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_graph_problems_are_right(lang):
    for length in (None, 5):
        for q in questions(CorpusConfig(), "arithmetic.graph", lang, "train", 60, length=length):
            value, needed = solve_graph(q.prompt, lang)
            assert int(q.answer) == value
            assert {step.strip().split("=")[0] for step in q.meta["target"].split(",")} == needed
            for step in q.meta["target"].split(","):
                *_, left, right = step.split("=")
                assert len(step.split("=")) == 2 or eval(left) == int(right)


def solve_reasoning(q):
    prompt, meta, zh = q.prompt, q.meta, q.lang == "zh"
    task = meta["task"]
    if task == "boolean":
        return str(eval(prompt.removesuffix(" is")))
    if task == "ordering":
        names = [lexicon.NAMES[n] if zh else n for n in meta["order"]]
        top = any(
            word in prompt.rsplit("\n", 2)[1] for row in reasoning.COMPARISONS for word in (row[1], row[4])
        )
        return names[0] if top else names[-1]
    if task == "counting":
        asked = next(
            kind
            for kind in reasoning.COUNTED
            if (reasoning.COUNTED_ZH[kind][1:] if zh else kind) in prompt.rsplit("\n", 2)[1]
        )
        n = sum(count for kind, _, count in meta["things"] if kind == asked)
        return lexicon.NUMBERS["zh"][n] + reasoning.COUNTED_ZH[asked][0] if zh else lexicon.NUMBERS["en"][n]
    if task == "tracking":
        english = re.findall(r"(\w+) has the (\w+)\.", prompt) or re.findall(
            r"([^。]+?)拿着([^。]+)。", prompt
        )
        held = dict(english)
        for a, b in re.findall(r"(\w+) and (\w+) swap\.", prompt) or re.findall(
            r"([^。]+?)和([^。]+?)交换。", prompt
        ):
            held[a], held[b] = held[b], held[a]
        if who := re.search(r"Q: What does (\w+) have|问：(.+)拿着什么", prompt):
            return ("" if zh else "the ") + held[who[1] or who[2]]
        thing = re.search(r"Who has the (\w+)|问：谁拿着(.+)？", prompt)
        return next(name for name, item in held.items() if item == (thing[1] or thing[2]))
    return None


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("task", ["boolean", "ordering", "counting", "tracking"])
def test_reasoning_answers_are_right(task, lang):
    found = questions(CorpusConfig(), f"reasoning.{task}", lang, "train", 80)
    assert len(found) >= 60
    for q in found:
        assert solve_reasoning(q) == q.answer


def test_dates_agree_with_the_calendar():
    months = list(reasoning.MONTHS)
    for q in questions(CorpusConfig(), "reasoning.date", "en", "train", 150):
        ahead = q.meta["ahead"]
        if q.meta["form"] == "date":
            day, month = re.search(r"(\d+) (\w+)\.", q.prompt).groups()
            then = datetime.date(2025, months.index(month) + 1, int(day)) + datetime.timedelta(
                days=ahead
            )  # no leap year
            assert q.answer == f"{then.day} {months[then.month - 1]}"
        elif q.meta["form"] == "day":
            monday = datetime.date(2026, 11, 23) + datetime.timedelta(days=q.meta["start"] % 7 + ahead)
            assert q.answer == monday.strftime("%A")


def test_choices_hold_the_right_answer_once_and_in_every_place():
    letters = Counter()
    for lang in ("en", "zh"):
        for q in questions(CorpusConfig(), "knowledge.choice", lang, "train", 300):
            options = dict(re.findall(r"^([A-D])\. (.+)$", q.prompt, re.M))
            subject = next(s for s in reasoning.SUBJECTS if s.name == q.meta["subject"])
            assert len(set(options.values())) == 4
            assert options[q.answer] == subject.value(q.meta["row"], lang)
            letters[q.answer] += 1
    assert min(letters.values()) > 110


@pytest.mark.parametrize("task", ["copy", "reverse", "passkey", "moves"])
def test_length_tasks_have_the_length_asked_for(task):
    sizes = [
        len(questions(CorpusConfig(), f"length.{task}", "en", "heldout", 1, length=n)[0].prompt)
        for n in (4, 8, 32, 64)
    ]
    assert sizes == sorted(sizes)
    assert sizes[3] > 6 * sizes[0] or task == "passkey"
    q = questions(CorpusConfig(), f"length.{task}", "zh", "heldout", 1, length=40)[0]
    if task in ("copy", "reverse"):
        letters = q.prompt.split()[1:-1]
        assert len(letters) == 40
        assert q.answer.split() == (letters if task == "copy" else letters[::-1])
    if task == "passkey":
        assert q.prompt.count(q.answer) == 1
    if task == "moves":
        assert q.answer == re.findall(r"到了(.+?)。", q.prompt)[-1]


@pytest.mark.parametrize(
    "kind",
    ["stories", "facts", "arithmetic", "reasoning", "knowledge.choice", "length", "dialogue", "preference"],
)
def test_a_question_is_a_document_that_stops_before_its_answer(kind):
    for lang in ("en", "zh"):
        found = questions(CorpusConfig(), kind, lang, "heldout", 25)
        assert found
        assert len({q.prompt for q in found}) == len(found)
        for q in found:
            start, end, _ = q.meta["answers"][0]
            assert (len(q.prompt), len(q.prompt) + len(q.meta["target"])) == (start, end)
            assert q.grade(q.meta["target"] + "\nmore")
            assert q.answer
            assert not q.prompt.endswith(" ")
            assert q.lang in (lang, "und")


def test_questions_are_not_in_the_training_stream():
    config = CorpusConfig(max_digits=2)
    train = "\0".join(d.text for d in documents(config, n_documents=3000))
    for kind in ("stories", "arithmetic.plain"):
        assert not any(
            q.prompt + q.meta["target"] in train
            for q in questions(config, kind, "en", "heldout", 100)
            if q.lang != "und"
        )


def test_fewer_questions_come_back_where_there_are_no_more():
    found = questions(CorpusConfig(), "facts", "en", "train", 500)
    assert len(found) == 16 * 6
    assert {q.meta["label"] for q in found} == {
        q.meta["label"] for q in questions(CorpusConfig(), "facts", "en", "train", 96)
    }


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" [7+5=12,4+8+1=13]132", "132"),
        ("132\nQ: x", "132"),
        (" the garden.", "the garden"),
        ("花园。", "花园"),
        ("Tom=5,Ben=5+3=8", "8"),
        (" ~231", "~231"),
        ("", ""),
        ("\n132", ""),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


def test_turns_are_what_the_text_says():
    for d in documents(only("dialogue"), n_documents=300):
        lines = d.text.split("\n")
        assert len(lines) == len(d.meta["turns"])
        heads = ("User: ", "Assistant: ") if d.lang == "en" else ("用户：", "助手：")
        for i, (line, (role, content)) in enumerate(zip(lines, d.meta["turns"])):
            assert role == ("user", "assistant")[i % 2]
            assert line == heads[i % 2] + content


def test_requests_and_their_twins_have_the_right_label():
    for d in documents(only("dialogue"), n_documents=600):
        if "harmful" in d.meta:
            refused = d.text.split("\n")[1].startswith(("Assistant: I will not", "助手：我不能帮你"))
            assert refused == d.meta["harmful"]


def test_preferences():
    pairs = [d.meta for d in documents(only("preference"), n_documents=2000)]
    assert abs(sum(p["shorter"] for p in pairs) / len(pairs) - 0.5) < 0.04
    assert set(Counter(p["rating"] for p in pairs)) == {0, 1, 2, 3}
    assert {p["axis"] for p in pairs} == {"right", "helpful", "safe"}
    for p in pairs:
        assert p["chosen"] != p["rejected"]
        assert p["shorter"] == (len(p["chosen"]) < len(p["rejected"]))
        assert p["rating"] == p["rungs"][1] - p["rungs"][0]
        if p["safety"]:
            assert p["ladder"] == "harmful"
            assert p["helpfulness"] == -1
        assert (p["helpfulness"] == 0) == (p["rating"] == 0)
    assert sum(p["safety"] for p in pairs) > 130


def test_parallel_documents_say_the_same():
    for d in documents(only("parallel"), n_documents=100):
        one, two = d.text.split("\n")
        first, second = (
            score_story(text, "zh" if re.search("[\u4e00-\u9fff]", text) else "en") for text in (one, two)
        )
        assert d.lang == "mixed"
        assert first.roles == second.roles
        assert first.plot == second.plot == d.meta["plan"]["plot"]


def test_the_mixture_is_what_was_asked_for():
    config = CorpusConfig(stories=0.6, facts=0.2, arithmetic=0.2, chinese=0.3)
    docs = list(documents(config, n_documents=4000))
    shares = Counter(d.kind for d in docs)
    assert abs(shares["stories"] / 4000 - 0.6) < 0.03
    assert abs(shares["facts"] / 4000 - 0.2) < 0.03
    spoken = [d.lang for d in docs if d.lang != "und"]
    assert abs(spoken.count("zh") / len(spoken) - 0.3) < 0.03


def test_every_task_writes_in_both_languages_and_both_splits():
    for part, tasks in WRITERS.items():
        for name in tasks:
            for lang, split in itertools.product(("en", "zh"), ("train", "heldout")):
                for seed in range(8):
                    task = Task(config=CorpusConfig(), r=dice(seed, name), lang=lang, split=split)
                    made = write_document(task, f"{part}.{name}")
                    assert made.text.strip()
                    assert made.lang in (lang, "und", "mixed")
                    assert not re.search(r"[{}]", made.text)
                    assert all(0 < start <= end <= len(made.text) for start, end, _ in made.meta["answers"])
                    json.dumps(made.meta)
                    if made.lang == "en":
                        assert made.text.isascii()
                    assert not re.search(
                        r"\ba [aeiou]|\ban [^aeiou]|\bone \w+s\b", made.text.replace("one day", "")
                    ), made.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stories": 1.5}, "stories=1.5 must be a share between 0 and 1"),
        ({"chinese": -0.1}, "chinese=-0.1 must be a share between 0 and 1"),
        ({"defects": 0.6}, "defects=0.6 must be a share between 0 and 0.5"),
        ({"n_people": 3}, "n_people=3 must be at least 10"),
        ({"max_digits": 0}, "max_digits=0 must be at least 2"),
        ({"stories": 0.0, "facts": 0.0, "arithmetic": 0.0}, "every part has share 0"),
    ],
)
def test_a_wrong_configuration_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CorpusConfig(**changes)


def test_a_wrong_kind_language_or_split_is_refused():
    with pytest.raises(ValueError, match=r"kind 'story' does not exist; choose a part \(stories"):
        questions(CorpusConfig(), "story", "en", "train", 1)
    with pytest.raises(ValueError, match=r"kind 'facts\.nothing' does not exist"):
        questions(CorpusConfig(), "facts.nothing", "en", "train", 1)
    with pytest.raises(ValueError, match="lang must be 'en', 'zh' or 'und'"):
        questions(CorpusConfig(), "stories", "fr", "train", 1)
    with pytest.raises(ValueError, match="split 'train' or 'heldout'"):
        questions(CorpusConfig(), "stories", "en", "test", 1)


SPOILED = CorpusConfig(defects=0.5)


@pytest.fixture(scope="module")
def spoiled():
    return list(documents(SPOILED, n_documents=1260))  # 630 defects: 63 of each kind


def of_kind(stream, name):
    return [d for d in stream if d.meta.get("defect") == name]


def test_the_share_of_defects_is_exact_and_kinds_take_turns(spoiled):
    assert Counter(d.meta.get("defect") for d in spoiled) == {None: 630, **dict.fromkeys(DEFECTS, 63)}
    assert sum(d.kind == "defect" for d in documents(CorpusConfig(defects=0.07), n_documents=1000)) == 70


def test_clean_documents_do_not_change_when_defects_are_planted(spoiled):
    clean = list(documents(replace(SPOILED, defects=0.0), n_documents=1260))
    assert all(d == c for d, c in zip(spoiled, clean) if d.kind != "defect")


def test_duplicates_repeat_an_earlier_clean_document(spoiled):
    for number, d in enumerate(spoiled):
        if d.meta.get("defect") in ("duplicate", "near_duplicate"):
            original = spoiled[d.meta["of"]]
            assert d.meta["of"] < number
            assert original.kind != "defect"
            if d.meta["defect"] == "duplicate":
                assert d.text == original.text
            else:
                assert round(jaccard(original.text, d.text), 4) == d.meta["jaccard"]
    similar = [d.meta["jaccard"] for d in of_kind(spoiled, "near_duplicate")]
    assert 0.5 <= min(similar) < 0.6
    assert 0.8 < max(similar) <= 1
    assert sum(s <= 0.95 for s in similar) > 55


def test_web_pages_hold_their_clean_text(spoiled):
    for d in of_kind(spoiled, "html"):
        inside = re.findall(r"<p>(.*?)</p>", d.text, re.S)
        assert html.unescape("\n".join(inside)) == d.meta["clean"]
        assert "<nav>" in d.text


def test_personal_data_is_where_the_truth_says_and_belongs_to_nobody(spoiled):
    shapes = {
        "email": r"[a-z]+\d\d@example\.(com|org|net)",
        "phone": r"\(\d{3}\) 555-01\d\d|010-555-01\d\d",
        "card": r"[45][\d ]{18}",
        "ip": r"192\.0\.2\.\d\d",
        "id": r"999999\d{11}X",
    }
    seen = set()
    for d in of_kind(spoiled, "pii"):
        for start, end, kind in d.meta["spans"]:
            assert re.fullmatch(shapes[kind], d.text[start:end])
            seen.add(kind)
    assert seen == set(shapes)


def test_insults_and_their_harmless_twins(spoiled):
    found = of_kind(spoiled, "toxic")
    assert {d.meta["toxic"] for d in found} == {True, False}
    for d in found:
        assert d.meta["word"].lower() in d.text.lower()
        assert d.meta["toxic"] == bool(re.search("You are a|你这个", d.text))


def test_machine_text_comes_from_four_generators(spoiled):
    found = of_kind(spoiled, "machine")
    assert {d.meta["generator"] for d in found} == {"salad", "loop", "markov", "spam"}
    for d in found:
        score = score_story(d.text, d.lang)
        assert not score.consistent


def test_wrong_encodings_are_wrong_and_latin_1_can_be_undone(spoiled):
    found = of_kind(spoiled, "encoding")
    assert {d.meta["codec"] for d in found} == {"latin-1", "gb18030", "lost"}
    for d in found:
        assert d.text != d.meta["clean"]
        if d.meta["codec"] == "latin-1":
            assert d.text.encode("latin-1").decode() == d.meta["clean"]
        if d.meta["codec"] == "lost":
            assert "\N{REPLACEMENT CHARACTER}" in d.text or len(d.text) < 60


def test_traditional_characters_are_those_of_big5(spoiled):
    for d in of_kind(spoiled, "traditional"):
        d.text.encode("big5")
        assert d.text != d.meta["clean"]
    everything = "".join(d.text for d in documents(only("stories", chinese=1.0), n_documents=1500))
    to_traditional(everything).encode("big5")
    assert (
        to_traditional("里奥只有两只小狗，后来他在花园里找到了面包。")
        == "里奧只有兩隻小狗，後來他在花園裡找到了麵包。"
    )


def test_leaks_and_canaries_have_the_copies_that_the_truth_says(spoiled):
    for name, key in (("leak", "item"), ("canary", "canary")):
        found = of_kind(spoiled, name)
        counts = Counter(d.meta[key] for d in found)
        assert sorted(counts.values()) == [1, 2, 4, 8, 16, 32]
        assert all(counts[d.meta[key]] == d.meta["copies"] for d in found)
        assert all(number % 2 == 0 for number in counts)
    text = "\0".join(d.text for d in spoiled)
    for number in range(12):
        assert (canary(SPOILED, number) in text) == (number % 2 == 0)
        item = benchmark_item(SPOILED, number)
        assert item.split == "heldout"
        assert (item.text in text) == (number % 2 == 0)


# Data files


def test_the_tables_are_read_whole():
    from minillm.world.dialogue import REQUESTS
    from minillm.world.people import FACTS
    from minillm.world.tables import read_records, read_toml
    from minillm.world.writers import PROBLEMS

    assert [len(table) for table in (PLOTS, FACTS, PROBLEMS, REQUESTS, reasoning.SUBJECTS)] == [
        20,
        6,
        6,
        10,
        4,
    ]
    assert all(set(values) == {"en", "zh", "ask_en", "ask_zh"} for values in FACTS.values())
    assert all(len(act) == 2 for act in REQUESTS)
    assert all(len(row) == 4 for subject in reasoning.SUBJECTS for row in subject.rows)
    assert not any(line.startswith("#") for record in read_records("facts.txt") for line in record)
    assert set(read_toml("web.toml")) == {"page", "planted"}
