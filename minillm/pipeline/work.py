"""The work on one chunk of documents: steps under a clock, faults, accounts, and the chunk's files."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import json
import logging
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minillm.base.errors import CleanError, MiniLLMError
from minillm.base.files import atomic_write
from minillm.corpus import Document, units
from minillm.extract import Drop
from minillm.pipeline.accounts import Account
from minillm.pipeline.phases import FailurePolicy, Phase, is_corpus_step, plan
from minillm.readers.documents import document_of, line_of

log = logging.getLogger(__name__)

CHUNK_CHARS = 8_000_000


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


def _fault(step: Any, document: Document, error: BaseException, policy: FailurePolicy) -> Drop:
    """An exception inside a step: the document is dropped and counted, or the run stops, as the caller chose."""
    where = document.meta.get("source", "a document")
    if isinstance(error, _TooSlow):
        drop = Drop("too_slow", f"more than {policy.seconds_per_document:g} s")
    else:
        drop = Drop("error", f"{type(error).__name__}: {str(error)[:200]}")
    if policy.on_error == "raise":
        raise CleanError(
            f"{where}: step {step.name!r} failed ({drop.detail}); correct the document, or use --on-error skip"
        ) from error
    log.debug("%s: step %r: %s", where, step.name, drop.detail)
    return drop


def each(
    step: Any, act: Callable[[Document], Any], documents: Iterable[Document], policy: FailurePolicy
) -> list[Any]:
    """What an action makes of each document; a `Drop` where it fails."""
    outcomes: list[Any] = []
    clock = _Clock(policy.seconds_per_document)
    try:
        for document in documents:
            try:
                with clock:
                    outcome = act(document)
            except (Exception, _TooSlow) as error:
                outcome = _fault(step, document, error, policy)
            outcomes.append(outcome)
    finally:
        clock.close()
    return outcomes


def clean_documents(documents: Iterable[Document], steps: Sequence[Any]) -> Iterator[Document | Drop]:
    """Lead documents through steps in memory: what the pipeline does, without files. One result for each document, in order.

    Raises:
        ValueError: something in the list is no step.
    """
    results: list[Any] = list(documents)
    for step in (step for phase in plan(steps) for step in phase.acting):
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


def chunks_of(documents: Iterator[Document], n: int) -> Iterator[list[Document]]:
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


def pack_sketches(sketches: list[np.ndarray]) -> bytes:
    """Sketches as bytes: their lengths, then their numbers. All are flat and of one dtype, but an empty one may be of any."""
    dtypes = {sketch.dtype for sketch in sketches if sketch.size}
    assert len(dtypes) <= 1, dtypes
    assert all(sketch.ndim == 1 for sketch in sketches)
    buffer = io.BytesIO()
    np.save(buffer, np.array([sketch.size for sketch in sketches], dtype=np.int64))
    np.save(buffer, np.concatenate([s for s in sketches if s.size]) if dtypes else np.zeros(0, np.uint64))
    return buffer.getvalue()


def unpack_sketches(file: Any) -> list[np.ndarray]:
    """The sketches that `pack_sketches` packed."""
    sizes, numbers = np.load(file, allow_pickle=False), np.load(file, allow_pickle=False)
    return np.split(numbers, np.cumsum(sizes)[:-1]) if len(sizes) else []


def as_json(value: Any) -> Any:
    """NumPy's numbers and sets for `json.dump`."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{value!r} is no decision: it must be JSON")


@dataclass(slots=True)
class Parcel:
    """A document on its way, its number of words, and its record as it was read, for as long as no step touches it."""

    document: Document
    words: int
    record: bytes = b""

    @classmethod
    def load(cls, line: bytes) -> Parcel:
        """What `line` wrote."""
        words, _, record = line.partition(b"\t")
        return cls(document_of(json.loads(record)), int(words), record)

    def written(self) -> bytes:
        """The record: a document that came through as it was is not put into JSON again."""
        self.record = self.record or line_of(self.document)
        return self.record

    def line(self) -> bytes:
        """The line between two phases: the number of words, a tabulator, the record."""
        return b"%d\t%b" % (self.words, self.written())


@dataclass(frozen=True)
class ChunkWork:
    """What is done with a chunk of documents in each phase of a run, and in which files: all that a worker must know."""

    phases: tuple[Phase, ...]
    folder: Path
    policy: FailurePolicy

    def place(self, phase: int, chunk: int, what: str) -> Path:
        """A chunk's "account.json", "documents.tsv", "sketches.npy" or "dropped.jsonl.gz" in a phase."""
        return self.folder / "work" / f"phase-{phase}" / f"{chunk:06d}.{what}"

    def output(self, chunk: int) -> Path:
        """Where the clean documents of a chunk go."""
        return self.folder / "documents" / f"documents-{chunk:06d}.jsonl.gz"

    def done(self, phase: int, chunk: int) -> bool:
        """Whether a chunk has been through a phase."""
        return self.place(phase, chunk, "account.json").exists()

    def try_run(self, task: tuple[int, int, Any]) -> tuple[str, int]:
        """`run` in a worker: what went wrong, or "", and how many documents went in."""
        try:
            return "", self.run(*task)
        except MiniLLMError as error:
            return str(error), 0
        except Exception:
            return f"cleaning failed in phase {task[0]}, chunk {task[1]}:\n{traceback.format_exc()}", 0

    def run(self, number: int, chunk: int, payload: Any) -> int:
        """Lead a chunk through a phase. `payload` is its documents in phase 0, later what was decided about them.

        Returns:
            How many documents went in.
        """
        phase, accounts = self.phases[number], []
        dropped: list[tuple[str, Document, Drop]] = []
        parcels, acts = self._begin(number, chunk, payload)
        n_in = len(parcels)
        for step, act in acts:
            parcels, account = self._through(step, act, parcels, dropped)
            accounts.append(account)
        sketches: list[np.ndarray] = []
        if phase.after is not None:
            parcels = self._sketch(phase.after, parcels, sketches, dropped, accounts)
        self._write(number, chunk, parcels, sketches, dropped, accounts)
        return n_in

    def _begin(self, number: int, chunk: int, payload: Any) -> tuple[list[Parcel], list[tuple[Any, Any]]]:
        """The chunk's documents as they come to a phase; and its steps, each with what it does to a document."""
        phase = self.phases[number]
        acts = [(step, step) for step in phase.steps]
        if number == 0:
            return [Parcel(document, len(units(document.text))) for document in payload], acts
        with open(self.place(number - 1, chunk, "documents.tsv"), "rb") as file:
            parcels = [Parcel.load(line) for line in file]
        decisions = json.loads(payload)
        assert len(parcels) == len(decisions), (number, chunk, len(parcels), len(decisions))
        coming = iter(decisions)

        def apply(document: Document) -> Document | Drop:
            return document if (decision := next(coming)) is None else phase.before.apply(document, decision)

        return parcels, [(phase.before, apply), *acts]

    def _through(
        self, step: Any, act: Any, parcels: list[Parcel], dropped: list[tuple[str, Document, Drop]]
    ) -> tuple[list[Parcel], Account]:
        """Lead documents through one step and keep the account."""
        account, kept = Account(step.name, n_in=len(parcels)), []
        start = time.perf_counter()
        outcomes = each(step, act, (parcel.document for parcel in parcels), self.policy)
        account.seconds = time.perf_counter() - start
        for parcel, outcome in zip(parcels, outcomes):
            before, words, changed = parcel.document, parcel.words, False
            account.tokens_in += words
            if isinstance(outcome, Drop):
                dropped.append((step.name, before, outcome))
            else:
                changed = outcome.text is not before.text and outcome.text != before.text
                words = len(units(outcome.text)) if changed else words
                kept.append(parcel if outcome is before else Parcel(outcome, words))
            account.book(step, before, outcome, words, changed)
        return kept, account

    def _sketch(
        self,
        step: Any,
        parcels: list[Parcel],
        sketches: list[np.ndarray],
        dropped: list[tuple[str, Document, Drop]],
        accounts: list[Account],
    ) -> list[Parcel]:
        """Sketch every document; those that cannot be sketched are dropped by that step."""
        made: list[Any] = []
        documents = [parcel.document for parcel in parcels]
        start = time.perf_counter()
        # Many at once, faster; if one of them fails, one by one shows which.
        if hasattr(step, "sketch_batch"):
            with contextlib.suppress(Exception):
                made = list(step.sketch_batch([document.text for document in documents]))
        if len(made) != len(parcels):
            made = each(step, step.sketch, documents, self.policy)
        accounts.append(Account(step.name, seconds=time.perf_counter() - start))
        bad = [(parcel, drop) for parcel, drop in zip(parcels, made) if isinstance(drop, Drop)]
        sketches += [np.asarray(sketch) for sketch in made if not isinstance(sketch, Drop)]
        if bad:
            account = Account(step.name, n_in=len(bad), tokens_in=sum(parcel.words for parcel, _ in bad))
            account.reasons = dict(Counter(drop.reason for _, drop in bad))
            accounts.append(account)
            dropped += [(step.name, parcel.document, drop) for parcel, drop in bad]
        return [parcel for parcel, sketch in zip(parcels, made) if not isinstance(sketch, Drop)]

    def _write(
        self,
        number: int,
        chunk: int,
        parcels: list[Parcel],
        sketches: list[np.ndarray],
        dropped: list[tuple[str, Document, Drop]],
        accounts: list[Account],
    ) -> None:
        """Write a chunk's files in an order that makes the account, the last of them, mean that all are there."""
        if self.policy.keep_dropped:
            gone = (
                line_of(document, dropped={"step": name, "reason": drop.reason, "detail": drop.detail})
                for name, document, drop in dropped
            )
            self._pack(self.place(number, chunk, "dropped.jsonl.gz"), gone)
        if self.phases[number].after is not None:
            with atomic_write(self.place(number, chunk, "documents.tsv"), "wb") as file:
                file.writelines(parcel.line() for parcel in parcels)
            with atomic_write(self.place(number, chunk, "sketches.npy"), "wb") as file:
                file.write(pack_sketches(sketches))
        elif parcels:
            self._pack(self.output(chunk), (parcel.written() for parcel in parcels))
        with atomic_write(self.place(number, chunk, "account.json")) as file:
            json.dump([dataclasses.asdict(account) for account in accounts], file, ensure_ascii=False)
        if number:
            self.place(number - 1, chunk, "documents.tsv").unlink(missing_ok=True)

    @staticmethod
    def _pack(path: Path, records: Iterable[bytes]) -> None:
        """Records as one member of a gzip file, the same on every day; no record, no byte."""
        data = b"".join(records)
        with atomic_write(path, "wb") as file:
            file.write(gzip.compress(data, 6, mtime=0) if data else b"")
