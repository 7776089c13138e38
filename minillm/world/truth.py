"""What is wrong with the world's documents, as far as it is known: planted defects, and what the world repeats by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from minillm.base.files import text_key
from minillm.corpus import Document, shingles


def has_defect(document: Document, kind: str) -> bool:
    """Whether a defect of this kind was planted; a look-alike that is no insult is no "toxic" one."""
    meta = document.meta
    return meta.get("defect") == kind and (kind != "toxic" or bool(meta.get("toxic")))


def is_repeated(document: Document) -> bool:
    """Whether an earlier document has the same text: planted, or found by `with_repetitions`."""
    return document.meta.get("defect") == "duplicate" or "same_as" in document.meta


def similarity(document: Document) -> float:
    """The Jaccard similarity to an earlier document: planted, or that of another telling of one life; 0 if none is known."""
    return document.meta.get("jaccard", 0.0)


def truth_of(document: Document) -> str:
    """What is known to be wrong with a document, for the report's table; "" for nothing, or nothing known."""
    meta, defect = document.meta, document.meta.get("defect", "")
    if defect == "near_duplicate":
        return f"near_duplicate {int(10 * meta.get('jaccard', 0)) / 10:.1f}"
    if defect == "toxic" and not meta.get("toxic"):
        return "toxic look-alike"
    if defect == "encoding":
        return f"encoding {meta.get('codec', '')}".strip()
    if not defect and "same_as" in meta:
        return "repeated by chance"
    if not defect and "retells" in meta:
        return f"retold {int(10 * meta['jaccard']) / 10:.1f}"
    return str(defect)


def with_repetitions(documents: Iterable[Document]) -> Iterator[Document]:
    """Number the own corpus's documents, and write into their meta where it repeats itself without having been told to.

    Short templates fall out the same twice: `same_as` is the number of the first document with that text. And there are
    few people, whose lives are told again in another order: `retells` is the number of the most similar earlier telling of
    the same life, `jaccard` the similarity of the two, as for planted near-duplicates. Likeness between stories of one plot
    is not looked for.
    """
    first: dict[str, int] = {}
    lives: dict[Any, list[tuple[int, np.ndarray]]] = {}
    for number, document in enumerate(documents):
        known: dict[str, Any] = {"number": number}
        earlier = first.setdefault(document.text, number)
        if earlier != number:
            known["same_as"] = earlier
        elif document.meta.get("task") == "biography":
            told = lives.setdefault((document.lang, *document.meta["people"]), [])
            mine = np.array(sorted({text_key(part) for part in shingles(document.text, 5)}))
            shared = [np.intersect1d(mine, other, assume_unique=True).size for _, other in told]
            similar = [(n / (mine.size + other.size - n), of) for n, (of, other) in zip(shared, told)]
            if similar:
                jaccard, of = max(similar)
                known |= {"retells": of, "jaccard": round(jaccard, 4)}
            told.append((number, mine))
        yield dataclasses.replace(document, meta={**document.meta, **known})
