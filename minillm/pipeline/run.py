"""Raw text in, clean text out: a pipeline of steps that streams, uses all cores, resumes after a kill and accounts for every document."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm.auto import tqdm

from minillm.base.errors import CleanError, CorpusError
from minillm.base.files import atomic_write, clean_leftovers, require_same, run_lock
from minillm.base.machine import describe_machine
from minillm.base.processes import Crew
from minillm.pipeline.accounts import Account
from minillm.pipeline.phases import FailurePolicy, describe, plan
from minillm.pipeline.sources import read_sources, state_of_sources
from minillm.pipeline.work import ChunkWork, as_json, chunks_of, unpack_sketches
from minillm.readers.files import ReadStats

log = logging.getLogger(__name__)

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class CleanJob(FailurePolicy):
    """What to clean, and where to put it."""

    sources: tyro.conf.Positional[tuple[str, ...]] = ()
    """Files (txt, jsonl, parquet; gz, zst), folders, patterns with *, `stdlib:`, `hf:owner/name`."""
    out: Path = Path("clean")
    """A folder, new or of the same run: the clean text goes into its `documents`."""
    report: bool = True
    """Write report.html beside report.json."""
    workers: int = 1
    """Processes; 0 for one a core. What comes out does not depend on it."""
    chunk_documents: int = 1000
    """So many documents are a unit of work: what a kill costs, and what a worker holds in memory."""
    max_chars: int = 1_000_000
    """Longer records are not read; longer text files are cut."""
    text_field: str = "text"
    """The field or column of the text."""
    cache_dir: Path | None = None
    """Where fetched sources are kept; ~/.cache/minillm if none is given."""
    restart: bool = False
    """Begin anew, and throw away what --out holds of another cleaning run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers < 0:
            raise ValueError(f"workers must not be negative, got {self.workers}")
        if self.chunk_documents < 1:
            raise ValueError(f"chunk_documents={self.chunk_documents} must be at least 1")

    @property
    def n_workers(self) -> int:
        """The number of processes."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.workers or cores

    @property
    def policy(self) -> FailurePolicy:
        """Only what a worker must know."""
        names = [field.name for field in dataclasses.fields(FailurePolicy)]
        return FailurePolicy(**{name: getattr(self, name) for name in names})

    def settings(self, steps: Sequence[Any]) -> dict[str, Any]:
        """All on which it depends what comes out, as JSON: what makes two runs the same run.

        Raises:
            CorpusError: a source does not exist.
        """
        found = {
            "sources": state_of_sources(self.sources),
            "order": [step.name for step in steps],
            "steps": {step.name: describe(step) for step in steps},
            "keep_dropped": self.keep_dropped,
            "chunk_documents": self.chunk_documents,
            "seconds_per_document": self.seconds_per_document,
            "max_chars": self.max_chars,
            "text_field": self.text_field,
        }
        return json.loads(json.dumps(found))


class CleanFolder:
    """The folder of one cleaning run: what is done is read from the files that are there."""

    def __init__(self, work: ChunkWork, job: CleanJob, progress: bool) -> None:
        self.work, self.job, self.progress = work, job, progress
        self.crew = Crew(work.try_run, job.n_workers)
        self.path = work.folder / "work" / "manifest.json"
        self.manifest: dict[str, Any] = {"read": None, "decided": 0, "done": 0}
        if self.path.exists():
            self.manifest = json.loads(self.path.read_text(encoding="utf-8"))

    def close(self) -> None:
        """End the workers, whatever they do."""
        self.crew.close()

    def remember(self, **what: Any) -> None:
        """Write down what is complete."""
        self.manifest |= what
        with atomic_write(self.path) as file:
            json.dump(self.manifest, file, ensure_ascii=False)

    def do(self, tasks: Iterator[tuple[int, int, Any]]) -> Iterator[int]:
        """Do tasks, a few at a time and in any order; yields the number of documents of each that is done."""
        first = list(islice(tasks, 2))
        tasks = chain(first, tasks)
        if self.crew.n == 1 or len(first) < 2:
            for task in tasks:
                yield self.work.run(*task)
            return
        chunks: list[int] = []

        def given_out() -> Iterator[tuple[int, int, Any]]:
            for task in tasks:
                chunks.append(task[1])
                yield task

        for outcome in self.crew.map(given_out()):
            if outcome.trouble:
                raise CleanError(
                    f"a worker ended in chunk {chunks[outcome.number]} (exit code {outcome.exitcode}), for want of memory "
                    "perhaps: the same command goes on from there; give it fewer --workers"
                )
            error, n = outcome.value
            if error:
                raise CleanError(error)
            yield n

    def through(self, number: int, tasks: Iterator[tuple[int, int, Any]], total: int | None) -> None:
        """Lead all chunks through a phase; those that are done are not done again."""
        names = ", ".join(step.name for step in self.work.phases[number].acting) or "reading"
        bar = tqdm(
            total=total, unit="doc", unit_scale=True, desc=names, disable=not self.progress, leave=False
        )
        with bar:
            for n in self.do(task for task in tasks if not self.work.done(number, task[1])):
                bar.update(n)
        self.remember(done=number + 1)

    def read(self) -> None:
        """The first phase: documents as they are read, in chunks."""
        job, stats, n_chunks = self.job, ReadStats(), 0
        options = {"max_chars": job.max_chars, "text_field": job.text_field, "cache_dir": job.cache_dir}
        documents = read_sources(job.sources, job.on_error, stats, **options)

        def tasks() -> Iterator[tuple[int, int, Any]]:
            nonlocal n_chunks
            for n_chunks, chunk in enumerate(chunks_of(documents, job.chunk_documents), start=1):
                yield 0, n_chunks - 1, chunk

        self.through(0, tasks(), None)
        self.remember(read={"chunks": n_chunks, **dataclasses.asdict(stats)})

    def decide(self, number: int) -> Path:
        """Let the step between two phases decide about every document; a line of decisions for each chunk."""
        work, path = self.work, self.work.folder / "work" / f"decisions-{number}.jsonl"
        if self.manifest["decided"] >= number:
            return path
        step, sizes = work.phases[number].before, []

        def sketches() -> Iterator[np.ndarray]:
            for chunk in range(self.manifest["read"]["chunks"]):
                with open(work.place(number - 1, chunk, "sketches.npy"), "rb") as file:
                    unpacked = unpack_sketches(file)
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
            work.place(number - 1, chunk, "sketches.npy").unlink(missing_ok=True)
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

    def everything(self) -> None:
        """All phases that are not done."""
        if self.manifest["read"] is None:
            self.read()
        for number in range(1, len(self.work.phases)):
            if self.manifest["done"] <= number:
                self.later(number)

    def accounts(self) -> list[Account]:
        """The accounts of all chunks, added up by step, in the order of the steps."""
        names = [step.name for phase in self.work.phases for step in phase.acting]
        total = {name: Account(name) for name in names}
        for path in self.places("account.json"):
            for values in json.loads(path.read_text(encoding="utf-8")):
                total[values["name"]].add(Account(**values))
        for name, seconds in self.manifest.get("seconds", {}).items():
            total[name].seconds += seconds
        return list(total.values())

    def keep_dropped(self) -> None:
        """All that was dropped in one file, in the order of phases and chunks."""
        with atomic_write(self.work.folder / "dropped.jsonl.gz", "wb") as file:
            for path in self.places("dropped.jsonl.gz"):
                file.write(path.read_bytes())

    def places(self, what: str) -> Iterator[Path]:
        """A file of every chunk, phase by phase."""
        for number in range(len(self.work.phases)):
            for chunk in range(self.manifest["read"]["chunks"]):
                yield self.work.place(number, chunk, what)

    def finish(self, settings: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Balance the books, write what was dropped and the report, and throw the work folder away."""
        # All of matplotlib comes with it, which no worker and no error needs.
        from minillm.show.cleaning import write_clean_report

        read, accounts, folder = self.manifest["read"], self.accounts(), self.work.folder
        if not read["documents"]:
            first = f"; first: {read['problems'][0]}" if read["problems"] else ""
            raise CorpusError(f"{', '.join(settings['sources'])}: no readable document{first}")
        result = {
            "format": "minillm clean",
            "balance": self._balance(accounts),
            "read": read,
            "steps": [dataclasses.asdict(account) for account in accounts],
            "tokens": {"in": accounts[0].tokens_in, "out": accounts[-1].tokens_out} if accounts else {},
            "files": sorted(path.name for path in (folder / "documents").glob("*.jsonl.gz")),
            "seconds": round(seconds, 3),
            "machine": describe_machine(),
            "config": settings,
        }
        if self.job.keep_dropped:
            self.keep_dropped()
        if self.job.report:
            write_clean_report(folder / "report.html", result)
        with atomic_write(folder / "report.json") as file:  # the last file: with it the run is complete
            json.dump(result, file, indent=1, ensure_ascii=False)
        shutil.rmtree(folder / "work")
        return result

    def _balance(self, accounts: list[Account]) -> dict[str, int]:
        """What came in and what became of it.

        Raises:
            CleanError: the numbers do not add up.
        """
        read = self.manifest["read"]
        n_out = accounts[-1].n_out if accounts else read["documents"]
        unreadable, dropped = sum(read["skipped"].values()), sum(account.dropped for account in accounts)
        n_in = read["documents"] + unreadable
        balance = {"in": n_in, "out": n_out, "dropped": dropped, "unreadable": unreadable}
        arrivals = [read["documents"], *(account.n_out for account in accounts)]
        books = [account.n_in for account in accounts] == arrivals[:-1]
        books &= all(sum(account.reasons.values()) == account.dropped for account in accounts)
        books &= n_out + dropped + unreadable == n_in
        if not books:
            raise CleanError(
                f"{self.work.folder}: the books do not balance ({balance}); run again with --restart"
            )
        return balance


def _forget(folder: Path) -> None:
    """Remove what a cleaning run writes, and nothing else."""
    for name in ("config.json", "report.json", "report.html", "dropped.jsonl.gz"):
        (folder / name).unlink(missing_ok=True)
    for name in ("documents", "work"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write what the folder is for, or refuse one that was begun for something else."""
    path = folder / "config.json"
    if path.exists():
        begun = json.loads(path.read_text(encoding="utf-8"))
        require_same(begun, settings, str(folder), "choose another --out, or --restart to begin anew")
        return
    if others := sorted(item.name for item in folder.iterdir() if item.name != ".lock"):
        raise ValueError(
            f"{folder} holds {others[0]!r} and no config.json of a cleaning run: choose an empty --out"
        )
    with atomic_write(path) as file:
        json.dump(settings, file, indent=1, ensure_ascii=False)


def _quiet(line: str) -> None:
    log.info(line)


def run_job(
    job: CleanJob, steps: Sequence[Any], *, progress: bool = False, say: Say = _quiet
) -> dict[str, Any]:
    """Do a job of cleaning, or go on where it was stopped; `clean` says all about it."""
    folder = Path(job.out)
    work = ChunkWork(tuple(plan(steps)), folder, job.policy)
    settings = job.settings(steps)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: --out names a folder")
    with run_lock(folder):
        if job.restart:
            _forget(folder)
        _keep_settings(folder, settings)
        if (folder / "report.json").exists():
            shutil.rmtree(folder / "work", ignore_errors=True)
            say("all done before")
            return json.loads((folder / "report.json").read_text(encoding="utf-8"))
        for place in (folder, folder / "documents", folder / "work", *(folder / "work").glob("phase-*")):
            clean_leftovers(place)
        start = time.perf_counter()
        with closing(CleanFolder(work, job, progress)) as run:
            run.everything()
        return run.finish(settings, time.perf_counter() - start)


def clean(
    sources: str | Path | Iterable[str | Path],
    steps: Sequence[Any],
    out: str | Path,
    *,
    progress: bool = False,
    say: Say = _quiet,
    **settings: Any,
) -> dict[str, Any]:
    """Lead the documents of `sources` through `steps` into `out/documents`, and write `out/report.json` and `report.html`.

    The same call goes on where a run was stopped, and does nothing when it is complete. What comes out does not depend on
    the number of workers, nor on where and how often the run was stopped.

    Args:
        sources: what `read_documents` takes.
        steps: steps of chapters 02 to 05 and collection steps of chapter 06, in order; each is picklable and has its own name.
        out: a folder, new or of the same run.
        progress: show bars.
        say: receives a line for each step.
        settings: fields of `CleanJob`, such as workers and keep_dropped. A script that asks for more than one worker needs
            `if __name__ == "__main__":`, as `spawn` does.

    Returns:
        What `report.json` holds.

    Raises:
        ValueError: a setting is wrong, or `out` is of another run; the message names the first difference.
        CorpusError: a source is missing, or unreadable and `on_error` is "raise".
        CleanError: a step failed and `on_error` is "raise", or a worker was killed.
        RunLocked: another process works in `out`.
    """
    named = tuple(map(str, [sources] if isinstance(sources, (str, Path)) else sources))
    return run_job(CleanJob(sources=named, out=Path(out), **settings), steps, progress=progress, say=say)
