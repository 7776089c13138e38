"""The steps of `minillm clean`, their settings and recipes."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minillm.corpus import Document
from minillm.extract import extract_density
from minillm.filter import identify_ngram
from minillm.pipeline.run import read_sources
from minillm.readers.files import ReadStats
from minillm.vendors.text import extract_justext, extract_trafilatura, identify_py3langid

if TYPE_CHECKING:
    pass

# The default pipeline


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """Web pages become their main text; what is no page stays as it is."""

    engine: Literal["density", "trafilatura", "justext"] = "density"
    """density is built from nothing in chapter 02; the others are the article's."""


@dataclass(frozen=True, kw_only=True)
class RepairOptions:
    """Wrong codecs are undone where nothing was lost; what stays garbled goes."""

    max_odd: float = 0.002
    """The highest share of lost characters and control codes."""
    min_plausible: float = 0.6
    """How far the characters beyond ASCII must look like a language, from 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class LanguageOptions:
    """Documents in other languages go."""

    allowed: tuple[str, ...] = ("en", "zh", "und")
    """Codes of languages; und is a text without letters, such as a sum."""
    variants: tuple[str, ...] = ("simplified", "traditional", "both")
    """Kinds of Chinese: leave out traditional to have only simplified."""
    engine: Literal["ngram", "py3langid"] = "ngram"
    """ngram is built in chapter 02 and knows eleven languages; py3langid knows 97."""
    min_confidence: float = 0.6
    """Below it a language is not believed, and the document stays."""


@dataclass(frozen=True, kw_only=True)
class HeuristicsOptions:
    """The rules of C4, Gopher and FineWeb about symbols, repetition, lines and stop words."""

    rules: Literal["web", "short"] = "web"
    """web: all; short: those that hold for lists, sums and dialogues too."""
    limits: tuple[str, ...] = ()
    """Other bounds: `hashes=0..0.2` for a measure of chapter 02. A bound may be left out: `sentences=1..`."""


@dataclass(frozen=True, kw_only=True)
class LengthOptions:
    """Short and very long documents go."""

    min_tokens: int = 100
    """In words and Chinese characters. 100 is the article's; chapter 02 measures what it costs."""
    max_tokens: int = 100_000
    """Gopher's."""


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """What a machine seems to have made goes. The detector of chapter 02 knows the project's own corpus, not the world."""

    detector: str = ""
    """A sequence classifier for transformers, a folder or a name on the hub; empty for chapter 02's."""
    label: int = 1
    """The number of its label that means "machine"."""
    threshold: float = 0.5
    """The probability from which a document goes."""
    min_words: int = 12
    """Documents with fewer words are not judged."""


@dataclass(frozen=True, kw_only=True)
class PiiOptions:
    """E-mail addresses, phone numbers, cards, identity numbers and IP addresses become [EMAIL], [PHONE] …"""

    engine: Literal["own", "presidio"] = "own"
    """own is built in chapter 02; presidio is the article's."""
    max_spans: int = 0
    """A document with more of them is a list of addresses, and goes; 0 keeps it."""


@dataclass(frozen=True, kw_only=True)
class ToxicityOptions:
    """Documents with a toxic sentence go. The classifier of chapter 02 knows the insults of a made-up world only."""

    scorer: Literal["own", "profanity", "perspective"] = "own"
    """profanity is alt-profanity-check's model for English; perspective asks Google's service."""
    threshold: float = 0.5
    """The probability from which a document goes."""
    key_file: Path | None = None
    """The file that holds the key for perspective."""
    queries_per_second: float = 1.0
    """The quota of that key, for each worker."""


@dataclass(frozen=True, kw_only=True)
class NearOptions:
    """Of documents that are nearly the same, the first stays: MinHash of chapter 06."""

    threshold: float = 0.8
    """The Jaccard similarity from which on two documents count as the same."""
    n_hashes: int = 256
    """A power of two. More: a better estimate, 2 bytes each a document."""
    shingle: int = 5
    """A shingle has so many characters or words."""
    unit: Literal["char", "word"] = "char"
    """char is fair to every language."""
    recall: float = 0.99
    """With what probability a pair at the threshold becomes a candidate."""


@dataclass(frozen=True, kw_only=True)
class SentencesOptions:
    """A sentence that the corpus has said often enough is taken out of later documents."""

    max_copies: int = 3
    """So many stay; 0 leaves the step out."""
    min_chars: int = 20
    """Shorter sentences are natural to repeat."""


@dataclass(frozen=True, kw_only=True)
class DecontaminateOptions:
    """Documents that share a run of words with a benchmark go."""

    against: tuple[str, ...] = ()
    """Files with the benchmark's items; without one the step is left out."""
    n: int = 13
    """So many words in a row are a leak; 13 is GPT-3's."""
    n_zh: int = 13
    """The same for Chinese, in characters."""
    min_n: int = 8
    """Shorter items are left out: what they say is said everywhere."""
    on_hit: Literal["drop", "cut"] = "drop"
    """Drop the document, or cut the run out with what is around it."""
    max_documents: int = 10
    """A run that more different documents have is said everywhere, and is no leak; 10 is GPT-3's, 0 has no such rule."""
    sample: int = 20_000
    """So many documents of the sources are looked through for that."""


@dataclass(frozen=True, kw_only=True)
class CleanConfig:
    """The settings of every step, in the order of the steps."""

    extract: ExtractOptions = ExtractOptions()
    repair: RepairOptions = RepairOptions()
    language: LanguageOptions = LanguageOptions()
    heuristics: HeuristicsOptions = HeuristicsOptions()
    length: LengthOptions = LengthOptions()
    machine: MachineOptions = MachineOptions()
    pii: PiiOptions = PiiOptions()
    toxicity: ToxicityOptions = ToxicityOptions()
    near: NearOptions = NearOptions()
    sentences: SentencesOptions = SentencesOptions()
    decontaminate: DecontaminateOptions = DecontaminateOptions()
    skip: tuple[str, ...] = ()
    """Steps to leave out: extract, repair, language, heuristics, length, machine, pii, toxicity, exact, near, sentences,
    decontaminate."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.skip if name not in ORDER]:
            raise ValueError(f"skip: no step {unknown[0]!r}; there are {', '.join(ORDER)}")


ORDER = (
    *("extract", "repair", "language", "heuristics", "length"),
    *("exact", "near", "sentences", "decontaminate"),
    *("machine", "pii", "toxicity"),
)

CLEAN_RECIPES = {
    "web": CleanConfig(),
    # Stories, facts and sums from templates: short by nature, and their sentences repeat by nature.
    "own": CleanConfig(
        language=LanguageOptions(variants=("simplified", "both")),
        heuristics=HeuristicsOptions(rules="short"),
        length=LengthOptions(min_tokens=5),
        decontaminate=DecontaminateOptions(
            n=30, n_zh=40
        ),  # templates share runs of twenty words; a leak is longer
        sentences=SentencesOptions(max_copies=0),
    ),
}


def clean_recipe(name: str) -> CleanConfig:
    """The settings of a recipe by name: "web" for text from anywhere, "own" for the project's own corpus.

    Raises:
        ValueError: there is no such recipe.
    """
    if name not in CLEAN_RECIPES:
        raise ValueError(f"no recipe {name!r}; there are {', '.join(CLEAN_RECIPES)}")
    return CLEAN_RECIPES[name]


class LoadedDetector:
    """A Hugging Face classifier as a detector that can be sent to a worker: each process loads it at first use."""

    def __init__(self, model: str, label: int) -> None:
        self.model, self.label = model, label
        self._detect: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "label": self.label, "_detect": None}

    def __call__(self, text: str) -> float:
        if self._detect is None:
            from minillm.vendors.text import load_huggingface_detector

            self._detect = load_huggingface_detector(self.model, self.label)
        return self._detect(text)


def _heuristics(options: HeuristicsOptions) -> Any:
    from minillm.filter import RULES, SHORT_RULES, Heuristics

    rules = RULES if options.rules == "web" else SHORT_RULES
    for limit in options.limits:
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
            raise ValueError(
                f"heuristics.limits: {limit!r} is no MEASURE=LEAST..MOST; the measures are {names}"
            )
        rule = dataclasses.replace(
            known[0], least=numbers[0], most=numbers[1], source="a limit that was given"
        )
        rules = (*(other for other in rules if other.measure != measure), rule)
    return Heuristics(rules=rules, name="heuristics")


def _toxicity(options: ToxicityOptions) -> Any:
    from minillm.harm import Toxicity
    from minillm.vendors.perspective import PerspectiveClient
    from minillm.vendors.text import profanity_score

    scorer: Any = {"own": None, "profanity": profanity_score}.get(options.scorer)
    if options.scorer == "perspective":
        if options.key_file is None:
            raise ValueError(
                "toxicity.scorer=perspective needs a key: put it into a file, and name that as toxicity.key_file"
            )
        key = options.key_file.read_text(encoding="utf-8").strip()
        scorer = PerspectiveClient(key, queries_per_second=options.queries_per_second)
    return Toxicity(scorer=scorer, threshold=options.threshold, name="toxicity")


def _different(documents: Iterable[Document]) -> Iterator[str]:
    """Texts, each once."""
    seen = set()
    for document in documents:
        digest = hashlib.blake2b(document.text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            yield document.text


def default_steps(config: CleanConfig, sources: Sequence[str] = ()) -> list[Any]:
    """The steps of chapters 02 and 06: texts are repaired before they are judged, and the dearest steps see only what is left.

    Args:
        config: the settings.
        sources: what will be cleaned, for `decontaminate.max_documents`.

    Raises:
        ValueError: a setting is wrong.
        CorpusError: a benchmark's file cannot be read.
    """
    from minillm import dedup, detect, extract, harm
    from minillm import filter as filters
    from minillm.vendors import presidio

    def decontaminate() -> Any:
        options = config.decontaminate
        step = dedup.Decontaminate.from_files(
            list(options.against), n=options.n, n_zh=options.n_zh, min_n=options.min_n, on_hit=options.on_hit
        )
        if options.max_documents and sources:
            texts = islice(_different(read_sources(sources, "skip", ReadStats())), options.sample)
            step = step.without_common(texts, options.max_documents)
        return step

    build: dict[str, Callable[[], Any]] = {
        "extract": lambda: extract.ExtractText(extract=EXTRACTORS[config.extract.engine], name="extract"),
        "repair": lambda: extract.RepairEncoding(**dataclasses.asdict(config.repair), name="repair"),
        "language": lambda: filters.Language(
            allowed=config.language.allowed,
            variants=(*config.language.variants, ""),
            identify=IDENTIFIERS[config.language.engine],
            min_confidence=config.language.min_confidence,
            name="language",
        ),
        "heuristics": lambda: _heuristics(config.heuristics),
        "length": lambda: filters.Length(**dataclasses.asdict(config.length), name="length"),
        "machine": lambda: detect.MachineText(
            model=LoadedDetector(config.machine.detector, config.machine.label)
            if config.machine.detector
            else None,
            threshold=config.machine.threshold,
            min_words=config.machine.min_words,
            name="machine",
        ),
        "pii": lambda: harm.RedactPII(
            find=presidio.PresidioFinder() if config.pii.engine == "presidio" else harm.find_pii,
            max_spans=config.pii.max_spans or None,
            name="pii",
        ),
        "toxicity": lambda: _toxicity(config.toxicity),
        "exact": lambda: dedup.ExactDuplicates(name="exact"),
        "near": lambda: dedup.NearDuplicates(**dataclasses.asdict(config.near), name="near"),
        "sentences": lambda: dedup.RepeatedSentences(
            **dataclasses.asdict(config.sentences), name="sentences"
        ),
        "decontaminate": decontaminate,
    }
    without = set(config.skip)
    without |= set() if config.decontaminate.against else {"decontaminate"}
    without |= set() if config.sentences.max_copies else {"sentences"}
    return [build[name]() for name in ORDER if name not in without]


EXTRACTORS: dict[str, Callable[[str], str]] = {
    "density": extract_density,
    "trafilatura": extract_trafilatura,
    "justext": extract_justext,
}

IDENTIFIERS = {"ngram": identify_ngram, "py3langid": identify_py3langid}
