"""Tokens on disk: shards that are mapped, not read, behind an index that is checked."""

import hashlib
import json
import logging
import struct
import zlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from minillm.base.errors import MiniLLMError
from minillm.base.files import atomic_folder, atomic_write

log = logging.getLogger(__name__)

INDEX = "index.json"

SHARD_MAGIC = b"minillm\x00"

SHARD_VERSION = 1

SHARD_FIELDS = struct.Struct(
    "<8sIIIIQQ32s"
)  # magic, version, bytes a token, vocabulary, eos, tokens, documents, SHA-256

HEADER_BYTES = 128


class ShardError(MiniLLMError):
    """A folder or a file of tokens is missing, damaged, or not ours; the message names it and the rule."""


def shard_header(
    *, token_bytes: int, vocab_size: int, eos_id: int, n_tokens: int, n_documents: int, sha256: bytes
) -> bytes:
    """The first 128 bytes of a token file: the fields, the CRC-32 of the fields, zeros."""
    fields = SHARD_FIELDS.pack(
        SHARD_MAGIC, SHARD_VERSION, token_bytes, vocab_size, eos_id, n_tokens, n_documents, sha256
    )
    return (fields + struct.pack("<I", zlib.crc32(fields))).ljust(HEADER_BYTES, b"\0")


class ShardWriter:
    """One token file while it grows: tokens go to disk at once, only the ends of documents wait in memory.

    Args:
        path: the file.
        vocab_size: decides the width of a token.
        eos_id: goes into the header.
    """

    def __init__(self, path: Path, vocab_size: int, eos_id: int):
        self.path, self.vocab_size, self.eos_id = path, vocab_size, eos_id
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self.ends, self.digest, self.n_tokens = array("Q"), hashlib.sha256(), 0
        self.file = open(path, "wb")  # noqa: SIM115
        self.file.write(bytes(HEADER_BYTES))

    def add(self, document: np.ndarray) -> None:
        """Append one document."""
        self._write(document.astype(self.dtype).tobytes())
        self.n_tokens += len(document)
        self.ends.append(self.n_tokens)

    def finish(self) -> bytes:
        """Write the ends of the documents and the header; returns the checksum."""
        self._write(bytes(-self.n_tokens * self.dtype.itemsize % 8))  # so that the ends are aligned in memory
        self._write(np.array(self.ends, dtype="<u8").tobytes())
        self.file.seek(0)
        self.file.write(
            shard_header(
                token_bytes=self.dtype.itemsize,
                vocab_size=self.vocab_size,
                eos_id=self.eos_id,
                n_tokens=self.n_tokens,
                n_documents=len(self.ends),
                sha256=self.digest.digest(),
            )
        )
        return self.digest.digest()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def _write(self, raw: bytes) -> None:
        self.file.write(raw)
        self.digest.update(raw)


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """What a folder of token files holds.

    Args:
        vocab_size: ids are below it.
        eos_id: the last token of every document.
        n_tokens: of all files, `eos_id` included.
        n_documents: of all files.
        n_empty: empty documents that were left out.
        files: name, tokens and documents of each file, in order.
        sha256: over the checksums of the files; the identity of the data.
    """

    vocab_size: int
    eos_id: int
    n_tokens: int
    n_documents: int
    n_empty: int
    files: list[tuple[str, int, int]]
    sha256: str


def as_document(ids: Sequence[int], number: int, vocab_size: int, eos_id: int) -> np.ndarray:
    """Ids as an array that ends with `eos_id`; an empty document stays empty.

    Raises:
        ValueError: an id is outside the vocabulary; the message has the document's number.
    """
    array = np.asarray(ids, dtype=np.int64)
    if len(array) == 0 or (len(array) == 1 and array[0] == eos_id):
        return array[:0]
    if array.min() < 0 or array.max() >= vocab_size:
        wrong = array[(array < 0) | (array >= vocab_size)][0]
        raise ValueError(f"document {number}: id {wrong} is not in the vocabulary, 0..{vocab_size - 1}")
    return array if array[-1] == eos_id else np.append(array, eos_id)


def write_shards(
    documents: Iterable[Sequence[int]],
    folder: str | Path,
    *,
    vocab_size: int,
    eos_id: int,
    shard_tokens: int = 1 << 27,
) -> ShardIndex:
    """Write tokenised documents as files that can be memory-mapped. Streams: memory does not grow with the data.

    Args:
        documents: ids; `eos_id` is added to a document that does not end with it, empty ones are counted and left out.
        folder: replaced if it holds an older set, refused if it holds anything else.
        vocab_size: ids are in 0..vocab_size - 1; up to 65,536 of them take two bytes each, otherwise four.
        eos_id: the id that ends a document.
        shard_tokens: a file is closed once it has this many; no document is cut.

    Raises:
        ValueError: an id outside the vocabulary, or no document at all.
        ShardError: the folder holds something else.
    """
    folder = Path(folder)
    if not 0 <= eos_id < vocab_size:
        raise ValueError(f"eos_id must be in 0..{vocab_size - 1} (vocab_size is {vocab_size}), got {eos_id}")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens must be at least 1, got {shard_tokens}")
    if folder.exists() and any(folder.iterdir()) and not (folder / INDEX).is_file():
        raise ShardError(f"{folder}: not empty, and no {INDEX} in it; choose another folder for the tokens")
    with atomic_folder(folder) as partial:
        index = fill_folder(
            documents, partial, vocab_size=vocab_size, eos_id=eos_id, shard_tokens=shard_tokens
        )
        with atomic_write(partial / INDEX) as file:
            json.dump(asdict(index), file, indent=1)
    if index.n_empty:
        log.warning("%s: %d empty documents left out", folder, index.n_empty)
    return index


def fill_folder(
    documents: Iterable[Sequence[int]], folder: Path, *, vocab_size: int, eos_id: int, shard_tokens: int
) -> ShardIndex:
    """Write the token files of `write_shards` into an empty folder; returns their index."""
    files: list[tuple[str, int, int]] = []
    identity, n_empty = hashlib.sha256(), 0
    numbered = enumerate(documents)
    while True:
        name = f"tokens-{len(files):05d}.bin"
        with ShardWriter(folder / name, vocab_size, eos_id) as writer:
            for number, ids in numbered:
                document = as_document(ids, number, vocab_size, eos_id)
                if len(document):
                    writer.add(document)
                    if writer.n_tokens >= shard_tokens:
                        break
                else:
                    n_empty += 1
            if not writer.n_tokens:
                break
            identity.update(writer.finish())
            files.append((name, writer.n_tokens, len(writer.ends)))
    (folder / name).unlink()  # the last one, which got no document
    if not files:
        raise ValueError(f"no document to write: the input has none ({n_empty} empty ones)")
    return ShardIndex(
        vocab_size=vocab_size,
        eos_id=eos_id,
        n_tokens=sum(tokens for _, tokens, _ in files),
        n_documents=sum(count for _, _, count in files),
        n_empty=n_empty,
        files=files,
        sha256=identity.hexdigest(),
    )


def open_shard(path: Path, *, verify: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Map one token file into memory after checking its header and its size, and on request its checksum.

    Returns:
        The tokens, and where each document ends.

    Raises:
        ShardError: what is wrong, with the file's name.
    """
    if not path.is_file():
        raise ShardError(f"{path}: no such file")
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
        if len(head) < HEADER_BYTES or head[:8] != SHARD_MAGIC:
            raise ShardError(f"{path}: not a token file of minillm, which would begin with {SHARD_MAGIC!r}")
        _, version, width, _, _, n_tokens, n_documents, sha256 = SHARD_FIELDS.unpack_from(head)
        if version != SHARD_VERSION:
            raise ShardError(
                f"{path}: format {version}, this package reads {SHARD_VERSION}; write the shards again"
            )
        if struct.unpack_from("<I", head, SHARD_FIELDS.size)[0] != zlib.crc32(head[: SHARD_FIELDS.size]):
            raise ShardError(f"{path}: the header is damaged, its CRC-32 differs")
        ends_at = HEADER_BYTES + n_tokens * width + -n_tokens * width % 8
        size, expected = path.stat().st_size, ends_at + 8 * n_documents
        if size != expected:
            raise ShardError(
                f"{path}: {size} bytes, its header promises {expected}; truncated or overwritten"
            )
        if verify and hashlib.file_digest(file, "sha256").digest() != sha256:
            raise ShardError(
                f"{path}: the SHA-256 of its content differs from its header; the file is damaged"
            )
    tokens = np.memmap(path, dtype=f"<u{width}", mode="r", offset=HEADER_BYTES, shape=(n_tokens,))
    return tokens, np.memmap(path, dtype="<u8", mode="r", offset=ends_at, shape=(n_documents,))


def read_index(folder: Path) -> ShardIndex:
    """The index of a folder of token files.

    Raises:
        ShardError: the folder has none, or it cannot be read.
    """
    path = folder / INDEX
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        files = [(str(name), int(tokens), int(count)) for name, tokens, count in fields.pop("files")]
        return ShardIndex(**fields, files=files)
    except FileNotFoundError:
        raise ShardError(
            f"{path}: no such file; not a folder of tokens, or its writing never finished"
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ShardError(f"{path}: not an index of token files ({error})") from error


class TokenShards:
    """The documents of a folder of token files. Nothing is loaded until it is used (chapter 15).

    Args:
        folder: what `write_shards` made.
        verify: read every file once and compare its checksum, about a second per gigabyte. Headers and sizes are
            always checked.

    Raises:
        ShardError: a file is missing, damaged, or of another set.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False):
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self.files = [open_shard(self.folder / name, verify=verify) for name, _, _ in self.index.files]
        for (name, n_tokens, n_documents), (tokens, ends) in zip(self.index.files, self.files):
            if (len(tokens), len(ends)) != (n_tokens, n_documents) or int(ends[-1]) != n_tokens:
                raise ShardError(
                    f"{self.folder / name}: its counts differ from those in {INDEX}; files of two sets?"
                )
        self.first = np.cumsum(
            [0, *(len(ends) for _, ends in self.files)]
        )  # number of each file's first document
        self.lengths = np.concatenate([np.diff(ends.astype(np.int64), prepend=0) for _, ends in self.files])
        if self.lengths.min() < 1:
            raise ShardError(
                f"{self.folder}: a document of {self.lengths.min()} tokens; the ends are damaged"
            )

    def __len__(self) -> int:
        return self.index.n_documents

    @property
    def n_tokens(self) -> int:
        return self.index.n_tokens

    def document(self, i: int) -> np.ndarray:
        """The ids of document i, eos last: a view into the file, in its dtype."""
        if not 0 <= i < len(self):
            raise IndexError(f"document must be in 0..{len(self) - 1}, got {i}")
        at = int(np.searchsorted(self.first, i, side="right")) - 1
        tokens, ends = self.files[at]
        local = i - int(self.first[at])
        return tokens[int(ends[local - 1]) if local else 0 : int(ends[local])]
