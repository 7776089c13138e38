"""The laws of a cleaning step, which every chapter of the text and every optional package holds its own steps to."""

import json
import pickle
import re
import time

from hypothesis import strategies as st

from minillm.corpus import Document
from minillm.extract import Drop, Step, WellFormed
from minillm.world.stream import documents
from minillm.world.task import CorpusConfig

DOCUMENTS = list(documents(CorpusConfig(seed=41, defects=0.4), n_documents=800))
CLEAN = [d for d in DOCUMENTS if "defect" not in d.meta]
ANY_TEXT = st.text(st.characters(), max_size=300)  # lone surrogates and NUL included


def with_defect(name):
    return [d for d in DOCUMENTS if d.meta.get("defect") == name]


def is_a_step(step):
    """It can be pickled, changes no input, and has nothing to add to its own output."""
    assert isinstance(step, Step)
    twin = pickle.loads(pickle.dumps(step))
    some = DOCUMENTS[:100]
    before = [(d.text, json.dumps(d.meta, sort_keys=True)) for d in some]
    for document in some:
        out, again = step(document), twin(document)
        assert type(out) is type(again)
        if isinstance(out, Drop):
            assert out == again
            assert re.fullmatch("[a-z0-9_]+", out.reason)
            assert out.detail
        else:
            assert out.text == again.text
            assert (out.lang, out.kind, out.split) == (document.lang, document.kind, document.split)
            once_more = step(out)
            assert isinstance(once_more, Document)
            assert once_more.text == out.text
    assert before == [(d.text, json.dumps(d.meta, sort_keys=True)) for d in some], "the input was changed"


def survives(steps, text):
    """No step fails on any text once it is well formed."""
    document = WellFormed()(Document(text))
    if isinstance(document, Drop):
        return
    document.text.encode("utf-8")
    assert "\0" not in document.text
    for step in steps:
        step(document)


HOSTILE = [
    "<",
    "<a ",
    '<a ">"',
    "<!--",
    "<script>",
    "<div><p>x",
    "a@a.",
    "1-",
    "1.",
    "1:",
    "(123)",
    "Ã©",
    "汉",
    "\n",
    "! ",
    "a b ",
]


def keeps_its_pace(step):
    """Its time grows no faster than hostile text does."""
    step(Document("warm up"))
    for piece in HOSTILE:
        times = []
        for size in (8_000, 64_000):
            document = Document(piece * (size // len(piece)))
            start = time.process_time()
            step(document)
            times.append(time.process_time() - start)
        # Eight times the text; quadratic time would be 64 times as long.
        assert times[1] < 30 * max(times[0], 0.02), f"{piece!r}: {times}"
