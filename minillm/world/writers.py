"""Writers of stories, biographies, sums, problems, graphs and tasks of any length."""

from typing import Any

from minillm.corpus import Dice, Page, pick, pick_some, split_of
from minillm.world.lexicon import FAMILIES, ITEMS, NAMES, PLACES
from minillm.world.people import FACTS, people_known
from minillm.world.stories import CAST_POOLS, plan_story, tell, word_forms
from minillm.world.tables import read_records
from minillm.world.task import Draft, Task


def write_story(task: Task) -> Draft:
    """A story, and two or three questions about its world."""
    plan, page = task.draw(plan_story), Page()
    tell(plan, task.lang, task.r, page, n_questions=2 + int(task.r() * 2))
    return page, task.lang, {"plan": plan}


def write_biography(task: Task) -> Draft:
    """All facts of one person, in random order and wording."""
    person, page = pick(task.r, task.people), Page()
    order = pick_some(task.r, tuple(FACTS), len(FACTS))
    sentences = [person.say(pick(task.r, FACTS[fact][task.lang]), fact, task.lang) for fact in order]
    page.write((" " if task.lang == "en" else "").join(sentences))
    return page, task.lang, {"people": [person.index]}


def write_recall(task: Task) -> Draft:
    """Four questions about people: in training those who are asked about; held out, the others."""
    people = people_known(task.config.seed, task.config.n_people, task.lang, task.split == "train")
    page, asked = Page(), []
    for _ in range(4):
        person, fact = pick(task.r, people), pick(task.r, tuple(FACTS))
        question = person.say(FACTS[fact]["ask_" + task.lang][0], fact, task.lang)
        page.ask(task.lang, question, person.value(fact, task.lang), f"{person.index}.{fact}")
        asked.append(person.index)
    return page, task.lang, {"people": asked}


def write_crossing(task: Task) -> Draft:
    """A question about a person whom only the texts of the other language know."""
    other = "zh" if task.lang == "en" else "en"
    known = people_known(task.config.seed, task.config.n_people, other)
    people = [person for person in known if task.lang not in person.langs]
    person, fact, page = pick(task.r, people), pick(task.r, tuple(FACTS)), Page()
    question = person.say(FACTS[fact]["ask_" + task.lang][0], fact, task.lang)
    page.ask(task.lang, question, person.value(fact, task.lang), f"{person.index}.{fact}")
    return page, task.lang, {"people": [person.index]}


def draw_operands(task: Task, op: str, digits: int) -> tuple[int, int]:
    """Two operands of up to `digits` digits on the task's side of the split; for a difference the larger one first.

    a+b and b+a are one meaning: held out is the pair, in any order and in any form or story around it.
    """
    while True:
        a, b = int(task.r() * 10**digits), int(task.r() * 10**digits)
        if op == "-" and a < b:
            a, b = b, a
        if split_of(op, min(a, b), max(a, b)) == task.split:
            return a, b


def draw_digits(task: Task) -> int:
    """A number of digits, long ones more often than short: there are only a hundred sums of one digit."""
    return 1 + max(int(task.r() * task.config.max_digits), int(task.r() * task.config.max_digits))


def scratchpad(a: int, b: int, op: str = "+") -> str:
    """Column arithmetic written out, units first: 47+85 is "7+5=12,4+8+1=13", 42-17 is "12-7=5,4-1-1=2".

    Args:
        a: the first operand, not negative.
        b: the second, not negative; not above `a` for a difference.
        op: "+" or "-".
    """
    if min(a, b) < 0 or op not in ("+", "-") or (op == "-" and b > a):
        raise ValueError(
            f"scratchpad({a}, {b}, {op!r}): operands and result must not be negative, and op is '+' or '-'"
        )
    steps, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        ten = 10 if op == "-" and x < y + carry else 0
        result = x + y + carry if op == "+" else x + ten - y - carry
        steps.append(f"{x + ten}{op}{y}" + (f"{op}1" if carry else "") + f"={result}")
        carry = result // 10 if op == "+" else ten // 10
    return ",".join(steps)


def write_sums(task: Task, form: str) -> Draft:
    """Three sums or differences: "scratchpad", "plain", or "reversed" (~ and then the digits of the result backwards)."""
    page, sums = Page(), []
    for i in range(3):
        op = "+" if task.r() < 0.6 else "-"
        a, b = draw_operands(task, op, task.length or draw_digits(task))
        result = a + b if op == "+" else a - b
        page.write(("\n" if i else "") + f"{a}{op}{b}=")
        if form == "scratchpad":
            page.answer(f"[{scratchpad(a, b, op)}]{result}", form + op)
        else:
            page.answer(str(result) if form == "plain" else "~" + str(result)[::-1], form + op)
        sums.append([a, op, b])
    return page, "und", {"sums": sums, "form": form}


PROBLEMS = [
    {"op": english[0], "en": english.removeprefix(english[0] + " | "), "zh": chinese}
    for english, chinese in read_records("problems.txt")
]


def write_problem(task: Task) -> Draft:
    """A word problem with two operands, solved with a scratchpad."""
    r, problem = task.r, pick(task.r, PROBLEMS)
    i = j = 0
    while min(i, j) < 2:  # "1 stones" and "0 pages" are not what people say
        i, j = draw_operands(task, problem["op"], task.length or 2)
    result = i + j if problem["op"] == "+" else i - j
    (a, b), (p, q) = pick_some(r, CAST_POOLS["a"], 2), pick_some(r, CAST_POOLS["p"], 2)
    forms = word_forms({"a": a, "b": b, "p": p, "q": q, "x": pick(r, FAMILIES["stock"])}, task.lang)
    if task.lang == "zh":
        forms["w"] = forms["zx"][0]
    page = Page()
    work = f"{i}{problem['op']}{j}=[{scratchpad(i, j, problem['op'])}]{result}"
    page.ask(task.lang, problem[task.lang].format(i=i, j=j, **forms), work, "problem" + problem["op"])
    return page, task.lang, {"sums": [[i, problem["op"], j]]}


RELATIONS = {
    "more": ("{a} has {k} more than {b}.", "{a}比{b}多{k}{w}。"),
    "fewer": ("{a} has {k} fewer than {b}.", "{a}比{b}少{k}{w}。"),
    "twice": ("{a} has twice as many as {b}.", "{a}的{x}是{b}的两倍。"),
    "sum": ("{a} has as many as {b} and {d} together.", "{a}的{x}等于{b}与{d}的总和。"),
}


def draw_graph(r: Dice, n: int) -> dict[str, Any]:
    """`n` people, of whom the first has a number of things and each later one a number that depends on earlier ones."""
    people = pick_some(r, CAST_POOLS["a"], n)
    amounts, relations = [2 + int(r() * 8)], []
    for i in range(1, n):
        name, b, k = pick(r, tuple(RELATIONS)), int(r() * i), 1 + int(r() * 5)
        d = (b + 1 + int(r() * (i - 1))) % i if i > 1 else b
        if name == "sum" and d == b:
            name = "twice"
        if name == "fewer" and amounts[b] - k < 2:
            name = "more"
        amounts.append(
            {"more": amounts[b] + k, "fewer": amounts[b] - k, "twice": 2 * amounts[b]}.get(
                name, amounts[b] + amounts[d]
            )
        )
        relations.append([name, b, d, k])
    return {"people": people, "x": pick(r, FAMILIES["stock"]), "amounts": amounts, "relations": relations}


def write_graph(task: Task) -> Draft:
    """A dependency-graph problem: who has how many, told out of order; the solution names what is needed, in order."""
    n = task.length or 2 + int(task.r() * 3)
    graph = task.draw(lambda r: draw_graph(r, n))
    forms, zh = word_forms({"x": graph["x"]}, task.lang), task.lang == "zh"
    names = [NAMES[name] if zh else name for name in graph["people"]]
    measure, amounts = ITEMS[graph["x"]].measure, graph["amounts"]
    told = [
        f"{names[0]}有{amounts[0]}{forms['zx']}。" if zh else f"{names[0]} has {amounts[0]} {forms['xs']}."
    ]
    works, needs = [f"{names[0]}={amounts[0]}"], [{0}]
    for i, (name, b, d, k) in enumerate(graph["relations"], start=1):
        told.append(RELATIONS[name][zh].format(a=names[i], b=names[b], d=names[d], k=k, w=measure, **forms))
        second = {"more": f"+{k}", "fewer": f"-{k}", "twice": "*2"}.get(name, f"+{amounts[d]}")
        works.append(f"{names[i]}={amounts[b]}{second}={amounts[i]}")
        needs.append({i} | needs[b] | (needs[d] if name == "sum" else set()))
    page = Page()
    page.write(("" if zh else " ").join(pick_some(task.r, told, n)))
    ask = f"{names[-1]}有多少{forms['zx']}？" if zh else f"How many {forms['xs']} does {names[-1]} have?"
    page.ask(task.lang, ask, ",".join(works[i] for i in sorted(needs[-1])), f"graph{n}")
    return page, task.lang, {"graph": graph}


def write_letters(task: Task, backwards: bool) -> Draft:
    """Letters to copy, or to write backwards."""
    n = task.length or 1 + int(task.r() * task.config.max_length)
    letters = task.draw(lambda r: "".join(chr(97 + int(r() * 26)) for _ in range(n)))
    page = Page()
    page.write(("reverse " if backwards else "copy ") + " ".join(letters) + " =")
    page.answer(" " + " ".join(letters[::-1] if backwards else letters), "reverse" if backwards else "copy")
    return page, "und", {"letters": letters, "length": n}


HAY = {
    "en": (
        "The sky is blue.",
        "The grass is green.",
        "The sun is warm.",
        "Here we go.",
        "There and back again.",
    ),
    "zh": ("天空是蓝色的。", "草是绿色的。", "太阳很温暖。", "我们出发吧。", "走过去，再走回来。"),
}


def write_passkey(task: Task) -> Draft:
    """A number hidden at a random place among `length` sentences of no importance, and asked for at the end."""
    n = task.length or 1 + int(task.r() * task.config.max_length)
    key = task.draw(lambda r: 10000 + int(r() * 90000))
    hay = [pick(task.r, HAY[task.lang]) for _ in range(n)]
    english, place, page = task.lang == "en", int(task.r() * (n + 1)), Page()
    hay.insert(place, f"The pass key is {key}. Remember it." if english else f"口令是{key}。请记住它。")
    page.write((" " if english else "").join(hay))
    page.ask(task.lang, "What is the pass key?" if english else "口令是什么？", str(key), "passkey")
    return page, task.lang, {"key": key, "depth": place / n, "length": n}


def write_moves(task: Task) -> Draft:
    """A thing that is carried from place to place `length` times, and then asked for."""
    n = task.length or 1 + int(task.r() * task.config.max_length)

    def make(r: Dice) -> dict[str, Any]:
        way = [pick(r, CAST_POOLS["p"])]
        while len(way) <= n:
            step = pick(r, CAST_POOLS["p"])
            way += [step] if step != way[-1] else []
        return {
            "x": pick(r, FAMILIES["toy"]),
            "way": way,
            "people": [pick(r, CAST_POOLS["a"]) for _ in range(n)],
        }

    plan = task.draw(make)
    english, page = task.lang == "en", Page()
    thing = f"the {plan['x']}" if english else ITEMS[plan["x"]].zh
    way = plan["way"] if english else [PLACES[place] for place in plan["way"]]
    names = plan["people"] if english else [NAMES[name] for name in plan["people"]]
    told = [f"{thing.capitalize()} is in {way[0]}." if english else f"{thing}在{way[0]}里。"]
    told += [f"{a} takes it to {p}." if english else f"{a}把它拿到了{p}。" for a, p in zip(names, way[1:])]
    page.write((" " if english else "").join(told))
    page.ask(task.lang, f"Where is {thing}?" if english else f"{thing}在哪里？", way[-1], "moves")
    return page, task.lang, plan | {"length": n}


def write_parallel(task: Task) -> Draft:
    """One story in both languages, the task's language first."""
    plan, page = task.draw(plan_story), Page()
    tell(plan, task.lang, task.r, page)
    page.write("\n")
    tell(plan, "zh" if task.lang == "en" else "en", task.r, page)
    return page, "mixed", {"plan": plan}
