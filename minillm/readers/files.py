"""Text, JSON lines and Parquet files, read one document at a time, with every fault counted."""

import glob
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minillm.base.errors import CorpusError
from minillm.base.optional import optional
from minillm.corpus import Document, guess_lang
from minillm.readers.lines import DamagedFile, bounded_lines, byte_chunks

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ReadStats:
    """What a reader met: documents and characters that it gave out, and what it left out and why. Chapter 01.

    `skipped` counts by reason; `cut` counts running texts that were given out in pieces; `problems` keeps the first
    hundred messages, each with file and line.
    """

    documents: int = 0
    chars: int = 0
    cut: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def note(self, reason: str, message: str) -> None:
        """Count something that was left out."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        if len(self.problems) < 100:
            self.problems.append(message)
        log.debug(message)

    def __str__(self) -> str:
        left_out = ", ".join(f"{n} {reason}" for reason, n in sorted(self.skipped.items())) or "nothing"
        return f"{self.documents} documents, {self.chars} characters; left out: {left_out}"


def fault_of(text: Any, text_field: str, max_chars: int) -> tuple[str, str] | None:
    """Why something cannot be a document, as (reason, message), or None if it can."""
    if not isinstance(text, str):
        return (
            "no text",
            f"field {text_field!r} is of type {type(text).__name__}, not a string; set text_field",
        )
    if not text.strip():
        return "empty", "the document is empty; delete it"
    if len(text) > max_chars:
        return (
            "too long",
            f"{len(text)} characters are above max_chars={max_chars}; split the document or raise max_chars",
        )
    if "\0" in text:
        return "NUL", "the text has a NUL character, as UTF-16 and binary files do; convert it to UTF-8 text"
    if re.search("[\ud800-\udfff]", text):
        return (
            "lone surrogate",
            "the text has half a surrogate pair, which UTF-8 cannot hold; repair the source",
        )
    return None


@dataclass(frozen=True, kw_only=True)
class Reader:
    """What one pass over sources needs: what to do about errors, limits, the name of the text field, the counts."""

    on_error: str
    max_chars: int
    text_field: str
    stats: ReadStats
    cache_dir: Path

    def bad(self, reason: str, where: str, detail: str) -> None:
        """Leave something out, or raise, as the caller asked."""
        message = f"{where}: {detail}"
        if self.on_error == "raise":
            raise CorpusError(message)
        self.stats.note(reason, message)

    def decode(self, data: bytes, where: str) -> str | None:
        """Bytes as UTF-8, or None if they are not."""
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            shown = data[error.start : error.start + 4].hex(" ")
            hint = "convert the file (iconv -f gb18030 -t utf-8), or pass on_error='skip'"
            self.bad("not UTF-8", where, f"bytes {shown} at {error.start} are not UTF-8; {hint}")
            return None

    def give(
        self,
        text: Any,
        where: str,
        *,
        lang: str = "",
        kind: str = "text",
        split: str = "train",
        meta: Any = None,
    ) -> Iterator[Document]:
        """One document if the text can be one; otherwise none, counted."""
        fault = fault_of(text, self.text_field, self.max_chars)
        if fault:
            self.bad(fault[0], where, fault[1])
            return
        self.stats.documents += 1
        self.stats.chars += len(text)
        known = meta if isinstance(meta, dict) else {}
        yield Document(text, lang or guess_lang(text), kind, split, {"source": where, **known})


SEPARATOR = "<|endoftext|>"


def read_txt(path: Path, reader: Reader) -> Iterator[Document]:
    """A text file: one document, or several with lines <|endoftext|> between them; a long one comes in pieces."""
    parts: list[str] = []
    size, first, last, given = 0, 1, 0, False
    for number, data in bounded_lines(byte_chunks(path), max(4, reader.max_chars), cut=True):
        data = (data or b"").removeprefix(b"\xef\xbb\xbf") if number == 1 else data or b""
        line = reader.decode(data, f"{path}:{number}")
        if line is None:
            continue
        ends = line.strip() == SEPARATOR
        if ends or size + len(line) >= reader.max_chars:
            reader.stats.cut += not ends
            yield from reader.give("".join(parts).strip("\n"), f"{path}:{first}")
            parts, size, first, given = [], 0, number, True
        if not ends:
            parts.append(
                line if number == last else "\n" + line
            )  # pieces of one line are joined as they were
            size += len(parts[-1])
        last = number
    text = "".join(parts).strip("\n")
    if text.strip() or not given:
        yield from reader.give(text, f"{path}:{first}")


def read_jsonl(path: Path, reader: Reader) -> Iterator[Document]:
    """JSON lines: an object a line, its text in `text_field`; lang, kind, split and meta are kept where there are any."""
    limit = 12 * reader.max_chars + 65536  # an escaped character takes up to 12 bytes
    for number, data in bounded_lines(byte_chunks(path), limit):
        where = f"{path}:{number}"
        if data is None:
            reader.bad(
                "too long",
                where,
                f"the line is above {limit} bytes; split it or raise max_chars={reader.max_chars}",
            )
            continue
        line = reader.decode(data.removeprefix(b"\xef\xbb\xbf") if number == 1 else data, where)
        if line is None or not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reader.bad("not JSON", where, f"not a JSON object ({error}); correct or delete the line")
            continue
        if not isinstance(record, dict) or reader.text_field not in record:
            has = (
                ", ".join(map(repr, list(record)[:5])) if isinstance(record, dict) else type(record).__name__
            )
            reader.bad("no text", where, f"no field {reader.text_field!r} in it, only {has}; set text_field")
            continue
        known: dict[str, Any] = {
            key: record[key] for key in ("lang", "kind") if isinstance(record.get(key), str)
        }
        if record.get("split") in ("train", "heldout"):
            known["split"] = record["split"]
        yield from reader.give(record[reader.text_field], where, meta=record.get("meta"), **known)


def read_parquet(path: Path, reader: Reader) -> Iterator[Document]:
    """A Parquet file, a few rows at a time."""
    with optional("clean"):
        import pyarrow as arrow
        from pyarrow import parquet
    row = 0
    try:
        file = parquet.ParquetFile(path)
        if reader.text_field not in file.schema_arrow.names:
            has = ", ".join(file.schema_arrow.names[:8])
            reader.bad("no text", str(path), f"no column {reader.text_field!r}; it has {has}; set text_field")
            return
        for batch in file.iter_batches(batch_size=64, columns=[reader.text_field]):
            for value in batch.column(0).to_pylist():
                row += 1
                yield from reader.give(value, f"{path}:{row}")
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reader.bad("damaged", f"{path}:{row + 1}", f"damaged Parquet file ({error}); fetch it again")


FORMATS = {
    ".txt": read_txt,
    ".md": read_txt,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".parquet": read_parquet,
}


def format_of(path: Path) -> Callable[[Path, Reader], Iterator[Document]] | None:
    """The reader for a file by its name, behind .gz or .zst, or None."""
    inner = Path(path.stem) if path.suffix in (".gz", ".zst") else path
    if inner.suffix == ".parquet" and inner is not path:
        return None
    return FORMATS.get(inner.suffix.lower())


def find_files(source: str | Path) -> list[Path]:
    """The files of a source: a file, all readable files below a folder, or all that a pattern with * matches, sorted.

    Raises:
        CorpusError: nothing is there, or nothing of a known format.
    """
    path, known = Path(source), ", ".join(FORMATS)
    if path.is_file():
        if format_of(path) is None:
            raise CorpusError(
                f"{path}: format {path.suffix!r} is unknown; rename it to one of {known} (also .gz or .zst)"
            )
        return [path]
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(source), recursive=True))
    files = sorted(file for file in found if file.is_file() and format_of(file))
    if not files:
        raise CorpusError(
            f"{source}: no file of a known format ({known}, also .gz or .zst) is there; check the path"
        )
    return files


def read_file(path: Path, reader: Reader) -> Iterator[Document]:
    """The documents of one file, up to where it is damaged."""
    read = format_of(path)
    assert read is not None
    try:
        yield from read(path, reader)
    except DamagedFile as error:
        reader.bad(
            "damaged", f"{path}:{error.line}", f"the file is damaged or incomplete ({error}); fetch it again"
        )
    except OSError as error:
        reader.bad(
            "unreadable",
            str(path),
            f"the file cannot be read ({error.strerror or error}); check its permissions",
        )
