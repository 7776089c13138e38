"""Writers of small reasoning: logic, order, counting, dates, tracking, knowledge in four choices."""

import itertools
from dataclasses import dataclass
from typing import Any

from minillm.corpus import Dice, Page, pick, pick_some
from minillm.world.lexicon import (
    ANIMALS,
    FAMILIES,
    ITEMS,
    MONTHS,
    NAMES,
    NUMBERS,
    WEEKDAYS,
    article,
    count_phrase,
)
from minillm.world.stories import CAST_POOLS
from minillm.world.tables import read_records
from minillm.world.task import Draft, Task


def draw_boolean(r: Dice, depth: int) -> tuple[str, bool]:
    """A random expression of True, False, not, and, or, with brackets, as BIG-Bench Hard writes them, and its value."""
    if depth == 0:
        value = r() < 0.5
        return str(value), value
    if r() < 0.4:
        text, value = draw_boolean(r, depth - 1)
        return "not " + text, not value
    (left, x), (right, y) = draw_boolean(r, depth - 1), draw_boolean(r, depth - 1)
    both = r() < 0.5
    return f"( {left} {'and' if both else 'or'} {right} )", (x and y) if both else (x or y)


def write_boolean(task: Task) -> Draft:
    """Two boolean expressions and their values."""
    page, made = Page(), []
    for i in range(2):
        expression, value = task.draw(lambda r: draw_boolean(r, task.length or 2 + int(r() * 2)))
        page.write(("\n" if i else "") + expression + " is")
        page.answer(f" {value}", "boolean")
        made.append(expression)
    return page, "und", {"expressions": made}


COMPARISONS = (
    ("taller", "the tallest", "the shortest", "高", "最高", "最矮"),
    ("older", "the oldest", "the youngest", "年长", "最年长", "最年轻"),
    ("faster", "the fastest", "the slowest", "快", "最快", "最慢"),
    ("heavier", "the heaviest", "the lightest", "重", "最重", "最轻"),
    ("richer", "the richest", "the poorest", "富有", "最富有", "最贫穷"),
)


def write_ordering(task: Task) -> Draft:
    """People in an order, told by comparisons of neighbours in random order; who stands at one end?"""
    n = task.length or 3 + int(task.r() * 3)
    people, row = task.draw(lambda r: (pick_some(r, CAST_POOLS["a"], n), int(r() * len(COMPARISONS))))
    names = [NAMES[name] if task.lang == "zh" else name for name in people]
    er, most, least, er_zh, most_zh, least_zh = COMPARISONS[row]
    told = [
        f"{a}比{b}{er_zh}。" if task.lang == "zh" else f"{a} is {er} than {b}."
        for a, b in itertools.pairwise(names)
    ]
    page, top = Page(), task.r() < 0.5
    page.write(("" if task.lang == "zh" else " ").join(pick_some(task.r, told, len(told))))
    ask = f"谁{most_zh if top else least_zh}？" if task.lang == "zh" else f"Who is {most if top else least}?"
    page.ask(task.lang, ask, names[0] if top else names[-1], f"ordering{n}")
    return page, task.lang, {"order": people, "comparison": er}


COUNTED = {
    "fruit": ("apple", "pear", "peach", "plum"),
    "toys": ("ball", "kite", "doll", "car"),
    "animals": tuple(ANIMALS),
}

COUNTED_ZH = {"fruit": "个水果", "toys": "件玩具", "animals": "只动物"}


def write_counting(task: Task) -> Draft:
    """Things of two kinds in one list; how many are of one kind?"""

    def make(r: Dice) -> list[tuple[str, str, int]]:
        kinds = pick_some(r, tuple(COUNTED), 2)
        chosen = [(kind, thing) for kind in kinds for thing in pick_some(r, COUNTED[kind], 2)]
        return [
            (kind, thing, 1 + int(r() * 4))
            for kind, thing in pick_some(r, chosen, task.length or 3 + int(r() * 2))
        ]

    things = task.draw(make)
    english, page, asked = task.lang == "en", Page(), pick(task.r, things)[0]
    said = []
    for kind, thing, n in things:
        if kind != "animals":
            said.append(count_phrase(n, thing, task.lang))
        elif english:
            plural = {"mouse": "mice", "fox": "foxes"}.get(thing, thing + "s")
            said.append(f"{NUMBERS['en'][n]} {thing if n == 1 else plural}")
        else:
            said.append(f"{NUMBERS['zh'][n]}只{ANIMALS[thing]}")
    total = sum(n for kind, _, n in things if kind == asked)
    if english:
        page.write(f"I have {', '.join(said[:-1])} and {said[-1]}.")
        page.ask("en", f"How many {asked} do I have?", NUMBERS["en"][total], "counting")
    else:
        page.write(f"我有{'、'.join(said[:-1])}和{said[-1]}。")
        page.ask(
            "zh", f"我一共有几{COUNTED_ZH[asked]}？", NUMBERS["zh"][total] + COUNTED_ZH[asked][0], "counting"
        )
    return page, task.lang, {"things": things}


MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def write_date(task: Task) -> Draft:
    """What day, month or date it is some time from now; 28 days in February."""
    form, start, day, ahead = task.draw(
        lambda r: (pick(r, ("day", "month", "date")), int(r() * 84), int(r() * 28), 2 + int(r() * 19))
    )
    english, page = task.lang == "en", Page()
    months = list(MONTHS) if english else list(MONTHS.values())
    days = list(WEEKDAYS) if english else list(WEEKDAYS.values())
    month = start % 12
    if form == "day":
        told = f"Today is {days[start % 7]}." if english else f"今天是{days[start % 7]}。"
        ask = f"What day is it {ahead} days from now?" if english else f"{ahead}天以后是星期几？"
        answer = days[(start + ahead) % 7]
    elif form == "month":
        told = f"It is {months[month]}." if english else f"现在是{months[month]}。"
        ask = f"What month is it {ahead} months from now?" if english else f"{ahead}个月以后是几月？"
        answer = months[(month + ahead) % 12]
    else:
        over = day + ahead >= MONTH_DAYS[month]
        then, date = ((month + 1) % 12, day + ahead - MONTH_DAYS[month]) if over else (month, day + ahead)
        told = f"Today is {day + 1} {months[month]}." if english else f"今天是{months[month]}{day + 1}日。"
        ask = f"What is the date {ahead} days from now?" if english else f"{ahead}天以后是几月几日？"
        answer = f"{date + 1} {months[then]}" if english else f"{months[then]}{date + 1}日"
    page.write(told)
    page.ask(task.lang, ask, answer, form)
    return page, task.lang, {"form": form, "start": start, "day": day, "ahead": ahead}


def write_tracking(task: Task) -> Draft:
    """Three people hold three things and swap them `length` times; who holds what in the end?"""

    def make(r: Dice) -> dict[str, Any]:
        n = task.length or 1 + int(r() * 4)
        swaps = [sorted(pick_some(r, range(3), 2)) for _ in range(n)]
        return {
            "people": pick_some(r, CAST_POOLS["a"], 3),
            "things": pick_some(r, FAMILIES["toy"], 3),
            "swaps": swaps,
        }

    plan = task.draw(make)
    english, held = task.lang == "en", list(plan["things"])
    names = plan["people"] if english else [NAMES[name] for name in plan["people"]]
    said = [
        f"{name} has the {x}." if english else f"{name}拿着{ITEMS[x].zh}。" for name, x in zip(names, held)
    ]
    for i, j in plan["swaps"]:
        said.append(f"{names[i]} and {names[j]} swap." if english else f"{names[i]}和{names[j]}交换。")
        held[i], held[j] = held[j], held[i]
    page, who = Page(), int(task.r() * 3)
    page.write(("" if not english else " ").join(said))
    thing = f"the {held[who]}" if english else ITEMS[held[who]].zh
    if task.r() < 0.5:
        page.ask(task.lang, f"Who has {thing}?" if english else f"谁拿着{thing}？", names[who], "who")
    else:
        page.ask(
            task.lang,
            f"What does {names[who]} have?" if english else f"{names[who]}拿着什么？",
            thing,
            "what",
        )
    return page, task.lang, plan


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A subject of the four-choice questions: one relation, as templates in each language, and the pairs in it."""

    name: str
    name_zh: str
    says: dict[str, str]
    asks: dict[str, str]
    rows: tuple[tuple[str, ...], ...]  # key, value, Chinese key, Chinese value

    def fill(self, template: str, row: int, lang: str) -> str:
        """A statement or question about one pair."""
        key, value, key_zh, value_zh = self.rows[row]
        if lang == "zh":
            return template.format(k=key_zh, v=value_zh)
        one = article(value if "{k}" in template else key)
        return template.format(k=key, v=value, one=one, One=one.capitalize())

    def value(self, row: int, lang: str) -> str:
        """The second half of a pair."""
        return self.rows[row][1 if lang == "en" else 3]


def parse_subject(record: list[str]) -> Subject:
    """Read a subject from its table: the head's six fields, then "key value 键 值" apart by semicolons."""
    head, *body = record
    name, name_zh, say, say_zh, ask, ask_zh = head.split(" | ")
    rows = tuple(tuple(row.split()) for row in " ".join(body).split(";"))
    return Subject(
        name=name, name_zh=name_zh, says={"en": say, "zh": say_zh}, asks={"en": ask, "zh": ask_zh}, rows=rows
    )


SUBJECTS = tuple(map(parse_subject, read_records("knowledge.txt")))


def write_statement(task: Task) -> Draft:
    """Three facts of one subject, as plain sentences. All facts are told in training, also those held out as questions."""
    subject, page = pick(task.r, SUBJECTS), Page()
    rows = pick_some(task.r, range(len(subject.rows)), 3)
    told = [subject.fill(subject.says[task.lang], row, task.lang) for row in rows]
    page.write((" " if task.lang == "en" else "").join(told))
    return page, task.lang, {"subject": subject.name, "rows": rows}


def draw_row(r: Dice) -> tuple[int, int]:
    """Something to know: a subject and one of its pairs, by number."""
    subject = int(r() * len(SUBJECTS))
    return subject, int(r() * len(SUBJECTS[subject].rows))


CHOICE_FORMS = {  # as the benchmarks' own harnesses write them: head, question, answer cue
    "mmlu": ("The following are multiple choice questions (with answers) about {s}.\n\n", "{q}", "Answer:"),
    "ceval": ("以下是中国关于{s}考试的单项选择题，请选出其中的正确答案。\n\n", "{q}", "答案："),
    "cmmlu": ("以下是关于{s}的单项选择题，请直接给出正确答案的选项。\n\n", "题目：{q}", "答案是："),
}


def write_choice(task: Task) -> Draft:
    """A four-choice question: MMLU's form in English, C-Eval's or CMMLU's in Chinese."""
    number, row = task.draw(draw_row)
    subject, english, r = SUBJECTS[number], task.lang == "en", task.r
    right = subject.value(row, task.lang)
    values = dict.fromkeys(subject.value(i, task.lang) for i in range(len(subject.rows)))
    options = pick_some(r, [value for value in values if value != right], 3)
    place = int(r() * 4)
    options.insert(place, right)
    form = "mmlu" if english else "ceval" if r() < 0.5 else "cmmlu"
    head, ask, cue = CHOICE_FORMS[form]
    page = Page()
    page.write(head.format(s=subject.name if english else subject.name_zh))
    page.write(ask.format(q=subject.fill(subject.asks[task.lang], row, task.lang)) + "\n")
    page.write("".join(f"{letter}. {option}\n" for letter, option in zip("ABCD", options)) + cue)
    page.answer((" " if english else "") + "ABCD"[place], form)
    return page, task.lang, {"subject": subject.name, "row": row, "options": options, "form": form}
