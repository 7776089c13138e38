"""The work of cleaning in chunks: clocks, faults, workers."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import json
import logging
import multiprocessing
import multiprocessing.connection
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from minillm.base.errors import CleanError, MiniLLMError
from minillm.base.files import atomic_write, text_key
from minillm.corpus import Document, units
from minillm.extract import Drop
from minillm.pipeline.accounts import Account, _compare
from minillm.pipeline.phases import Counted, Phase, Rules, is_corpus_step, plan
from minillm.readers.documents import document_of, line_of
from minillm.world.truth import EXPECTED, truth_of

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
            account.show(outcome.reason, text_key(document.text), document.text, outcome.detail)
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
            return [(document_of(record), record["words"]) for record in records]

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
                    file.write(line_of(document, dropped=why))
        if phase.leave is not None:
            with atomic_write(self.place(number, chunk, "documents.jsonl"), "wb") as file:
                file.writelines(line_of(document, words=n) for document, n in counted)
            with atomic_write(self.place(number, chunk, "sketches.npy"), "wb") as file:
                file.write(pack(sketches))
        elif counted:
            with atomic_write(self.output(chunk), "wb") as file:
                file.write(gzip.compress(b"".join(line_of(d) for d, _ in counted), 6, mtime=0))
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
