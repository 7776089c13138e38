"""The steps of cleaning as blocks of datatrove, so that many processes, a Slurm or a Ray cluster can do the work."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from minillm.base.errors import CleanError
from minillm.base.optional import optional
from minillm.corpus import Document
from minillm.extract import Drop
from minillm.pipeline.phases import FailurePolicy, is_corpus_step, plan
from minillm.pipeline.sources import read_sources
from minillm.pipeline.work import as_json, each, pack_sketches, unpack_sketches
from minillm.readers.documents import FIELDS, record_of
from minillm.readers.files import ReadStats, find_files

with optional("clean"):
    import orjson  # noqa: F401  (datatrove's own writers import it late)
    from datatrove.data import Document as Carried
    from datatrove.io import DataFolderLike, get_datafolder
    from datatrove.pipeline.base import PipelineStep
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

AT_ONCE = 500  # documents that a block holds


def from_carried(carried: Carried) -> Document:
    """A document of ours from one of datatrove's: `lang`, `kind`, `split` and `meta` are entries of its metadata."""
    known = {name: carried.metadata[name] for name in FIELDS[1:] if name in carried.metadata}
    return Document(carried.text, **known)


def to_carried(document: Document, carried: Carried) -> Carried:
    """The same document of datatrove's with the text and the facts of ours."""
    carried.text = document.text
    known = record_of(document)
    known.pop("text")
    carried.metadata.update(known)
    return carried


def as_record(self: Any, carried: Carried) -> dict[str, Any]:
    """What `JsonlWriter` writes: the record that `write_documents` writes."""
    more = {"dropped": carried.metadata["dropped"]} if "dropped" in carried.metadata else {}
    return record_of(from_carried(carried), **more)


def as_shelved(self: Any, carried: Carried) -> dict[str, Any]:
    """The record between two jobs: it keeps the part that the document belongs to."""
    return {"id": carried.id, "part": carried.metadata["part"], **as_record(self, carried)}


def part_of(carried: Carried, rank: int) -> str:
    """The part that a document belongs to; where a foreign reader gave none, all documents of a task are one part."""
    return carried.metadata.setdefault("part", f"{rank:06d}")


class ReadBlock(PipelineStep):
    """Reads what `read_documents` reads, one part for each file; task r takes the files r, r + tasks, …"""

    name, type = "minillm", "📖 - READER"

    def __init__(self, sources: Iterable[str | Path], **options: Any) -> None:
        super().__init__()
        self.files = [path for source in sources for path in find_files(source)]
        self.options = options

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Give out the documents of this task's files."""
        yield from data or ()
        for part in range(rank, len(self.files), world_size):
            stats, path = ReadStats(), self.files[part]
            for number, document in enumerate(self.read(path, stats)):
                self.stat_update("documents")
                yield to_carried(
                    document, Carried(document.text, f"{path}/{number}", metadata={"part": f"{part:06d}"})
                )
            for reason, n in stats.skipped.items():
                self.stat_update("unreadable", f"unreadable: {reason}", value=n)

    def read(self, path: Path, stats: ReadStats) -> Iterator[Document]:
        """The documents of one file; a file in which nothing can be read is counted, unless errors are to be raised."""
        return read_sources(
            [str(path)],
            self.options.get("on_error", "skip"),
            stats,
            **{key: value for key, value in self.options.items() if key != "on_error"},
        )


class StepBlock(PipelineStep):
    """Leads documents through steps of chapters 02 to 05, one after the other; what they drop goes to `dropped`, if that is given."""

    type = "🧹 - CLEAN"

    def __init__(
        self, steps: Sequence[Any], policy: FailurePolicy | None = None, dropped: Any = None
    ) -> None:
        self.steps, self.policy, self.dropped = tuple(steps), policy or FailurePolicy(), dropped
        self.name = ", ".join(step.name for step in self.steps)
        if wrong := [step.name for step in self.steps if is_corpus_step(step)]:
            raise ValueError(
                f"{wrong[0]!r} needs the whole collection: use SketchBlock, ResolveBlock and ApplyBlock"
            )
        super().__init__()

    def acts(self) -> Iterator[tuple[Any, Any]]:
        """(step, function of a document)."""
        return ((step, step) for step in self.steps)

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Yield what is left."""
        data = iter(data or ())
        try:
            while carried := list(islice(data, AT_ONCE)):
                with self.track_time("batch"):
                    left = self.through(carried, rank)
                yield from left
        finally:
            if self.dropped is not None:
                self.dropped.close()

    def through(self, carried: list[Any], rank: int) -> list[Any]:
        """Lead a batch through the steps."""
        documents = [from_carried(one) for one in carried]
        for step, act in self.acts():
            outcomes = each(step, act, documents, self.policy)
            kept = [(one, made) for one, made in zip(carried, outcomes) if not isinstance(made, Drop)]
            for one, before, made in zip(carried, documents, outcomes):
                if isinstance(made, Drop):
                    self.stat_update("dropped", f"dropped: {step.name}: {made.reason}")
                    if self.dropped is not None:
                        to_carried(before, one)
                        one.metadata["dropped"] = {
                            "step": step.name,
                            "reason": made.reason,
                            "detail": made.detail,
                        }
                        self.dropped.write(one, rank)
            carried, documents = [one for one, _ in kept], [made for _, made in kept]
        self.stat_update("forwarded", value=len(carried))
        return [to_carried(document, one) for one, document in zip(carried, documents)]


class SketchBlock(PipelineStep):
    """First job of a collection step: saves the sketches of the documents that pass, a file for each part."""

    type = "✏️ - SKETCH"

    def __init__(self, step: Any, folder: DataFolderLike, policy: FailurePolicy | None = None) -> None:
        super().__init__()
        self.step, self.name, self.policy = step, step.name, policy or FailurePolicy(on_error="raise")
        self.folder = get_datafolder(folder)

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Pass all documents on."""
        for part, carried in groupby(data or (), key=lambda one: part_of(one, rank)):
            sketches: list[np.ndarray] = []
            while batch := list(islice(carried, AT_ONCE)):
                with self.track_time("batch"):
                    documents = [from_carried(one) for one in batch]
                    if hasattr(self.step, "sketch_batch"):
                        sketches += list(self.step.sketch_batch([document.text for document in documents]))
                    else:
                        sketches += [np.asarray(self.step.sketch(document)) for document in documents]
                yield from batch
            with self.folder.open(f"{part}.npy", "wb") as file:
                file.write(pack_sketches(sketches))


class ResolveBlock(PipelineStep):
    """Second job of a collection step, one task: decides about all documents at once."""

    type = "⚖️ - RESOLVE"

    def __init__(self, step: Any, sketches: DataFolderLike, decisions: DataFolderLike) -> None:
        super().__init__()
        self.step, self.name = step, step.name
        self.sketches, self.decisions = get_datafolder(sketches), get_datafolder(decisions)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Read all sketches in the order of the parts, write a file of decisions for each part."""
        if world_size != 1:
            raise ValueError(f"{self.name}: one task decides about all documents, not {world_size}")
        sizes: dict[str, int] = {}

        def sketches() -> Iterator[np.ndarray]:
            for name in sorted(self.sketches.list_files(glob_pattern="*.npy")):
                with self.sketches.open(name, "rb") as file:
                    unpacked = unpack_sketches(io.BytesIO(file.read()))
                sizes[name] = len(unpacked)
                yield from unpacked

        with self.track_time("collection"):
            decisions = iter(self.step.resolve(sketches()))
        for name, size in sizes.items():
            with self.decisions.open(name.replace(".npy", ".json"), "w") as file:
                json.dump(list(islice(decisions, size)), file, default=as_json)
        self.stat_update("documents", value=sum(sizes.values()))
        yield from data or ()


class ApplyBlock(StepBlock):
    """Third job of a collection step: applies the decisions to the same documents in the same order."""

    type = "✂️ - APPLY"

    def __init__(
        self, step: Any, decisions: DataFolderLike, policy: FailurePolicy | None = None, dropped: Any = None
    ) -> None:
        super().__init__([], policy, dropped)
        self.step, self.name, self.decisions = step, step.name, get_datafolder(decisions)
        self.pending: Iterator[Any] = iter(())

    def acts(self) -> Iterator[tuple[Any, Any]]:
        """The step's `apply`, with the next decision."""

        def act(document: Document) -> Document | Drop:
            decision = next(self.pending)
            return document if decision is None else self.step.apply(document, decision)

        yield self.step, act

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Yield what is left."""
        try:
            for part, carried in groupby(data or (), key=lambda one: part_of(one, rank)):
                with self.decisions.open(f"{part}.json") as file:
                    self.pending = iter(json.load(file))
                while batch := list(islice(carried, AT_ONCE)):
                    with self.track_time("batch"):
                        left = self.through(batch, rank)
                    yield from left
                if next(self.pending, self) is not self:
                    raise CleanError(
                        f"{self.name}: part {part} has fewer documents than were sketched; run all jobs again"
                    )
        finally:
            if self.dropped is not None:
                self.dropped.close()


def cluster_jobs(
    sources: Iterable[str | Path],
    steps: Sequence[Any],
    out: str | Path,
    *,
    tasks: int,
    kind: str = "local",
    policy: FailurePolicy | None = None,
    read_options: dict[str, Any] | None = None,
    **options: Any,
) -> list[Any]:
    """Build the jobs that lead `sources` through `steps` into `out/documents`, each waiting for the one before.

    The documents and their order are those of `pipeline.run.clean` with the same steps. Run the last job; it launches the others.

    Args:
        sources: files, folders and patterns that every machine sees under the same path.
        steps: as for `pipeline.run.clean`.
        out: a folder that every machine sees.
        tasks: into how many tasks a job is cut; more than there are files makes no sense.
        kind: "local" for processes of this machine, "slurm", or "ray".
        policy: on_error, keep_dropped (into `out/dropped`) and seconds_per_document.
        read_options: for `read_documents`.
        options: for datatrove's executor: `workers` for all; `time`, `partition`, `mem_per_cpu_gb`, `sbatch_args` … for Slurm.

    Raises:
        ValueError: the kind is unknown, or a number is wrong.
    """
    if tasks < 1:
        raise ValueError(f"tasks={tasks} must be at least 1")
    out, policy, jobs = Path(out).absolute(), policy or FailurePolicy(), []
    work = out / "work"
    sources = [str(source) for source in sources]
    executor = _executor(kind)

    def dropped(step: Any) -> Any:
        if not policy.keep_dropped:
            return None
        return JsonlWriter(f"{out}/dropped", f"${{part}}.{step.name}.${{rank}}.jsonl.gz", adapter=as_record)

    def add(name: str, pipeline: list[Any], n_tasks: int) -> None:
        named = {"job_name": name} if kind == "slurm" else {}
        place = {"logging_dir": f"{out}/jobs/{len(jobs)}-{name}", "depends": jobs[-1] if jobs else None}
        jobs.append(executor(pipeline=pipeline, tasks=n_tasks, **place, **named, **options))

    phases = plan(steps)
    for number, phase in enumerate(phases):
        shelf = f"{work}/{number}"
        if phase.before is None:
            pipeline: list[Any] = [
                ReadBlock(sources, **{"on_error": policy.on_error, **(read_options or {})})
            ]
        else:
            before = f"{work}/{number - 1}"
            add(
                f"{phase.before.name}-resolve",
                [ResolveBlock(phase.before, f"{before}/sketches", f"{before}/decisions")],
                1,
            )
            pipeline = [
                JsonlReader(f"{before}/documents", add_file_path=False),
                ApplyBlock(phase.before, f"{before}/decisions", policy, dropped(phase.before)),
            ]
        pipeline += [StepBlock([step], policy, dropped(step)) for step in phase.steps]
        if phase.after is not None:
            pipeline += [
                SketchBlock(phase.after, f"{shelf}/sketches"),
                JsonlWriter(f"{shelf}/documents", "${part}.jsonl.gz", adapter=as_shelved),
            ]
            add(f"{phase.after.name}-sketch", pipeline, tasks)
        else:
            pipeline.append(JsonlWriter(f"{out}/documents", "${part}.jsonl.gz", adapter=as_record))
            add("documents", pipeline, tasks)
    return jobs


def _executor(kind: str) -> Any:
    from datatrove import executor

    kinds = {
        "local": executor.LocalPipelineExecutor,
        "slurm": executor.SlurmPipelineExecutor,
        "ray": executor.RayPipelineExecutor,
    }
    if kind not in kinds:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(kinds)}")
    if kind == "ray":
        with optional("ray"):
            import ray  # noqa: F401  (datatrove imports it only when it runs)
    return kinds[kind]
