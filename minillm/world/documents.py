"""Documents of the world, their exams, and the plain text of a story."""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

from minillm.corpus import Dice, Document, dice, pick_weighted
from minillm.world.dialogue import write_chat, write_preference, write_request, write_talk
from minillm.world.reasoning import (
    write_boolean,
    write_choice,
    write_counting,
    write_date,
    write_ordering,
    write_statement,
    write_tracking,
)
from minillm.world.task import CorpusConfig, Draft, Task
from minillm.world.writers import (
    write_biography,
    write_crossing,
    write_graph,
    write_letters,
    write_moves,
    write_parallel,
    write_passkey,
    write_problem,
    write_recall,
    write_story,
    write_sums,
)

WRITERS: dict[str, dict[str, tuple[float, Callable[[Task], Draft]]]] = {
    "stories": {"story": (1.0, write_story)},
    "facts": {
        "biography": (0.6, write_biography),
        "recall": (0.4, write_recall),
        "crossing": (0.0, write_crossing),
    },
    "arithmetic": {
        "scratchpad": (0.78, partial(write_sums, form="scratchpad")),
        "plain": (0.04, partial(write_sums, form="plain")),
        "reversed": (0.04, partial(write_sums, form="reversed")),
        "problem": (0.10, write_problem),
        "graph": (0.04, write_graph),
    },
    "reasoning": {
        "boolean": (1.0, write_boolean),
        "ordering": (1.0, write_ordering),
        "counting": (1.0, write_counting),
        "date": (1.0, write_date),
        "tracking": (1.0, write_tracking),
    },
    "knowledge": {"statement": (1.0, write_statement), "choice": (1.0, write_choice)},
    "length": {
        "copy": (1.0, partial(write_letters, backwards=False)),
        "reverse": (1.0, partial(write_letters, backwards=True)),
        "passkey": (1.0, write_passkey),
        "moves": (1.0, write_moves),
    },
    "dialogue": {
        "chat": (2.0, write_chat),
        "talk": (2.0, write_talk),
        "harmful": (1.0, partial(write_request, harmful=True)),
        "lookalike": (1.0, partial(write_request, harmful=False)),
    },
    "preference": {"pair": (1.0, write_preference)},
    "parallel": {"story": (1.0, write_parallel)},
}

ONLY_TRAINED = {
    "facts.biography",
    "knowledge.statement",
}  # what is told is told in training; held out is what is asked


@lru_cache(maxsize=64)
def tasks_of(part: str, split: str) -> tuple[tuple[float, str], ...]:
    """(weight, name) of the tasks of a part that have documents on a side of the split."""
    return tuple(
        (weight, name)
        for name, (weight, _) in WRITERS[part].items()
        if split == "train" or f"{part}.{name}" not in ONLY_TRAINED
    )


def write_document(task: Task, kind: str) -> Document:
    """One document of a part ("facts") or of one of its tasks ("facts.recall").

    Raises:
        ValueError: there is no such kind; the message lists them.
    """
    part, _, name = kind.partition(".")
    tasks = WRITERS.get(part, {})
    if not tasks or (name and name not in tasks):
        known = ", ".join(f"{part}.{name}" for part, tasks in WRITERS.items() for name in tasks)
        raise ValueError(
            f"kind {kind!r} does not exist; choose a part ({', '.join(WRITERS)}) or one of its tasks ({known})"
        )
    name = name or pick_weighted(task.r, tasks_of(part, task.split))
    page, lang, truth = tasks[name][1](task)
    return Document(page.text, lang, part, task.split, {"task": name, "answers": page.answers, **truth})


def clean_document(config: CorpusConfig, index: int, split: str = "train") -> Document:
    """Document number `index` as it is without defects."""
    r = dice(config.seed, split, index)
    part = pick_weighted(r, config.shares)
    lang = "zh" if r() < config.chinese else "en"
    return write_document(Task(config=config, r=r, lang=lang, split=split), part)


def extract_answer(continuation: str) -> str:
    """The answer in a continuation: its first line, behind the last scratchpad bracket or equals sign, without full stop."""
    line = continuation.lstrip(" ").partition("\n")[0]
    return re.split(r"[\]=]", line)[-1].strip().rstrip(".。")


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt in the form of the training documents, and what they would continue it with. Chapter 01.

    `answer` is the bare answer; `meta["target"]` is the whole continuation, with its leading space and scratchpad.
    """

    prompt: str
    answer: str
    kind: str
    lang: str
    meta: dict[str, Any] = field(default_factory=dict)

    def grade(self, continuation: str) -> bool:
        """Does a model's continuation give the answer? Exact match of the first line's answer."""
        return extract_answer(continuation) == self.answer


def questions(
    config: CorpusConfig, kind: str, lang: str, split: str, n: int, *, length: int | None = None
) -> list[Question]:
    """At most `n` different questions: documents that are cut off before their first answer.

    Args:
        kind: a part ("stories") or a task ("arithmetic.scratchpad").
        lang: "en" or "zh", with which come also documents that have no language, such as sums; "und" for these alone.
        split: "heldout" for meanings that training never has; "train" for new texts from the meanings that it may have.
        n: how many; fewer come back where there are not so many different ones.
        length: digits of the operands, or steps of a length or reasoning task; None for the configuration's range.
    """
    if lang not in ("en", "zh", "und") or split not in ("train", "heldout"):
        raise ValueError(
            f"lang={lang!r}, split={split!r}: lang must be 'en', 'zh' or 'und', split 'train' or 'heldout'"
        )
    found: dict[str, Question] = {}
    newest = 0
    for index in itertools.count():
        if (
            len(found) >= n or index - newest > 30 * len(found) + 300
        ):  # by then an unseen one would have come, surely
            break
        r = dice(config.seed, "question", kind, lang, split, length, index)
        spoken = "en" if lang == "und" else lang
        made = write_document(Task(config=config, r=r, lang=spoken, split=split, length=length), kind)
        if made.lang not in (lang, "und") or not made.meta["answers"]:
            continue
        start, end, label = made.meta["answers"][0]
        prompt, target = made.text[:start], made.text[start:end]
        meta = {**made.meta, "label": label, "target": target}
        if prompt not in found:
            found[prompt], newest = Question(prompt, extract_answer(target), kind, made.lang, meta), index
    return list(found.values())


def story_text(config: CorpusConfig, r: Dice, lang: str | None = None) -> tuple[str, str]:
    """A clean story of the training split, and its language."""
    lang = lang or ("zh" if r() < config.chinese else "en")
    return write_document(Task(config=config, r=r, lang=lang, split="train"), "stories").text, lang
