"""Raw text in, clean text out: a pipeline of steps that streams, uses all cores, resumes after a kill and accounts for every document."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from minillm.base.errors import CleanError, CorpusError
from minillm.base.files import atomic_write, first_difference, run_lock
from minillm.corpus import Document
from minillm.pipeline.accounts import Account
from minillm.pipeline.phases import Rules, describe, plan
from minillm.pipeline.work import Job, _chunks, _Workers, as_json, unpack
from minillm.readers.documents import read_documents
from minillm.readers.files import ReadStats, find_files
from minillm.readers.named import NAMED

log = logging.getLogger(__name__)

Say = Callable[[str], None]


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
        steps: steps of chapter 02 and collection steps of chapter 06, in order; each is picklable and has its own name.
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
    from minillm.base.machine import describe_machine
    from minillm.show.cleaning import write_clean_report

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
