"""Raw text in, clean text out: a pipeline of steps that streams, uses all cores, resumes after a kill and accounts for every document."""

# A run has phases. A phase is what can be done document by document; a step that must see the whole collection, such as
# deduplication, ends one phase with small sketches and begins the next with its decisions. Each phase works on chunks of
# documents, in any order and on any core, and a chunk is done when its account, an atomically written file, is there.
# Text is therefore a function of the sources and the steps alone: not of the number of workers, and not of interruptions.

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import logging
import math
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import signal
import threading
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm.auto import tqdm

from minillm.checkpoint import MiniLLMError, atomic_write, first_difference
from minillm.corpus import (
    NAMED,
    CorpusError,
    Document,
    ReadStats,
    find_files,
    need,
    read_documents,
    shingles,
)
from minillm.quality import Drop, token_f1, units
from minillm.runtime import run_lock

__all__ = [
    "CLEAN_RECIPES",
    "CleanConfig",
    "CleanError",
    "Job",
    "Phase",
    "Rules",
    "clean",
    "clean_documents",
    "clean_recipe",
    "default_steps",
    "describe",
    "plan",
    "truth_of",
    "with_repetitions",
]

log = logging.getLogger(__name__)
Say = Callable[[str], None]
CHUNK_CHARS = 8_000_000
SAMPLES, SAMPLE_CHARS = 3, 600  # shown in the report: so many of each reason, and so much of each


class CleanError(MiniLLMError):
    """Cleaning cannot go on: a step failed on a document, or a folder holds something else."""


@dataclass(frozen=True)
class Phase:
    """Steps between two looks at the whole collection.

    `enter` applies what was decided about the collection, `steps` work document by document, `leave` makes the sketches
    for the next decision.
    """

    enter: Any
    steps: tuple[Any, ...]
    leave: Any

    @property
    def acting(self) -> tuple[Any, ...]:
        """The steps that change or drop documents here, in order."""
        return (*((self.enter,) if self.enter is not None else ()), *self.steps)


def is_corpus_step(step: Any) -> bool:
    """Whether a step needs the whole collection: it has `sketch`, `resolve` and `apply`."""
    return all(callable(getattr(step, name, None)) for name in ("sketch", "resolve", "apply"))


def is_step(step: Any) -> bool:
    """Whether something can be called with a document, or is a step for the whole collection."""
    return is_corpus_step(step) or callable(step)


def plan(steps: Sequence[Any]) -> list[Phase]:
    """Cut a list of steps into phases.

    Raises:
        ValueError: something in the list is no step, or two steps have one name.
    """
    phases, enter, plain = [], None, []
    names = Counter(getattr(step, "name", None) for step in steps)
    for step in steps:
        if not (isinstance(getattr(step, "name", None), str) and is_step(step)):
            raise ValueError(
                f"{step!r} is no step: it needs a name, and __call__ or sketch, resolve and apply"
            )
        if names[step.name] > 1:
            raise ValueError(
                f"two steps are named {step.name!r}: the report could not tell them apart; rename one"
            )
        if is_corpus_step(step):
            phases.append(Phase(enter, tuple(plain), step))
            enter, plain = step, []
        else:
            plain.append(step)
    return [*phases, Phase(enter, tuple(plain), None)]


def describe(step: Any) -> dict[str, Any]:
    """A step and its settings as JSON: what makes two runs the same run. Large values stand as a digest."""
    name = step.name
    if dataclasses.is_dataclass(step):
        settings = {f.name: getattr(step, f.name) for f in dataclasses.fields(step)}
    else:
        settings = {key: value for key, value in vars(step).items() if not key.startswith("_")}
    settings.pop("name", None)
    return {"step": name, "kind": type(step).__name__, **{k: _plain(v) for k, v in settings.items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    try:
        text = json.dumps(value, ensure_ascii=False)
        if len(text) < 2000:
            return json.loads(text)
        data = text.encode("utf-8", "surrogatepass")
    except (TypeError, ValueError):
        if isinstance(value, (frozenset, set)):
            return _plain(sorted(value))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return _plain({f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)})
        if isinstance(value, (list, tuple)):
            return _plain([_plain(part) for part in value])
        if callable(value) and hasattr(value, "__qualname__"):
            return f"{value.__module__}.{value.__qualname__}"
        data = pickle.dumps(value, protocol=4)
    return f"blake2b:{hashlib.blake2b(data, digest_size=8).hexdigest()}"


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
            mine = np.array(sorted({_key(part) for part in shingles(document.text, 5)}))
            shared = [np.intersect1d(mine, other, assume_unique=True).size for _, other in told]
            similar = [(n / (mine.size + other.size - n), of) for n, (of, other) in zip(shared, told)]
            if similar:
                jaccard, of = max(similar)
                known |= {"retells": of, "jaccard": round(jaccard, 4)}
            told.append((number, mine))
        yield dataclasses.replace(document, meta={**document.meta, **known})


@dataclass
class Account:
    """What one step did to the documents that reached it. Accounts of chunks are added up."""

    name: str
    n_in: int = 0
    n_out: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    changed: int = 0
    seconds: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict)
    truth: dict[str, list[int]] = field(default_factory=dict)  # label: reached, dropped, changed
    expected: list[int] = field(default_factory=lambda: [0, 0, 0, 0])  # reached, caught; wrong, of them sound
    restored: list[int] = field(
        default_factory=lambda: [0, 0, 0]
    )  # texts; sums of F1 before and after, in millionths
    spans: dict[str, list[int]] = field(default_factory=dict)  # kind of personal data: places, gone
    samples: dict[str, list[list[Any]]] = field(
        default_factory=dict
    )  # reason or "changed": [key, before, after]

    def add(self, other: Account) -> None:
        """Add the account of another chunk."""
        for name in ("n_in", "n_out", "tokens_in", "tokens_out", "changed", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.expected = [a + b for a, b in zip(self.expected, other.expected)]
        self.restored = [a + b for a, b in zip(self.restored, other.restored)]
        for reason, n in other.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + n
        for mine, theirs in ((self.truth, other.truth), (self.spans, other.spans)):
            for label, counts in theirs.items():
                mine[label] = [a + b for a, b in zip(mine.get(label, [0] * len(counts)), counts)]
        for reason, samples in other.samples.items():
            for sample in samples:
                self.show(reason, *sample)

    def show(self, reason: str, key: int, before: str, after: str) -> None:
        """Keep a sample if its key is among the smallest: a fair choice that does not depend on the order of work."""
        kept = self.samples.setdefault(reason, [])
        if len(kept) < SAMPLES or key < kept[-1][0]:
            kept.append([key, before[:SAMPLE_CHARS], after[:SAMPLE_CHARS]])
            kept.sort()
            del kept[SAMPLES:]

    @property
    def dropped(self) -> int:
        """How many documents ended here."""
        return self.n_in - self.n_out


class _TooSlow(BaseException):  # not an Exception, so that no step takes it for one of its own
    pass


class _Clock:
    """Raises `_TooSlow` inside `with clock:` when that takes too long; where there are no signals it does nothing."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.inside = seconds, False
        main = threading.current_thread() is threading.main_thread()
        self.usable = bool(seconds) and hasattr(signal, "setitimer") and main
        self.before = signal.signal(signal.SIGALRM, self._ring) if self.usable else None

    def _ring(self, *_: Any) -> None:
        if self.inside:
            raise _TooSlow

    def __enter__(self) -> None:
        self.inside = True
        if self.usable:
            signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def __exit__(self, *_: Any) -> None:
        self.inside = False

    def close(self) -> None:
        """Give the signal back."""
        if self.usable:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self.before)


@dataclass(frozen=True)
class Rules:
    """How a run treats what goes wrong, and what it keeps."""

    on_error: str = "skip"
    keep_dropped: bool = False
    seconds_per_document: float = 60.0


Counted = tuple[Document, int]  # a document and its number of words


def _fault(step: Any, document: Document, error: BaseException, rules: Rules) -> Drop:
    """An exception inside a step: the document is dropped and counted, or the run stops, as the caller chose."""
    where = document.meta.get("source", "a document")
    if isinstance(error, _TooSlow):
        drop = Drop("too_slow", f"more than {rules.seconds_per_document:g} s")
    else:
        drop = Drop("error", f"{type(error).__name__}: {str(error)[:200]}")
    if rules.on_error == "raise":
        raise CleanError(
            f"{where}: step {step.name!r} failed ({drop.detail}); correct the document, or use --on-error skip"
        ) from error
    log.debug("%s: step %r: %s", where, step.name, drop.detail)
    return drop


def each(step: Any, act: Callable[[Document], Any], documents: Sequence[Document], rules: Rules) -> list[Any]:
    """What an action makes of each document; a `Drop` where it fails."""
    outcomes: list[Any] = []
    clock = _Clock(rules.seconds_per_document)
    try:
        for document in documents:
            try:
                with clock:
                    outcome = act(document)
            except (Exception, _TooSlow) as error:
                outcome = _fault(step, document, error, rules)
            outcomes.append(outcome)
    finally:
        clock.close()
    return outcomes


def _act(
    step: Any, act: Callable[[Document], Any], documents: list[Counted], rules: Rules
) -> tuple[list[Counted], list[tuple[Document, Drop]], Account]:
    """Lead documents through one step and keep the account."""
    account, kept, dropped = Account(step.name), [], []
    expects = EXPECTED.get(type(step).__name__)
    start = time.perf_counter()
    outcomes = each(step, act, [document for document, _ in documents], rules)
    account.seconds = time.perf_counter() - start
    account.n_in = len(documents)
    for (document, n_words), outcome in zip(documents, outcomes):
        label = truth_of(document)
        truth = account.truth.setdefault(label, [0, 0, 0])
        truth[0] += 1
        account.tokens_in += n_words
        is_drop, changed = isinstance(outcome, Drop), False
        if is_drop:
            truth[1] += 1
            account.reasons[outcome.reason] = account.reasons.get(outcome.reason, 0) + 1
            dropped.append((document, outcome))
            account.show(outcome.reason, _key(document.text), document.text, outcome.detail)
        else:
            changed = outcome.text is not document.text and outcome.text != document.text
            if changed:
                truth[2] += 1
                account.changed += 1
                n_words = len(units(outcome.text))
                _compare(account, document, outcome, type(step).__name__)
            account.tokens_out += n_words
            kept.append((outcome, n_words))
        if expects is not None and expects(document, step):
            account.expected[0] += 1
            account.expected[1] += is_drop or changed
        elif is_drop or changed:
            account.expected[2] += 1
            account.expected[3] += label == ""
    account.n_out = len(kept)
    return kept, dropped, account


def _key(text: str) -> int:
    return zlib.crc32(text.encode("utf-8", "surrogatepass"))


def _compare(account: Account, before: Document, after: Document, kind: str) -> None:
    """A changed text beside the truth: how near it is now, and whether the personal data in it are gone."""
    start = next((i for i, (a, b) in enumerate(zip(before.text, after.text)) if a != b), 0)
    start = max(0, start - 60)
    account.show("changed", _key(before.text), before.text[start:], after.text[start:])
    if isinstance(clean := before.meta.get("clean"), str):
        # Whole numbers: their sum does not depend on the order of the chunks.
        scores = (1, *(round(1e6 * token_f1(text, clean)) for text in (before.text, after.text)))
        account.restored = [a + b for a, b in zip(account.restored, scores)]
    for span in before.meta.get("spans", ()) if kind == "RedactPII" else ():
        counts = account.spans.setdefault(str(span[2]), [0, 0])
        value = before.text[span[0] : span[1]]
        counts[0] += 1
        counts[1] += value not in after.text


def clean_documents(documents: Iterable[Document], steps: Sequence[Any]) -> Iterator[Document | Drop]:
    """Lead documents through steps in memory: what the pipeline does, without files. One result for each document, in order.

    Raises:
        ValueError: something in the list is no step.
    """
    results: list[Any] = list(documents)
    for step in (step for phase in plan(steps) for step in (*phase.acting,)):
        alive = [i for i, result in enumerate(results) if isinstance(result, Document)]
        if is_corpus_step(step):
            decisions = step.resolve(step.sketch(results[i]) for i in alive)
            for i, decision in zip(alive, decisions):
                if decision is not None:
                    results[i] = step.apply(results[i], decision)
        else:
            for i in alive:
                results[i] = step(results[i])
    return iter(results)


def _record(document: Document, **more: Any) -> bytes:
    record = {
        "text": document.text,
        "lang": document.lang,
        "kind": document.kind,
        "split": document.split,
        "meta": document.meta,
        **more,
    }
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair in what came with the text
        return json.dumps(record).encode() + b"\n"


def pack(sketches: list[np.ndarray]) -> bytes:
    """Sketches as bytes: their lengths, then their numbers. All are flat and of one dtype, but an empty one may be of any."""
    dtypes = {sketch.dtype for sketch in sketches if sketch.size}
    assert len(dtypes) <= 1, dtypes
    assert all(sketch.ndim == 1 for sketch in sketches)
    buffer = io.BytesIO()
    np.save(buffer, np.array([sketch.size for sketch in sketches], dtype=np.int64))
    np.save(buffer, np.concatenate([s for s in sketches if s.size]) if dtypes else np.zeros(0, np.uint64))
    return buffer.getvalue()


def unpack(file: Any) -> list[np.ndarray]:
    """The sketches that `pack` packed."""
    sizes, numbers = np.load(file, allow_pickle=False), np.load(file, allow_pickle=False)
    return np.split(numbers, np.cumsum(sizes)[:-1]) if len(sizes) else []


@dataclass(frozen=True)
class Job:
    """A run's phases and folder: all that a worker must know."""

    phases: tuple[Phase, ...]
    folder: Path
    rules: Rules

    def place(self, phase: int, chunk: int, what: str) -> Path:
        """The file of a chunk in a phase: its "account.json", "documents.jsonl", "sketches.npy", "dropped.jsonl"."""
        return self.folder / "work" / f"phase-{phase}" / f"{chunk:06d}.{what}"

    def output(self, chunk: int) -> Path:
        """Where the clean documents of a chunk go."""
        return self.folder / "documents" / f"documents-{chunk:06d}.jsonl.gz"

    def done(self, phase: int, chunk: int) -> bool:
        """Whether a chunk has been through a phase."""
        return self.place(phase, chunk, "account.json").exists()

    def load(self, phase: int, chunk: int) -> list[Counted]:
        """The documents that left a phase."""
        with open(self.place(phase, chunk, "documents.jsonl"), encoding="utf-8") as file:
            records = map(json.loads, file)
            return [
                (Document(r["text"], r["lang"], r["kind"], r["split"], r["meta"]), r["words"])
                for r in records
            ]

    def run(self, number: int, chunk: int, payload: Any) -> int:
        """Lead a chunk through a phase. `payload` is its documents in phase 0, later what was decided about them.

        Its files are written in an order that makes the account, the last of them, mean that all are there.

        Returns:
            How many documents went in.
        """
        phase, dropped, accounts, decisions = self.phases[number], [], [], []
        if number == 0:
            counted = [(document, len(units(document.text))) for document in payload]
        else:
            counted, decisions = self.load(number - 1, chunk), json.loads(payload)
            assert len(counted) == len(decisions), (number, chunk, len(counted), len(decisions))
        n_in = len(counted)
        for place, step in enumerate(phase.acting):
            if place == 0 and phase.enter is not None:
                decided = iter(decisions)
                act = lambda d, step=step, decided=decided: (  # noqa: E731
                    d if (decision := next(decided)) is None else step.apply(d, decision)
                )
            else:
                act = step
            counted, gone, account = _act(step, act, counted, self.rules)
            dropped += [(step.name, *pair) for pair in gone]
            accounts.append(account)
        sketches: list[np.ndarray] = []
        if phase.leave is not None:
            counted = self._sketch(phase.leave, counted, sketches, dropped, accounts)
        if self.rules.keep_dropped:
            with atomic_write(self.place(number, chunk, "dropped.jsonl"), "wb") as file:
                for name, document, drop in dropped:
                    why = {"step": name, "reason": drop.reason, "detail": drop.detail}
                    file.write(_record(document, dropped=why))
        if phase.leave is not None:
            with atomic_write(self.place(number, chunk, "documents.jsonl"), "wb") as file:
                file.writelines(_record(document, words=n) for document, n in counted)
            with atomic_write(self.place(number, chunk, "sketches.npy"), "wb") as file:
                file.write(pack(sketches))
        elif counted:
            with atomic_write(self.output(chunk), "wb") as file:
                file.write(gzip.compress(b"".join(_record(d) for d, _ in counted), 6, mtime=0))
        with atomic_write(self.place(number, chunk, "account.json")) as file:
            json.dump([dataclasses.asdict(account) for account in accounts], file, ensure_ascii=False)
        if number:
            self.place(number - 1, chunk, "documents.jsonl").unlink(missing_ok=True)
        return n_in

    def _sketch(
        self,
        step: Any,
        counted: list[Counted],
        sketches: list[np.ndarray],
        dropped: list[tuple[str, Document, Drop]],
        accounts: list[Account],
    ) -> list[Counted]:
        """Sketch every document; those that cannot be sketched are dropped by that step."""
        made: list[Any] = []
        documents = [document for document, _ in counted]
        start = time.perf_counter()
        if hasattr(
            step, "sketch_batch"
        ):  # many at once, faster; if one of them fails, one by one shows which
            with contextlib.suppress(Exception):
                made = list(step.sketch_batch([document.text for document in documents]))
        if len(made) != len(counted):
            made = each(step, step.sketch, documents, self.rules)
        accounts.append(Account(step.name, seconds=time.perf_counter() - start))
        bad = [(pair, drop) for pair, drop in zip(counted, made) if isinstance(drop, Drop)]
        sketches += [np.asarray(sketch) for sketch in made if not isinstance(sketch, Drop)]
        if bad:
            account = Account(step.name, n_in=len(bad), tokens_in=sum(n for (_, n), _ in bad))
            account.reasons = dict(Counter(drop.reason for _, drop in bad))
            accounts.append(account)
            dropped += [(step.name, document, drop) for (document, _), drop in bad]
        return [pair for pair, sketch in zip(counted, made) if not isinstance(sketch, Drop)]


def _serve(connection: Any, job: Job) -> None:
    """A worker's life: chunks come, counts go, until the other end closes."""
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            task = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            reply = None, job.run(*task)
        except MiniLLMError as error:
            reply = str(error), 0
        except Exception:
            reply = f"cleaning failed in phase {task[0]}, chunk {task[1]}:\n{traceback.format_exc()}", 0
        try:
            connection.send(reply)
        except ConnectionError:  # the parent was killed
            return


class _Workers:
    """Processes that lead chunks through phases; started when there is work for more than one."""

    def __init__(self, job: Job, n: int) -> None:
        self.job, self.n = job, n
        self.crew: dict[Any, Any] = {}  # connection: process

    def start(self) -> None:
        """Start the processes. Ctrl-C is for the parent: the children are born with that signal blocked."""
        context = multiprocessing.get_context("spawn")
        block = getattr(signal, "pthread_sigmask", None)
        if block:
            block(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(self.n):
                mine, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, self.job), daemon=True)
                process.start()
                theirs.close()
                self.crew[mine] = process
        finally:
            if block:
                block(signal.SIG_UNBLOCK, {signal.SIGINT})

    def close(self) -> None:
        """End the processes, whatever they do."""
        for connection, process in self.crew.items():
            connection.close()
            process.terminate()
        for process in self.crew.values():
            process.join()
        self.crew = {}

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def map(self, tasks: Iterator[tuple[int, int, Any]]) -> Iterator[int]:
        """Run tasks, a few at a time and in any order; yields the number of documents of each that is done."""
        first = list(islice(tasks, 2))
        if self.n == 1 or len(first) < 2:
            for task in chain(first, tasks):
                yield self.job.run(*task)
            return
        if not self.crew:
            self.start()
        tasks, busy, idle = chain(first, tasks), {}, list(self.crew)
        while True:
            while idle and (task := next(tasks, None)) is not None:
                connection = idle.pop()
                connection.send(task)
                busy[connection] = task[1]
            if not busy:
                return
            for connection in multiprocessing.connection.wait(list(busy)):
                chunk = busy.pop(connection)
                try:
                    error, n = connection.recv()  # type: ignore[union-attr]
                except (EOFError, ConnectionError):
                    self.crew[connection].join()
                    raise CleanError(
                        f"a worker ended in chunk {chunk} (exit code {self.crew[connection].exitcode}), for want of memory "
                        "perhaps: the same command goes on from there; give it fewer --workers"
                    ) from None
                if error:
                    raise CleanError(error)
                yield n
                idle.append(connection)


class _Run:
    """One run of the pipeline in its folder: what is done is read from the files that are there."""

    def __init__(self, job: Job, workers: int, progress: bool, say: Say) -> None:
        self.job, self.progress, self.say = job, progress, say
        self.workers = _Workers(job, workers)
        self.path = job.folder / "work" / "manifest.json"
        self.manifest: dict[str, Any] = {"read": None, "decided": 0, "done": 0}
        if self.path.exists():
            self.manifest = json.loads(self.path.read_text(encoding="utf-8"))

    def remember(self, **what: Any) -> None:
        """Write down what is complete."""
        self.manifest |= what
        with atomic_write(self.path) as file:
            json.dump(self.manifest, file, ensure_ascii=False)

    def through(self, number: int, tasks: Iterator[tuple[int, int, Any]], total: int | None) -> None:
        """Lead all chunks through a phase; those that are done are not done again."""
        steps = self.job.phases[number]
        names = ", ".join(step.name for step in steps.acting) or "reading"
        bar = tqdm(
            total=total, unit="doc", unit_scale=True, desc=names, disable=not self.progress, leave=False
        )
        with bar:
            for n in self.workers.map(task for task in tasks if not self.job.done(number, task[1])):
                bar.update(n)
        self.remember(done=number + 1)

    def read(self, documents: Iterator[Document], chunk_documents: int, stats: ReadStats) -> None:
        """The first phase: documents as they are read, in chunks."""
        n_chunks = 0

        def tasks() -> Iterator[tuple[int, int, Any]]:
            nonlocal n_chunks
            for n_chunks, chunk in enumerate(_chunks(documents, chunk_documents), start=1):
                yield 0, n_chunks - 1, chunk

        self.through(0, tasks(), None)
        self.remember(read={"chunks": n_chunks, **dataclasses.asdict(stats)})

    def decide(self, number: int) -> Path:
        """Let the step between two phases decide about every document; a line of decisions for each chunk."""
        job, path = self.job, self.job.folder / "work" / f"decisions-{number}.jsonl"
        if self.manifest["decided"] >= number:
            return path
        step, sizes = job.phases[number].enter, []

        def sketches() -> Iterator[np.ndarray]:
            for chunk in range(self.manifest["read"]["chunks"]):
                with open(job.place(number - 1, chunk, "sketches.npy"), "rb") as file:
                    unpacked = unpack(file)
                sizes.append(len(unpacked))
                yield from unpacked

        start = time.perf_counter()
        decisions = iter(step.resolve(sketches()))
        with atomic_write(path) as file:
            for size in sizes:
                file.write(json.dumps(list(islice(decisions, size)), default=as_json) + "\n")
        assert next(decisions, None) is None
        seconds = self.manifest.get("seconds", {}) | {step.name: time.perf_counter() - start}
        self.remember(decided=number, seconds=seconds)
        for chunk in range(len(sizes)):
            job.place(number - 1, chunk, "sketches.npy").unlink(missing_ok=True)
        return path

    def later(self, number: int) -> None:
        """A phase after the first: what was decided, and the steps up to the next decision."""
        decisions = self.decide(number)

        def tasks() -> Iterator[tuple[int, int, Any]]:
            with open(decisions, encoding="utf-8") as file:
                for chunk, line in enumerate(file):
                    yield number, chunk, line

        self.through(number, tasks(), self.manifest["read"]["documents"])
        decisions.unlink(missing_ok=True)

    def accounts(self) -> list[Account]:
        """The accounts of all chunks, added up by step, in the order of the steps."""
        names = [step.name for phase in self.job.phases for step in phase.acting]
        total = {name: Account(name) for name in names}
        for number in range(len(self.job.phases)):
            for chunk in range(self.manifest["read"]["chunks"]):
                for values in json.loads(
                    self.job.place(number, chunk, "account.json").read_text(encoding="utf-8")
                ):
                    total[values["name"]].add(Account(**values))
        for name, seconds in self.manifest.get("seconds", {}).items():
            total[name].seconds += seconds
        return list(total.values())

    def keep_dropped(self) -> None:
        """All that was dropped in one file, in the order of phases and chunks."""
        with atomic_write(self.job.folder / "dropped.jsonl.gz", "wb") as file:
            for number in range(len(self.job.phases)):
                for chunk in range(self.manifest["read"]["chunks"]):
                    data = self.job.place(number, chunk, "dropped.jsonl").read_bytes()
                    file.write(gzip.compress(data, 6, mtime=0) if data else b"")


def as_json(value: Any) -> Any:
    """NumPy's numbers and sets for `json.dump`."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{value!r} is no decision: it must be JSON")


def _chunks(documents: Iterator[Document], n: int) -> Iterator[list[Document]]:
    """Groups of `n` documents, fewer where they are long."""
    chunk, characters = [], 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if len(chunk) >= n or characters >= CHUNK_CHARS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _inputs(sources: Sequence[str]) -> dict[str, Any]:
    """What the sources are now, so that a run is not gone on with when they have changed.

    Raises:
        CorpusError: a source does not exist.
    """
    found: dict[str, Any] = {}
    for source in sources:
        if source.partition(":")[0] in NAMED and ":" in source:
            found[source] = "named"
            continue
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in find_files(source)]
        digest = hashlib.blake2b(repr(stats).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
        found[source] = {"files": len(stats), "bytes": sum(size for _, size, _ in stats), "state": digest}
    return found


def read_sources(
    sources: Sequence[str], on_error: str, stats: ReadStats, **options: Any
) -> Iterator[Document]:
    """All documents of all sources. A source in which nothing can be read is one more problem, unless errors are to be raised."""
    for source in sources:
        try:
            yield from read_documents(source, on_error=on_error, stats=stats, **options)
        except CorpusError as error:
            if on_error == "raise" or "no readable document" not in str(error):
                raise
            stats.problems.append(str(error))


def _keep_config(folder: Path, config: dict[str, Any]) -> None:
    """Write what the folder is for, or refuse one that was begun for something else."""
    path, mine = folder / "config.json", json.loads(json.dumps(config))
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        if difference := first_difference(theirs, mine):
            name, old, new = difference
            raise ValueError(
                f"{folder} was begun with {name}={old!r}, now {name}={new!r}: choose another --out, or --restart to begin anew"
            )
        return
    if others := sorted(item.name for item in folder.iterdir() if item.name != ".lock"):
        raise ValueError(
            f"{folder} holds {others[0]!r} and no config.json of a cleaning run: choose an empty --out"
        )
    with atomic_write(path) as file:
        json.dump(mine, file, indent=1, ensure_ascii=False)


def _quiet(line: str) -> None:
    log.info(line)


def clean(
    sources: str | Path | Iterable[str | Path],
    steps: Sequence[Any],
    out: str | Path,
    *,
    workers: int = 1,
    on_error: str = "skip",
    keep_dropped: bool = False,
    report: bool = True,
    restart: bool = False,
    chunk_documents: int = 1000,
    seconds_per_document: float = 60.0,
    max_chars: int = 1_000_000,
    text_field: str = "text",
    cache_dir: str | Path | None = None,
    progress: bool = False,
    say: Say = _quiet,
) -> dict[str, Any]:
    """Lead the documents of `sources` through `steps` into `out/documents`, and write `out/report.json` and `report.html`.

    The same call goes on where a run was stopped, and does nothing when it is complete. What comes out does not depend on
    `workers`, nor on where and how often the run was stopped.

    Args:
        sources: what `corpus.read_documents` takes.
        steps: steps of chapter 02 and collection steps of chapter 03, in order; each is picklable and has its own name.
        out: a folder, new or of the same run.
        workers: processes. A script that asks for more than one needs `if __name__ == "__main__":`, as `spawn` does.
        on_error: "skip" counts documents that cannot be read or on which a step fails, and goes on; "raise" stops.
        keep_dropped: keep every dropped document with its reason, in `dropped.jsonl.gz`.
        report: write `report.html` too.
        restart: throw away what the folder holds of another run.
        chunk_documents: documents in a unit of work; so much is lost by a kill, and held in memory by each worker.
        seconds_per_document: a step that works longer on one document drops it; 0 for no limit.
        max_chars: longer records are unreadable, longer text files are cut.
        text_field: the field of the text.
        cache_dir: for fetched sources.
        progress: show bars.
        say: receives a line for each step.

    Returns:
        What `report.json` holds.

    Raises:
        ValueError: an argument is wrong, or `out` is of another run; the message names the first difference.
        CorpusError: a source is missing, or unreadable and `on_error` is "raise".
        CleanError: a step failed and `on_error` is "raise", or a worker was killed.
        RunLocked: another process works in `out`.
    """
    if workers < 1 or chunk_documents < 1:
        raise ValueError(f"workers={workers} and chunk_documents={chunk_documents} must be at least 1")
    if on_error not in ("skip", "raise"):
        raise ValueError(f"on_error={on_error!r} must be 'skip' or 'raise'")
    if not 0 <= seconds_per_document < float("inf"):
        raise ValueError(f"seconds_per_document={seconds_per_document} must be a number that is not negative")
    named = [str(source) for source in ([sources] if isinstance(sources, (str, Path)) else sources)]
    folder, phases = Path(out), plan(steps)
    config = {
        "sources": _inputs(named),
        "order": [step.name for step in steps],
        "steps": {step.name: describe(step) for step in steps},
        "keep_dropped": keep_dropped,
        "chunk_documents": chunk_documents,
        "seconds_per_document": seconds_per_document,
        "max_chars": max_chars,
        "text_field": text_field,
    }
    job = Job(tuple(phases), folder, Rules(on_error, keep_dropped, seconds_per_document))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: --out names a folder")
    with run_lock(folder):
        if restart:
            _forget(folder)
        _keep_config(folder, config)
        if (folder / "report.json").exists():
            shutil.rmtree(folder / "work", ignore_errors=True)
            say("all done before")
            return json.loads((folder / "report.json").read_text(encoding="utf-8"))
        for partial in chain(
            folder.glob(".*.tmp"), folder.glob("documents/.*.tmp"), folder.glob("work/**/.*.tmp")
        ):
            partial.unlink()
        run, start, stats = _Run(job, workers, progress, say), time.perf_counter(), ReadStats()
        with run.workers:
            if run.manifest["read"] is None:
                options = {"max_chars": max_chars, "text_field": text_field, "cache_dir": cache_dir}
                run.read(read_sources(named, on_error, stats, **options), chunk_documents, stats)
            for number in range(1, len(phases)):
                if run.manifest["done"] <= number:
                    run.later(number)
        return _finish(run, config, report, time.perf_counter() - start)


def _forget(folder: Path) -> None:
    """Remove what a cleaning run writes, and nothing else."""
    for name in ("config.json", "report.json", "report.html", "dropped.jsonl.gz"):
        (folder / name).unlink(missing_ok=True)
    for name in ("documents", "work"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _finish(run: _Run, config: dict[str, Any], report: bool, seconds: float) -> dict[str, Any]:
    """Balance the books, write what was dropped and the report, and throw the work folder away."""
    from minillm.report import write_clean_report
    from minillm.runtime import describe_machine

    read, accounts, job = run.manifest["read"], run.accounts(), run.job
    if not read["documents"]:
        first = f"; first: {read['problems'][0]}" if read["problems"] else ""
        raise CorpusError(f"{', '.join(config['sources'])}: no readable document{first}")
    n_out = accounts[-1].n_out if accounts else read["documents"]
    files = sorted(path.name for path in (job.folder / "documents").glob("*.jsonl.gz"))
    unreadable, dropped = sum(read["skipped"].values()), sum(account.dropped for account in accounts)
    balance = {
        "in": read["documents"] + unreadable,
        "out": n_out,
        "dropped": dropped,
        "unreadable": unreadable,
    }
    arrivals = [read["documents"], *(account.n_out for account in accounts)]
    books = [account.n_in for account in accounts] == arrivals[:-1]
    books &= all(sum(account.reasons.values()) == account.dropped for account in accounts)
    books &= n_out + dropped + unreadable == balance["in"]
    if not books:
        raise CleanError(f"{job.folder}: the books do not balance ({balance}); run again with --restart")
    if job.rules.keep_dropped:
        run.keep_dropped()
    result = {
        "format": "minillm clean",
        "balance": balance,
        "read": read,
        "steps": [dataclasses.asdict(account) for account in accounts],
        "tokens": {"in": accounts[0].tokens_in, "out": accounts[-1].tokens_out} if accounts else {},
        "files": files,
        "seconds": round(seconds, 3),
        "machine": describe_machine(),
        "config": config,
    }
    if report:
        write_clean_report(job.folder / "report.html", result)
    with atomic_write(job.folder / "report.json") as file:  # the last file: with it the run is complete
        json.dump(result, file, indent=1, ensure_ascii=False)
    shutil.rmtree(job.folder / "work")
    return result


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
    """Of documents that are nearly the same, the first stays: MinHash of chapter 03."""

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
            from minillm.quality import HuggingFaceDetector

            transformers = need("transformers", "dev")
            load = transformers.AutoModelForSequenceClassification.from_pretrained
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.model)
            self._detect = HuggingFaceDetector(load(self.model), tokenizer, self.label)
        return self._detect(text)


def _heuristics(options: HeuristicsOptions) -> Any:
    from minillm.quality import RULES, SHORT_RULES, Heuristics

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
    from minillm.quality import PerspectiveClient, Toxicity, profanity_score

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
    """The steps of chapters 02 and 03: texts are repaired before they are judged, and the dearest steps see only what is left.

    Args:
        config: the settings.
        sources: what will be cleaned, for `decontaminate.max_documents`.

    Raises:
        ValueError: a setting is wrong.
        CorpusError: a benchmark's file cannot be read.
    """
    from minillm import dedup, quality

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
        "extract": lambda: quality.ExtractText(engine=config.extract.engine, name="extract"),
        "repair": lambda: quality.RepairEncoding(**dataclasses.asdict(config.repair), name="repair"),
        "language": lambda: quality.Language(
            **{**dataclasses.asdict(config.language), "variants": (*config.language.variants, "")},
            name="language",
        ),
        "heuristics": lambda: _heuristics(config.heuristics),
        "length": lambda: quality.Length(**dataclasses.asdict(config.length), name="length"),
        "machine": lambda: quality.MachineText(
            model=LoadedDetector(config.machine.detector, config.machine.label)
            if config.machine.detector
            else None,
            threshold=config.machine.threshold,
            min_words=config.machine.min_words,
            name="machine",
        ),
        "pii": lambda: quality.RedactPII(
            find=quality.PresidioFinder() if config.pii.engine == "presidio" else quality.find_pii,
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
