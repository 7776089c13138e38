"""Small steps for the tests of the pipeline, in a module of their own so that worker processes can import them.

python tests/clean_steps.py SOURCE OUT WORKERS STEPS    # leads SOURCE through STEPS, as the tests that kill it do
"""

import hashlib
import os
import sys
import time
from dataclasses import dataclass, replace

import numpy as np

from minillm.extract import Drop


@dataclass(frozen=True)
class AtLeast:
    """Drops short texts."""

    n: int = 12
    name: str = "at_least"

    def __call__(self, document):
        if len(document.text) < self.n:
            return Drop("short", f"{len(document.text)} characters, at least {self.n}")
        return document


@dataclass(frozen=True)
class Squeeze:
    """Changes texts: no letter e."""

    name: str = "squeeze"

    def __call__(self, document):
        return replace(document, text=document.text.replace("e", ""))


@dataclass(frozen=True)
class Same:
    """A collection step: the first of equal texts stays."""

    name: str = "same"
    head: int = 0

    def sketch(self, document):
        text = document.text[: self.head or None]
        return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), np.uint64)

    def resolve(self, sketches):
        first = {}
        found = [first.setdefault(int(sketch[0]), i) for i, sketch in enumerate(sketches)]
        return [None if i == original else original for i, original in enumerate(found)]

    def apply(self, document, decision):
        return Drop("same", f"as document {decision}")


@dataclass(frozen=True)
class Mark:
    """A collection step that changes: each document learns how many came before, and uneven sketches survive the trip."""

    name: str = "mark"

    def sketch(self, document):
        return np.arange(len(document.text) % 4, dtype=np.uint16)

    def resolve(self, sketches):
        total, totals = 0, []
        for sketch in sketches:
            totals.append([total, int(sketch.sum())])
            total += len(sketch)
        return totals

    def apply(self, document, decision):
        return replace(document, meta={**document.meta, "before": list(decision)})


@dataclass(frozen=True)
class Fails:
    """Fails on texts with a word in them; or hangs, or ends its process."""

    how: str = "raise"
    word: str = "grenade"
    name: str = "fails"

    def __call__(self, document):
        if self.word in document.text:
            if self.how == "raise":
                raise RecursionError("too deep")
            if self.how == "hang":
                time.sleep(60)
            os._exit(9)
        return document


@dataclass(frozen=True)
class Slow:
    """Takes its time, so that a test can interrupt it."""

    seconds: float = 0.002
    name: str = "slow"

    def __call__(self, document):
        time.sleep(self.seconds)
        return document


QUICK = (AtLeast(), Squeeze(), Same(), Mark(), AtLeast(40, "at_least_40"), Same("same_head", head=30))
STEPS = (*QUICK[:3], Slow(), *QUICK[3:])

if __name__ == "__main__":
    import clean_steps  # not the classes of __main__: workers import this module by its name

    from minillm.pipeline.run import clean

    source, out, workers, steps = sys.argv[1:]
    clean(
        source,
        getattr(clean_steps, steps),
        out,
        workers=int(workers),
        chunk_documents=100,
        keep_dropped=True,
        report=False,
    )
