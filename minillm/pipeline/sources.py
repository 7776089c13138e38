"""What a cleaning run reads: many sources as one stream, and what they were when the run began."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from minillm.base.errors import CorpusError
from minillm.corpus import Document
from minillm.readers.documents import read_documents
from minillm.readers.files import ReadStats, find_files
from minillm.readers.named import NAMED


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


def state_of_sources(sources: Sequence[str]) -> dict[str, Any]:
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
