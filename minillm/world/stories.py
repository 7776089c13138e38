"""Plots with roles, and the stories that are told from them. The plots stand in `data/plots.txt`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minillm.corpus import Dice, Page, pick, pick_some
from minillm.world.lexicon import (
    ANIMALS,
    COLORS,
    FAMILIES,
    HOLDERS,
    ITEMS,
    NAMES,
    NUMBERS,
    PLACES,
    article,
    count_phrase,
)
from minillm.world.tables import read_blocks


@dataclass(frozen=True, kw_only=True)
class Line:
    """One step of a plot: its wordings in each language, and whether a story may leave it out."""

    en: tuple[str, ...]
    zh: tuple[str, ...]
    optional: bool

    def wordings(self, lang: str) -> tuple[str, ...]:
        """The templates in one language."""
        return self.en if lang == "en" else self.zh


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Roles, steps, and questions as (question, answer) templates in each language."""

    name: str
    roles: tuple[str, ...]
    lines: tuple[Line, ...]
    questions: tuple[dict[str, tuple[str, str]], ...]


def parse_plot(block: str) -> Plot:
    """Read a plot from its table.

    The head is "name: roles". Then a line for each step, "English || 中文", wordings apart by " / ", "?" before what may be
    left out, and "Q question = answer || 问题 = 答案".
    """
    head, *rows = block.strip().split("\n")
    name, _, roles = head.partition(": ")
    lines, asked = [], []
    for row in rows:
        mark, text = (row[0], row[2:]) if row[:2] in ("? ", "Q ") else ("", row)
        en, zh = (side.strip() for side in text.split("||"))
        if mark == "Q":
            (ask_en, _, answer_en), (ask_zh, _, answer_zh) = en.partition(" = "), zh.partition(" = ")
            asked.append({"en": (ask_en, answer_en), "zh": (ask_zh, answer_zh)})
        else:
            lines.append(Line(en=tuple(en.split(" / ")), zh=tuple(zh.split(" / ")), optional=mark == "?"))
    return Plot(name=name, roles=tuple(roles.split()), lines=tuple(lines), questions=tuple(asked))


PLOTS = {plot.name: plot for plot in map(parse_plot, read_blocks("plots.txt"))}

PLOT_LIST = tuple(PLOTS.values())

# What a letter stands for in a plot: people, places, containers, a colour, an animal. x and y are things, n, m and k counts.
CASTS = {
    "a": NAMES,
    "b": NAMES,
    "d": NAMES,
    "p": PLACES,
    "q": PLACES,
    "h": HOLDERS,
    "g": HOLDERS,
    "c": COLORS,
    "s": ANIMALS,
}

CAST_POOLS = {letter: tuple(table) for letter, table in CASTS.items()}

COUNT_RULES = {
    "n=m+k": ("n", "m", "k"),
    "n+m=k": ("k", "n", "m"),
    "n=k+k": ("n", "k", "k"),
}  # whole, part, rest


def draw_counts(r: Dice, rule: str) -> dict[str, int]:
    """Counts up to ten that obey a plot's rule: "n" alone, or one of `COUNT_RULES`."""
    if rule == "n":
        return {"n": 2 + int(r() * 7)}
    whole, part, rest = COUNT_RULES[rule]
    if part == rest:
        half = 1 + int(r() * 5)
        return {whole: 2 * half, part: half}
    total = 3 + int(r() * 8)
    some = 1 + int(r() * (total - 1))
    return {whole: total, part: some, rest: total - some}


def fill_roles(plot: Plot, r: Dice) -> dict[str, Any]:
    """Draw who and what a plot is about. Names are keys of the tables, in no language."""
    plan: dict[str, Any] = {"plot": plot.name}
    for role in plot.roles:
        letter, _, family = role.partition("=")
        if letter in CASTS or letter in "xy":
            pool = CAST_POOLS[letter] if letter in CASTS else FAMILIES[family]
            value = pick(r, pool)
            while value in plan.values():  # no two roles are one and the same
                value = pick(r, pool)
            plan[letter] = value
        else:
            plan.update(draw_counts(r, role))
    return plan


def plan_story(r: Dice) -> dict[str, Any]:
    """A plot with its roles filled: the world that a story tells of."""
    return fill_roles(pick(r, PLOT_LIST), r)


def item_forms(role: str, plan: Mapping[str, Any], lang: str) -> dict[str, str]:
    """What templates may ask about a thing: {x}, {xs}, {one_x}, {one_cx}, {zx}, {zcx}, {nx}, {nz}."""
    noun = ITEMS[plan[role]]
    colour = plan.get("c") if role == "x" else None
    counts = [letter for letter in "nmk" if letter in plan]
    forms = {letter + role: count_phrase(plan[letter], noun.one, lang) for letter in counts}
    if lang == "en":
        forms |= {role: noun.one, role + "s": noun.many, "one_" + role: article(noun.one)}
        if colour:
            forms["one_c" + role] = article(f"{colour} {noun.one}")
        return forms
    forms |= {role: noun.zh, "z" + role: noun.measure + noun.zh}
    if role == "y" or "y" not in plan:  # a bare count, 三个, takes the measure word of what is counted
        forms |= {letter + "z": NUMBERS["zh"][plan[letter]] + noun.measure for letter in counts}
    if colour:
        forms["zc" + role] = f"{noun.measure}{COLORS[colour]}的{noun.zh}"
    return forms


def word_forms(plan: Mapping[str, Any], lang: str) -> dict[str, str]:
    """Every form of a plan's roles that a template of `lang` may ask for."""
    forms: dict[str, str] = {}
    for role, value in plan.items():
        if role in CASTS:
            forms[role] = value if lang == "en" else CASTS[role][value]
            if role == "s":
                forms |= {"one_s": article(value)} if lang == "en" else {"zs": "只" + forms["s"]}
        elif role in ("n", "m", "k"):
            forms[role] = NUMBERS[lang][value]
        elif role in ("x", "y"):
            forms |= item_forms(role, plan, lang)
    return forms


def tell(plan: Mapping[str, Any], lang: str, r: Dice, page: Page, n_questions: int = 0) -> None:
    """Write a plan as a story in one language, then questions about its world, without repeating one."""
    plot, forms = PLOTS[plan["plot"]], word_forms(plan, lang)
    steps = [pick(r, line.wordings(lang)) for line in plot.lines if not line.optional or r() < 0.6]
    page.write((" " if lang == "en" else "").join(step.format_map(forms) for step in steps))
    for index in pick_some(r, range(len(plot.questions)), min(n_questions, len(plot.questions))):
        question, answer = plot.questions[index][lang]
        page.ask(lang, question.format_map(forms), answer.format_map(forms), f"{plot.name}.{index}")
