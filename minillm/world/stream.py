"""The stream of documents: clean ones, and those with planted defects."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from minillm.corpus import Dice, Document, dice
from minillm.world.defects import (
    plant_canary,
    plant_duplicate,
    plant_encoding,
    plant_html,
    plant_leak,
    plant_machine,
    plant_near_duplicate,
    plant_pii,
    plant_toxic,
    plant_traditional,
)
from minillm.world.documents import clean_document
from minillm.world.task import CorpusConfig


def document(config: CorpusConfig, index: int, *, split: str = "train") -> Document:
    """Document number `index` of a corpus: a function of these three and of nothing else, so any part can be made alone.

    Args:
        index: from 0 on, without end.
        split: "train", or "heldout" for documents whose meanings no training document has.
    """
    if config.defects and split == "train":
        ordinal = int(index * config.defects)
        if int((index + 1) * config.defects) > ordinal:
            return plant_defect(config, index, ordinal)
    return clean_document(config, index, split)


def documents(
    config: CorpusConfig, *, n_documents: int | None = None, split: str = "train", start: int = 0
) -> Iterator[Document]:
    """The documents of a corpus from number `start` on, without end or `n_documents` of them."""
    numbers = itertools.count(start) if n_documents is None else range(start, start + n_documents)
    return (document(config, index, split=split) for index in numbers)


DEFECTS: dict[str, Callable[[CorpusConfig, int, Dice, int], tuple[str, str, dict[str, Any]]]] = {
    "duplicate": plant_duplicate,
    "near_duplicate": plant_near_duplicate,
    "html": plant_html,
    "pii": plant_pii,
    "toxic": plant_toxic,
    "machine": plant_machine,
    "encoding": plant_encoding,
    "traditional": plant_traditional,
    "leak": plant_leak,
    "canary": plant_canary,
}


def plant_defect(config: CorpusConfig, index: int, ordinal: int) -> Document:
    """Document number `index`, which is the corpus's defect number `ordinal`; kinds of defect take turns."""
    names = tuple(DEFECTS)
    name, r = names[ordinal % len(names)], dice(config.seed, "defect", index)
    text, lang, truth = DEFECTS[name](config, index, r, ordinal // len(names))
    return Document(text, lang, "defect", "train", {"task": name, "answers": [], "defect": name, **truth})
