"""A reader that checks a story against its plot."""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from minillm.world.lexicon import ANIMALS, COLORS, ITEMS, NUMBERS, article
from minillm.world.stories import CASTS, COUNT_RULES, PLOT_LIST, PLOTS, Plot


@lru_cache(maxsize=2)
def surface_words(lang: str) -> dict[str, dict[str, Any]]:
    """For each kind of slot in a template, what may stand there and what it means."""
    english = lang == "en"
    words: dict[str, dict[str, Any]] = {
        letter: {(en if english else zh): en for en, zh in table.items()} for letter, table in CASTS.items()
    }
    words["n"] = {word: n for n, word in enumerate(NUMBERS[lang]) if n}
    words["x"] = {(noun.one if english else noun.zh): item for item, noun in ITEMS.items()}
    words["one"] = {article(item): item for item in ITEMS}
    words["one_s"] = {article(animal): animal for animal in ANIMALS}
    words["one_c"] = {article(colour): colour for colour in COLORS}
    words["many"] = {noun.many: item for item, noun in ITEMS.items()}
    words["counted"] = words["x"] | words["many"]
    words["measured"] = {noun.measure + noun.zh: item for item, noun in ITEMS.items()}
    words["animal"] = {"只" + zh: en for en, zh in ANIMALS.items()}
    words["measure"] = {noun.measure: noun.measure for noun in ITEMS.values()}
    return words


def slot_groups(slot: str, lang: str) -> list[tuple[str, str, str]]:
    """A template's slot as pieces (role, kind of word, separator before it): {nx} is a count and then a thing."""
    if slot in CASTS or slot in ("x", "y"):
        return [(slot, "x" if slot in ("x", "y") else slot, "")]
    if slot in ("n", "m", "k"):
        return [(slot, "n", "")]
    if slot[0] in "nmk":
        return [(slot[0], "n", ""), (slot[1], "counted", " ") if lang == "en" else (slot[1], "measured", "")]
    named = {
        "xs": [("x", "many", "")],
        "one_x": [("x", "one", "")],
        "one_y": [("y", "one", "")],
        "one_s": [("s", "one_s", "")],
        "one_cx": [("c", "one_c", ""), ("x", "x", " ")],
        "zx": [("x", "measured", "")],
        "zy": [("y", "measured", "")],
        "zs": [("s", "animal", "")],
        "zcx": [("", "measure", ""), ("c", "c", ""), ("x", "x", "的")],
    }
    return named[slot]


class ReadingRule(NamedTuple):
    """One wording of one step of a plot, turned round: what it looks like, and what each of its groups means."""

    pattern: re.Pattern[str]
    plot: str
    step: int
    groups: list[tuple[str, str]]  # role, kind of word


def plot_rules(plot: Plot, lang: str) -> list[ReadingRule]:
    """A plot turned round: for each wording of each step a pattern that finds the roles."""
    words, rules = surface_words(lang), []
    for step, line in enumerate(plot.lines):
        for template in line.wordings(lang):
            pattern, groups = "", []
            for i, piece in enumerate(re.split(r"\{(\w+)\}", template)):
                if i % 2 == 0:
                    pattern += re.escape(piece)
                    continue
                for role, kind, before in slot_groups(piece, lang):
                    options = "|".join(map(re.escape, sorted(words[kind], key=len, reverse=True)))
                    pattern += f"{before}({options})"
                    groups.append((role, kind))
            rules.append(ReadingRule(re.compile(pattern), plot.name, step, groups))
    return rules


@lru_cache(maxsize=2)
def reading_rules(lang: str) -> list[ReadingRule]:
    """All plots turned round."""
    return [rule for plot in PLOT_LIST for rule in plot_rules(plot, lang)]


def complete_counts(plot: str, roles: dict[str, Any]) -> list[str]:
    """Work out the counts that a story leaves unsaid, into `roles`; returns the rule that the said ones break, if any."""
    rule = next((role for role in PLOTS[plot].roles if role in COUNT_RULES), None)
    if rule is None:
        return []
    whole, part, rest = COUNT_RULES[rule]
    if whole in roles and part == rest:
        roles.setdefault(part, roles[whole] // 2)
    elif whole in roles and part in roles:
        roles.setdefault(rest, roles[whole] - roles[part])
    elif part in roles and rest in roles:
        roles.setdefault(whole, roles[part] + roles[rest])
    known = all(role in roles for role in (whole, part, rest))
    return [f"the counts break {rule}"] if known and roles[whole] != roles[part] + roles[rest] else []


def match_steps(text: str, lang: str) -> tuple[int, dict[str, list[tuple[int, list[tuple[str, Any]]]]]]:
    """Match a story's sentences with the plots' steps; returns how many pieces it has, and for each plot (step, roles)."""
    words, rules = surface_words(lang), reading_rules(lang)
    ends = re.compile(r"[.!?。！？][\"”]?")
    found: dict[str, list[tuple[int, list[tuple[str, Any]]]]] = {}
    position, n = 0, 0
    while position < len(text):
        n += 1
        matches = [(rule, hit) for rule in rules if (hit := rule.pattern.match(text, position))]
        longest = max((hit.end() for _, hit in matches), default=position)
        for rule, hit in matches:
            if hit.end() == longest:
                said = zip(rule.groups, hit.groups())
                values = [(role, words[kind][word]) for (role, kind), word in said if role]
                found.setdefault(rule.plot, []).append((rule.step, values))
        if longest == position:  # an unknown sentence: go on behind its end
            end = ends.search(text, position)
            longest = end.end() if end else len(text)
        position = longest
        while position < len(text) and text[position] == " ":
            position += 1
    return n, found


@dataclass(frozen=True, kw_only=True)
class StoryScore:
    """What reading a story back found. Chapter 01.

    `plot` is the plot that explains most sentences, `roles` what its slots hold, `n_sentences` how many sentences there are,
    `n_known` how many of them are of that plot, `clashes` every contradiction: a name that changes, a thing that becomes
    another, a count that does not add up, a step told out of order.
    """

    plot: str | None
    roles: dict[str, Any]
    n_sentences: int
    n_known: int
    clashes: tuple[str, ...]

    @property
    def consistent(self) -> bool:
        """Every sentence belongs to one plot and nothing contradicts."""
        return 0 < self.n_sentences == self.n_known and not self.clashes


def score_story(text: str, lang: str) -> StoryScore:
    """Read a story back: the plot, who and what fills its roles, and what contradicts.

    Args:
        text: a story, such as a model's sample; questions after it are left out.
        lang: "en" or "zh".
    """
    story = re.split(r"\n", text.strip(), maxsplit=1)[0]
    n, found = match_steps(story, lang)
    if not found:
        return StoryScore(plot=None, roles={}, n_sentences=n, n_known=0, clashes=())
    plot = max(found, key=lambda name: len(found[name]))
    roles: dict[str, Any] = {}
    clashes: list[str] = []
    for _, values in found[plot]:
        for role, value in values:
            if roles.setdefault(role, value) != value:
                clashes.append(f"{role}: {roles[role]} becomes {value}")
    steps = [step for step, _ in found[plot]]
    if steps != sorted(set(steps)):
        clashes.append("a step is told twice or out of order")
    people = [roles[role] for role in ("a", "b", "d") if role in roles]
    if len(set(people)) < len(people):
        clashes.append("one name plays two roles")
    clashes += complete_counts(plot, roles)
    return StoryScore(plot=plot, roles=roles, n_sentences=n, n_known=len(found[plot]), clashes=tuple(clashes))
