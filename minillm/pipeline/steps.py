"""The steps of `minillm clean`: the steps of chapters 02 to 06 are their own settings, and a recipe is a set of them."""

# A step of a chapter stands here as it is. Where a name, a word or a file must first become a function, or none, there is a
# `…Choice` in its place: plain settings, and `step()`, which makes the chapter's step. Every default is the chapter's own.

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from minillm.corpus import Document
from minillm.dedup import Decontaminate, ExactDuplicates, NearDuplicates, RepeatedSentences
from minillm.detect import MachineText
from minillm.extract import ExtractText, RepairEncoding, extract_density
from minillm.filter import RULES, SHORT_RULES, Bound, Heuristics, Language, Length, identify_ngram
from minillm.harm import RedactPII, Span, Toxicity, find_pii
from minillm.pipeline.sources import read_sources
from minillm.readers.files import ReadStats
from minillm.vendors.perspective import PerspectiveClient
from minillm.vendors.presidio import PresidioFinder
from minillm.vendors.text import (
    LoadedDetector,
    extract_justext,
    extract_trafilatura,
    identify_py3langid,
    profanity_score,
)

EXTRACTORS: dict[str, Callable[[str], str]] = {
    "density": extract_density,
    "trafilatura": extract_trafilatura,
    "justext": extract_justext,
}
IDENTIFIERS: dict[str, Callable[[str], tuple[str, float]]] = {
    "ngram": identify_ngram,
    "py3langid": identify_py3langid,
}
FINDERS: dict[str, Callable[[str], list[Span]]] = {"own": find_pii, "presidio": PresidioFinder()}
BOUNDS: dict[str, tuple[Bound, ...]] = {"web": RULES, "short": SHORT_RULES}
SCORERS: dict[str, Callable[[str], float] | None] = {
    "own": None,  # chapter 05's classifier, trained at first use
    "profanity": profanity_score,
    "perspective": None,  # Google's service, with a key
}

T = TypeVar("T")


def _named(table: Mapping[str, T], name: str, setting: str) -> T:
    if name not in table:
        raise ValueError(f"{setting}={name!r} is unknown; there are {', '.join(table)}")
    return table[name]


@dataclass(frozen=True, kw_only=True)
class ExtractChoice:
    """Web pages become their main text; what is no page stays as it is."""

    engine: Literal["density", "trafilatura", "justext"] = "density"
    """density is built from nothing in chapter 02; the others are the article's."""

    def __post_init__(self) -> None:
        _named(EXTRACTORS, self.engine, "extract.engine")

    def step(self) -> ExtractText:
        """Chapter 02's step."""
        return ExtractText(extract=EXTRACTORS[self.engine])


@dataclass(frozen=True, kw_only=True)
class LanguageChoice:
    """Documents in other languages go."""

    allowed: tuple[str, ...] = Language.allowed
    """Codes of languages; und is a text without letters, such as a sum."""
    variants: tuple[str, ...] = tuple(filter(None, Language.variants))
    """Kinds of Chinese: leave out traditional to have only simplified."""
    engine: Literal["ngram", "py3langid"] = "ngram"
    """ngram is built in chapter 03 and knows sixteen languages; py3langid knows 97."""
    min_confidence: float = Language.min_confidence
    """Below it a language is not believed, and the document stays."""

    def __post_init__(self) -> None:
        _named(IDENTIFIERS, self.engine, "language.engine")

    def step(self) -> Language:
        """Chapter 03's step; where no character tells the kind of Chinese, the document stays."""
        return Language(
            allowed=self.allowed,
            variants=(*self.variants, ""),
            identify=IDENTIFIERS[self.engine],
            min_confidence=self.min_confidence,
        )


@dataclass(frozen=True, kw_only=True)
class HeuristicsChoice:
    """The rules of C4, Gopher and FineWeb about symbols, repetition, lines and stop words."""

    rules: Literal["web", "short"] = "web"
    """web: all; short: those that hold for lists, sums and dialogues too."""
    limits: tuple[str, ...] = ()
    """Other bounds: `hashes=0..0.2` for a measure of chapter 03. A bound may be left out: `sentences=1..`."""

    def __post_init__(self) -> None:
        self.step()

    def step(self) -> Heuristics:
        """Chapter 03's step."""
        rules = _named(BOUNDS, self.rules, "heuristics.rules")
        for limit in self.limits:
            bound = _bound(limit)
            rules = (*(rule for rule in rules if rule.measure != bound.measure), bound)
        return Heuristics(rules=rules)


def _bound(limit: str) -> Bound:
    """A rule from words such as `sentences=1..7`."""
    measure, _, bounds = limit.partition("=")
    least, dots, most = bounds.partition("..")
    known = [rule for rule in RULES if rule.measure == measure]
    numbers = (-math.inf, math.inf)
    try:
        numbers = (float(least or "-inf"), float(most or "inf"))
    except ValueError:
        dots = ""
    if not known or not dots:
        names = ", ".join(dict.fromkeys(rule.measure for rule in RULES))
        raise ValueError(f"heuristics.limits: {limit!r} is no MEASURE=LEAST..MOST; the measures are {names}")
    least_most = {"least": numbers[0], "most": numbers[1]}
    return dataclasses.replace(known[0], **least_most, source="a limit that was given")


@dataclass(frozen=True, kw_only=True)
class SentencesChoice:
    """A sentence that the corpus has said often enough is taken out of later documents."""

    max_copies: int = RepeatedSentences.max_copies
    """So many stay; 0 leaves the step out."""
    min_chars: int = RepeatedSentences.min_chars
    """Shorter sentences are natural to repeat."""

    def __post_init__(self) -> None:
        self.step()

    def step(self) -> RepeatedSentences | None:
        """Chapter 06's step, or none."""
        if not self.max_copies:
            return None
        return RepeatedSentences(max_copies=self.max_copies, min_chars=self.min_chars)


@dataclass(frozen=True, kw_only=True)
class DecontaminateChoice:
    """Documents that share a run of words with a benchmark go."""

    against: tuple[str, ...] = ()
    """Files with the benchmark's items; without one the step is left out."""
    n: int = Decontaminate.n
    """So many words in a row are a leak; 13 is GPT-3's."""
    n_zh: int = Decontaminate.n_zh
    """The same for Chinese, in characters; 20 of them say what 13 words say."""
    min_n: int = Decontaminate.min_n
    """Shorter items are left out: what they say is said everywhere."""
    on_hit: Literal["drop", "cut"] = "drop"
    """Drop the document, or cut the run out with what is around it."""
    max_documents: int = 10
    """A run that more different documents have is said everywhere, and is no leak; 10 is GPT-3's, 0 has no such rule."""
    sample: int = 20_000
    """So many documents of the sources are looked through for that."""

    def step(self, sources: Sequence[str] = ()) -> Decontaminate | None:
        """Chapter 06's step, which has read the benchmark and knows what is common in the sources; or none."""
        if not self.against:
            return None
        step = Decontaminate.from_files(
            list(self.against), n=self.n, n_zh=self.n_zh, min_n=self.min_n, on_hit=self.on_hit
        )
        if self.max_documents and sources:
            texts = islice(_different(read_sources(sources, "skip", ReadStats())), self.sample)
            step = step.without_common(texts, self.max_documents)
        return step


def _different(documents: Iterable[Document]) -> Iterator[str]:
    """Texts, each once."""
    seen = set()
    for document in documents:
        digest = hashlib.blake2b(document.text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            yield document.text


@dataclass(frozen=True, kw_only=True)
class MachineChoice:
    """What a machine seems to have made goes. The detector of chapter 04 knows the project's own corpus, not the world."""

    detector: str = ""
    """A sequence classifier for transformers, a folder or a name on the hub; empty for chapter 04's."""
    label: int = 1
    """The number of its label that means "machine"."""
    threshold: float = MachineText.threshold
    """The probability from which a document goes."""
    min_words: int = MachineText.min_words
    """Documents with fewer words are not judged."""

    def step(self) -> MachineText:
        """Chapter 04's step."""
        model = LoadedDetector(self.detector, self.label) if self.detector else None
        return MachineText(model=model, threshold=self.threshold, min_words=self.min_words)


@dataclass(frozen=True, kw_only=True)
class PiiChoice:
    """E-mail addresses, phone numbers, cards, identity numbers and IP addresses become <EMAIL>, <PHONE> …"""

    engine: Literal["own", "presidio"] = "own"
    """own is built in chapter 05; presidio is the article's."""
    max_spans: int = 0
    """A document with more of them is a list of addresses, and goes; 0 keeps it."""

    def __post_init__(self) -> None:
        _named(FINDERS, self.engine, "pii.engine")

    def step(self) -> RedactPII:
        """Chapter 05's step."""
        return RedactPII(find=FINDERS[self.engine], max_spans=self.max_spans or None)


@dataclass(frozen=True, kw_only=True)
class ToxicityChoice:
    """Documents with a toxic sentence go. The classifier of chapter 05 knows the insults of a made-up world only."""

    scorer: Literal["own", "profanity", "perspective"] = "own"
    """profanity is alt-profanity-check's model for English; perspective asks Google's service."""
    threshold: float = Toxicity.threshold
    """The probability from which a document goes."""
    key_file: Path | None = None
    """The file that holds the key for perspective."""
    queries_per_second: float = 1.0
    """The quota of that key, for each worker."""

    def __post_init__(self) -> None:
        _named(SCORERS, self.scorer, "toxicity.scorer")
        if self.scorer == "perspective" and self.key_file is None:
            raise ValueError(
                "toxicity.scorer=perspective needs a key: put it into a file, and name that as toxicity.key_file"
            )

    def step(self) -> Toxicity:
        """Chapter 05's step."""
        scorer = SCORERS[self.scorer]
        if self.scorer == "perspective" and self.key_file is not None:
            key = self.key_file.read_text(encoding="utf-8").strip()
            scorer = PerspectiveClient(key, queries_per_second=self.queries_per_second)
        return Toxicity(scorer=scorer, threshold=self.threshold)


@dataclass(frozen=True, kw_only=True)
class CleanSteps:
    """The steps of a cleaning run with their settings, in the order in which they are taken: that of the fields.

    Texts are repaired before they are judged. Leaks are looked for after copies went: one that was copied often looks like a
    common phrase. The steps that ask a model are the dearest, and see only what is left.
    """

    extract: ExtractChoice = ExtractChoice()
    repair: RepairEncoding = field(default_factory=RepairEncoding)
    language: LanguageChoice = LanguageChoice()
    heuristics: HeuristicsChoice = HeuristicsChoice()
    length: Length = field(default_factory=Length)
    exact: ExactDuplicates = field(default_factory=ExactDuplicates)
    near: NearDuplicates = field(default_factory=NearDuplicates)
    sentences: SentencesChoice = SentencesChoice()
    decontaminate: DecontaminateChoice = DecontaminateChoice()
    machine: MachineChoice = MachineChoice()
    pii: PiiChoice = PiiChoice()
    toxicity: ToxicityChoice = ToxicityChoice()
    skip: tuple[str, ...] = ()
    """Steps to leave out: extract, repair, language, heuristics, length, exact, near, sentences, decontaminate, machine, pii,
    toxicity."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.skip if name not in ORDER]:
            raise ValueError(f"skip: no step {unknown[0]!r}; there are {', '.join(ORDER)}")


ORDER = tuple(f.name for f in dataclasses.fields(CleanSteps) if f.name != "skip")

CLEAN_RECIPES = {
    "web": CleanSteps(),
    # Stories, facts and sums from templates: short by nature, and their sentences repeat by nature.
    "own": CleanSteps(
        language=LanguageChoice(variants=("simplified", "both")),
        heuristics=HeuristicsChoice(rules="short"),
        length=Length(min_tokens=5),
        sentences=SentencesChoice(max_copies=0),
        decontaminate=DecontaminateChoice(n=30, n_zh=40),  # templates share runs of twenty words
    ),
}


def clean_recipe(name: str) -> CleanSteps:
    """The steps of a recipe by name: "web" for text from anywhere, "own" for the project's own corpus.

    Raises:
        ValueError: there is no such recipe.
    """
    if name not in CLEAN_RECIPES:
        raise ValueError(f"no recipe {name!r}; there are {', '.join(CLEAN_RECIPES)}")
    return CLEAN_RECIPES[name]


def default_steps(settings: CleanSteps, sources: Sequence[str] = ()) -> list[Any]:
    """The steps in order, ready for `clean`, each under the name of its field.

    Args:
        settings: the steps and choices.
        sources: what will be cleaned, for `decontaminate.max_documents`.

    Raises:
        ValueError: a setting is wrong.
        CorpusError: a benchmark's file cannot be read.
    """
    steps: list[Any] = []
    for name in ORDER:
        step = getattr(settings, name)
        if name in settings.skip:
            continue
        if isinstance(step, DecontaminateChoice):
            step = step.step(sources)
        elif hasattr(step, "step"):
            step = step.step()
        if step is not None:
            steps.append(step if step.name == name else dataclasses.replace(step, name=name))
    return steps
