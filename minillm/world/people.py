"""Invented people and facts about them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from minillm.corpus import dice, pick, pick_some
from minillm.world.lexicon import ATTRIBUTES, PET_MEASURES, SYLLABLES, article
from minillm.world.tables import read_records


def parse_facts(records: list[list[str]]) -> dict[str, dict[str, list[str]]]:
    """For each attribute, the statements ("en", "zh") and the questions ("ask_en", "ask_zh")."""
    table = {}
    for says, asks in records:
        name, en, zh = says.split(" | ")
        ask_en, ask_zh = asks.split(" | ")
        table[name] = {"en": en.split(" / "), "zh": zh.split(" / "), "ask_en": [ask_en], "ask_zh": [ask_zh]}
    return table


FACTS = parse_facts(read_records("facts.txt"))


@dataclass(frozen=True, kw_only=True)
class Person:
    """An invented person: one set of facts under an English and a Chinese name. Chapter 01.

    `langs` says in which languages the training text knows this person; `questioned` whether it asks about this person,
    or only tells. The facts are keys of `ATTRIBUTES`.
    """

    index: int
    name: str
    name_zh: str
    facts: Mapping[str, str]
    langs: tuple[str, ...]
    questioned: bool

    def called(self, lang: str) -> str:
        """The person's name in a language."""
        return self.name if lang == "en" else self.name_zh

    def value(self, attribute: str, lang: str) -> str:
        """A fact in a language."""
        key = self.facts[attribute]
        return key if lang == "en" else ATTRIBUTES[attribute][key]

    def say(self, template: str, attribute: str, lang: str) -> str:
        """A statement or question about a fact, from one of the templates of `FACTS`."""
        key, value = self.facts[attribute], self.value(attribute, lang)
        measured = PET_MEASURES.get(key, "只") + value
        return template.format(n=self.called(lang), v=value, one=article(key), mv=measured)


@lru_cache(maxsize=8)
def invent_people(seed: int, n: int) -> tuple[Person, ...]:
    """`n` people with different names.

    Of every five, three are known in both languages, one in English only and one in Chinese only. Of every ten, training
    asks about five (`questioned`); the others appear in biographies only.

    Raises:
        ValueError: more people than names can be made for.
    """
    syllables = list(SYLLABLES)
    n_names = len(syllables) ** 2
    if not 1 <= n <= n_names**2:
        raise ValueError(f"n_people={n} must be between 1 and {n_names**2}, the number of different names")
    r = dice(seed, "people")
    first, last = pick_some(r, range(n_names), n_names), pick_some(r, range(n_names), n_names)
    people = []
    for i in range(n):
        codes = first[i % n_names], last[(i + i // n_names) % n_names]
        parts = [[syllables[code // len(syllables)], syllables[code % len(syllables)]] for code in codes]
        people.append(
            Person(
                index=i,
                name=" ".join("".join(part).capitalize() for part in parts),
                name_zh="·".join("".join(SYLLABLES[syllable] for syllable in part) for part in parts),
                facts={attribute: pick(r, tuple(table)) for attribute, table in ATTRIBUTES.items()},
                langs={3: ("en",), 4: ("zh",)}.get(i % 5, ("en", "zh")),
                questioned=i // 5 % 2 == 0,
            )
        )
    return tuple(people)


@lru_cache(maxsize=64)
def people_known(seed: int, n: int, lang: str, questioned: bool | None = None) -> tuple[Person, ...]:
    """The people whom the text of a language knows: all of them, those it asks about (True), or those it does not."""
    return tuple(
        person
        for person in invent_people(seed, n)
        if lang in person.langs and questioned in (None, person.questioned)
    )
