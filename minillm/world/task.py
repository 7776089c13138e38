"""What a writer gets, and what it gives."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from minillm.corpus import Dice, Page, split_of
from minillm.world.people import Person, people_known

T = TypeVar("T")

PARTS = (
    "stories",
    "facts",
    "arithmetic",
    "reasoning",
    "knowledge",
    "length",
    "dialogue",
    "preference",
    "parallel",
)


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What a corpus is made of. Chapter 01.

    The shares of the parts are in documents and need not add up to one; a part with share 0 does not appear.

    Attributes:
        n_people: how many invented people the facts are about.
        chinese: share of Chinese among the documents that are in a language.
        max_digits: sums have operands of up to so many digits.
        max_length: the length tasks (copy, reverse, passkey, moves) have up to so many steps.
        defects: share of documents with a planted defect, at most 0.5.
    """

    seed: int = 0
    n_people: int = 40
    chinese: float = 0.5
    stories: float = 0.50
    facts: float = 0.25
    arithmetic: float = 0.25
    reasoning: float = 0.0
    knowledge: float = 0.0
    length: float = 0.0
    dialogue: float = 0.0
    preference: float = 0.0
    parallel: float = 0.0
    max_digits: int = 3
    max_length: int = 16
    defects: float = 0.0

    def __post_init__(self) -> None:
        for name in (*PARTS, "chinese", "defects"):
            highest = 0.5 if name == "defects" else 1.0
            if not 0 <= getattr(self, name) <= highest:
                raise ValueError(f"{name}={getattr(self, name)} must be a share between 0 and {highest:g}")
        for name, least in (("n_people", 10), ("max_digits", 2), ("max_length", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if not any(getattr(self, part) for part in PARTS):
            raise ValueError("every part has share 0; give one of " + ", ".join(PARTS) + " a share")

    @cached_property
    def shares(self) -> tuple[tuple[float, str], ...]:
        """(share, part) of the parts that appear, adding up to one."""
        total = sum(getattr(self, part) for part in PARTS)
        return tuple((getattr(self, part) / total, part) for part in PARTS if getattr(self, part))


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a writer is asked for. `length` is a number of digits or steps, or None for the configuration's range."""

    config: CorpusConfig
    r: Dice
    lang: str
    split: str
    length: int | None = None

    @property
    def people(self) -> tuple[Person, ...]:
        """Everybody known in the task's language."""
        return people_known(self.config.seed, self.config.n_people, self.lang)

    def draw(self, make: Callable[[Dice], T]) -> T:
        """Draw meanings until one belongs to the task's split."""
        for _ in range(100_000):
            meaning = make(self.r)
            if split_of(meaning) == self.split:
                return meaning
        raise ValueError(
            f"no meaning of the split {self.split!r} was found: choose 'train' or 'heldout', or a larger length"
        )


Draft = tuple[Page, str, dict[str, Any]]  # a page, its language, its truth
