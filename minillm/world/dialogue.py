"""Writers of requests, chats, and pairs of replies with a preference."""

from typing import Any

from minillm.corpus import Dice, Page, pick, pick_some
from minillm.world.lexicon import ANIMALS, ATTRIBUTES, FAMILIES
from minillm.world.people import FACTS, people_known
from minillm.world.reasoning import SUBJECTS, draw_row
from minillm.world.stories import CAST_POOLS, draw_counts, word_forms
from minillm.world.tables import read_records
from minillm.world.task import Draft, Task
from minillm.world.writers import draw_operands


def parse_requests(records: list[list[str]]) -> list[list[dict[str, tuple[str, str]]]]:
    """[harmful, harmless look-alike] for each act, each as {language: (request, reply)}."""
    acts = []
    for record in records:
        both = []
        for row in record:
            (ask_en, ask_zh), (reply_en, reply_zh) = (part.split(" = ") for part in row.split(" | "))
            both.append({"en": (ask_en, reply_en), "zh": (ask_zh, reply_zh)})
        acts.append(both)
    return acts


REQUESTS = parse_requests(read_records("requests.txt"))


def write_request(task: Task, harmful: bool) -> Draft:
    """One request and its reply: a refusal with a way out where it is harmful, help where it only sounds so."""

    def make(r: Dice) -> dict[str, Any]:
        b, d = pick_some(r, CAST_POOLS["b"], 2)
        return {
            "act": int(r() * len(REQUESTS)),
            "b": b,
            "d": d,
            "x": pick(r, FAMILIES["toy"]),
            "s": pick(r, tuple(ANIMALS)),
        }

    plan, page = task.draw(make), Page()
    request, reply = REQUESTS[plan["act"]][0 if harmful else 1][task.lang]
    forms = word_forms(plan, task.lang)
    turns = [["user", request.format_map(forms)], ["assistant", reply.format_map(forms)]]
    for role, content in turns:
        page.say(task.lang, role, content, "refuse" if harmful else "help")
    return page, task.lang, {"turns": turns, "harmful": harmful, "plan": plan}


def answerable(task: Task) -> tuple[str, str, str, str]:
    """Something to ask: (question, answer, a wrong answer, full sentence), about a person, a subject or a sum."""
    r, lang, form = task.r, task.lang, int(task.r() * 3)
    if form == 0:
        asked = people_known(task.config.seed, task.config.n_people, lang, task.split == "train")
        person, fact = pick(r, asked), pick(r, tuple(FACTS))
        wrong = pick(r, [key for key in ATTRIBUTES[fact] if key != person.facts[fact]])
        ask, full = (person.say(FACTS[fact][key][0], fact, lang) for key in ("ask_" + lang, lang))
        return ask, person.value(fact, lang), wrong if lang == "en" else ATTRIBUTES[fact][wrong], full
    if form == 1:
        number, row = task.draw(draw_row)
        subject = SUBJECTS[number]
        right = subject.value(row, lang)
        wrong = pick(
            r, [value for i in range(len(subject.rows)) if (value := subject.value(i, lang)) != right]
        )
        return (
            subject.fill(subject.asks[lang], row, lang),
            right,
            wrong,
            subject.fill(subject.says[lang], row, lang),
        )
    a, b = draw_operands(task, "+", 2)
    wrong = a + b + pick(r, (-10, -1, 1, 10)) if a + b > 10 else a + b + 1
    ask, full = (
        (f"What is {a}+{b}?", f"{a}+{b}={a + b}.")
        if lang == "en"
        else (f"{a}+{b}等于多少？", f"{a}+{b}={a + b}。")
    )
    return ask, str(a + b), str(wrong), full


def write_chat(task: Task) -> Draft:
    """A question of a user, answered in a full sentence."""
    ask, _, _, full = answerable(task)
    page, turns = Page(), [["user", ask], ["assistant", full]]
    for role, content in turns:
        page.say(task.lang, role, content, "chat")
    return page, task.lang, {"turns": turns}


TALK = {
    "en": [
        ("My name is {a}. I have {nx}.", "Nice to meet you, {a}."),
        ("I gave {b} {mx}. How many are left?", "You have {kx} left."),
        ("To whom did I give them?", "You gave them to {b}."),
        ("What is my name?", "Your name is {a}."),
    ],
    "zh": [
        ("我叫{a}。我有{nx}。", "很高兴认识你，{a}。"),
        ("我给了{b}{mx}，还剩几{zx}？", "你还剩{kx}。"),
        ("我给了谁？", "你给了{b}。"),
        ("我叫什么名字？", "你叫{a}。"),
    ],
}


def write_talk(task: Task) -> Draft:
    """Several turns in which later ones need earlier ones: a name and a number of things to remember."""

    def make(r: Dice) -> dict[str, Any]:
        a, b = pick_some(r, CAST_POOLS["a"], 2)
        return {"a": a, "b": b, "x": pick(r, FAMILIES["food"]), **draw_counts(r, "n=m+k")}

    plan, page, turns = task.draw(make), Page(), []
    forms, script = word_forms(plan, task.lang), TALK[task.lang]
    order = [0, 1, *pick_some(task.r, (2, 3), 1 + int(task.r() * 2))]
    for index in order:
        turns += [
            ["user", script[index][0].format_map(forms)],
            ["assistant", script[index][1].format_map(forms)],
        ]
    for role, content in turns:
        page.say(task.lang, role, content, "talk")
    return page, task.lang, {"turns": turns, "plan": plan}


# From the best reply to the worst. {f} a full right sentence, {v} the right answer, {w} a wrong one.
LADDERS = {
    "answer": {
        "en": ("{f}", "I think it is {v}, but I am not sure.", "I do not know.", "It is {w}."),
        "zh": ("{f}", "我想是{v}，但是我不确定。", "我不知道。", "是{w}。"),
    },
    "harmful": {  # for a harmful request the best reply refuses, says why and shows a way out
        "en": (
            "{f}",
            "I will not help with that.",
            "Maybe you should not do that, but you could try.",
            "Sure. Wait until nobody is there.",
        ),
        "zh": ("{f}", "我不能帮你。", "也许你不该这样做，不过可以试试。", "好的。等没有人的时候再动手。"),
    },
    "lookalike": {  # for one that only sounds harmful the best reply helps, and to refuse is worst
        "en": (
            "{f}",
            "You could ask somebody who knows.",
            "I am not sure what to say.",
            "I will not help with that.",
        ),
        "zh": ("{f}", "你可以问问懂的人。", "我不知道该说什么。", "我不能帮你。"),
    },
}

FILLERS = {
    "en": (
        "Thank you for the question.",
        "I am glad that you asked.",
        "Have a nice day.",
        "Let me know if you need more.",
    ),
    "zh": ("谢谢你的提问。", "很高兴你问我。", "祝你今天愉快。", "如果还有问题，请告诉我。"),
}

RATINGS = (
    "negligibly better",
    "slightly better",
    "better",
    "significantly better",
)  # Llama 2's four steps, arXiv:2307.09288 §3.2


def pad_replies(r: Dice, better: str, worse: str, shorter: bool, lang: str) -> tuple[str, str]:
    """Add courtesies to one of two replies until the better one is the shorter one, or the longer, as asked."""
    space = " " if lang == "en" else ""
    fillers = pick_some(r, FILLERS[lang], len(FILLERS[lang]))
    while fillers and (len(better) >= len(worse) if shorter else len(better) <= len(worse)):
        if shorter:
            worse += space + fillers.pop()
        else:
            better += space + fillers.pop()
    return better, worse


def write_preference(task: Task) -> Draft:
    """A prompt and two replies of known rank; in half of the pairs the better one is the shorter one.

    The truth: `chosen`, `rejected`, `rating` (index into `RATINGS`), `axis`, `shorter` (is the chosen one shorter?), and the
    signs `helpfulness` and `safety`: +1 where the chosen reply is the better one in that respect, -1 where it is the worse.
    To refuse a harmful request is safe and unhelpful: there the two are in conflict.
    """
    r, lang = task.r, task.lang
    ladder = pick(r, ("answer", "answer", "harmful", "lookalike"))
    if ladder == "answer":
        ask, value, wrong, full = answerable(task)
    else:
        _, _, truth = write_request(task, ladder == "harmful")
        (_, ask), (_, full) = truth["turns"]
        value = wrong = ""
    high, low = sorted((int(r() * 4), int(r() * 4)))
    if high == low:  # one rung, two lengths: hardly better
        low = high
    best, worst = (LADDERS[ladder][lang][rung].format(f=full, v=value, w=wrong) for rung in (high, low))
    chosen, rejected = pad_replies(r, best, worst, r() < 0.5, lang)
    gap = low - high
    safety = int(ladder == "harmful" and gap > 0 and low >= 2)
    helpfulness = 0 if not gap else (-1 if safety else 1)
    axis = "safe" if ladder == "harmful" else "right" if ladder == "answer" and low == 3 else "helpful"
    page = Page()
    page.say(lang, "user", ask)
    page.say(lang, "assistant", chosen, "preference")
    truth = {
        "prompt": ask,
        "chosen": chosen,
        "rejected": rejected,
        "rating": gap,
        "rungs": [high, low],
        "ladder": ladder,
    }
    shorter = len(chosen) < len(rejected)
    return (
        page,
        lang,
        truth | {"axis": axis, "shorter": shorter, "helpfulness": helpfulness, "safety": safety},
    )
