"""What every cleaning step should find in the world's documents."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from minillm.base.files import text_key
from minillm.corpus import Document, shingles

# What the own corpus holds for a kind of step to find: planted, or found by `with_repetitions`.
EXPECTED: dict[str, Callable[[Document, Any], bool]] = {
    "ExtractText": lambda d, step: d.meta.get("defect") == "html",
    "RepairEncoding": lambda d, step: d.meta.get("defect") == "encoding",
    "Language": lambda d, step: d.meta.get("defect") == "traditional" and "traditional" not in step.variants,
    "MachineText": lambda d, step: d.meta.get("defect") == "machine",
    "RedactPII": lambda d, step: d.meta.get("defect") == "pii",
    "Toxicity": lambda d, step: d.meta.get("defect") == "toxic" and bool(d.meta.get("toxic")),
    "ExactDuplicates": lambda d, step: d.meta.get("defect") == "duplicate" or "same_as" in d.meta,
    # planted, or another telling of one life that is so similar
    "NearDuplicates": lambda d, step: d.meta.get("jaccard", 0.0) >= step.threshold,
    "Decontaminate": lambda d, step: d.meta.get("defect") == "leak",
}


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
