"""The words of the world: people, places, things, in two languages. They stand in `data/lexicon.toml`."""

from dataclasses import dataclass

from minillm.world.tables import read_toml

_LEXICON = read_toml("lexicon.toml")

# Each a table of English to Chinese.
NAMES: dict[str, str] = _LEXICON["names"]
PLACES: dict[str, str] = _LEXICON["places"]
HOLDERS: dict[str, str] = _LEXICON["holders"]
COLORS: dict[str, str] = _LEXICON["colors"]
ANIMALS: dict[str, str] = _LEXICON["animals"]
MONTHS: dict[str, str] = _LEXICON["months"]
WEEKDAYS: dict[str, str] = _LEXICON["weekdays"]
SYLLABLES: dict[str, str] = _LEXICON["syllables"]
PET_MEASURES: dict[str, str] = _LEXICON["pet_measures"]  # the others: 只

NUMBERS = {"en": list(_LEXICON["numbers"]), "zh": list(_LEXICON["numbers"].values())}


@dataclass(frozen=True, slots=True)
class Noun:
    """A thing that can be counted: plural, Chinese, measure word, and the class of things it belongs to."""

    one: str
    many: str
    zh: str
    measure: str
    family: str


ITEMS = {
    one: Noun(one, many, zh, measure, family)
    for family, table in _LEXICON["items"].items()
    for one, (many, zh, measure) in table.items()
}

FAMILIES = {family: tuple(table) for family, table in _LEXICON["items"].items()}

# What there is to know about a person: for each attribute the values it may have, in both languages.
ATTRIBUTES: dict[str, dict[str, str]] = {
    "year": {str(year): str(year) for year in range(1950, 2000)},
    "city": _LEXICON["cities"],
    "job": _LEXICON["jobs"],
    "food": _LEXICON["foods"],
    "hobby": _LEXICON["hobbies"],
    "pet": _LEXICON["pets"],
}


def article(noun: str) -> str:
    """`noun` with its indefinite article: "an apple", "a red kite"."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def count_phrase(n: int, item: str, lang: str) -> str:
    """A number of things: "three kites", "三只风筝". Chinese counts with the noun's measure word."""
    noun = ITEMS[item]
    if lang == "en":
        return f"{NUMBERS['en'][n]} {noun.one if n == 1 else noun.many}"
    return NUMBERS["zh"][n] + noun.measure + noun.zh
