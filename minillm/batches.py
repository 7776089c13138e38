import hashlib
import json
import logging
import struct
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from minillm.attention import Mask
from minillm.checkpoint import MiniLLMError, atomic_folder, atomic_write

log = logging.getLogger(__name__)

IGNORE = -100  # a target that nobody predicts; the value that F.cross_entropy ignores by default
SHARD_MAGIC = b"minillm\x00"
SHARD_VERSION = 1
SHARD_HEADER = struct.Struct(
    "<8sIIIIQQ32s"
)  # magic, version, bytes a token, vocabulary, eos, tokens, documents, SHA-256
INDEX = "index.json"


class ShardError(MiniLLMError):
    """A folder or a file of tokens is missing, damaged, or not ours; the message names it and the rule."""


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """What a folder of token files holds. `files` lists (name, tokens, documents) in order."""

    vocab_size: int
    eos_id: int
    token_bytes: int
    n_tokens: int
    n_documents: int
    n_empty: int
    files: list[tuple[str, int, int]]
    sha256: str  # over the checksums of the files: the identity of the data

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(f"<u{self.token_bytes}")


@dataclass
class _ShardWriter:
    """One token file while it grows: tokens go to disk at once, document ends stay in memory until it closes."""

    file: Any
    dtype: np.dtype
    ends: array = field(default_factory=lambda: array("Q"))
    digest: Any = field(default_factory=hashlib.sha256)
    n_tokens: int = 0

    def add(self, document: np.ndarray) -> None:
        """Append one document."""
        raw = document.astype(self.dtype).tobytes()
        self.file.write(raw)
        self.digest.update(raw)
        self.n_tokens += len(document)
        self.ends.append(self.n_tokens)

    def close(self, vocab_size: int, eos_id: int) -> str:
        """Write the document ends, then the header; returns the checksum."""
        ends = np.frombuffer(self.ends, dtype=np.uint64).astype("<u8").tobytes()
        padding = b"\0" * (
            -self.n_tokens * self.dtype.itemsize % 8
        )  # so that the ends are aligned in a memory map
        self.digest.update(padding + ends)
        self.file.write(padding + ends)
        self.file.seek(0)
        self.file.write(
            shard_header(
                self.dtype.itemsize, vocab_size, eos_id, self.n_tokens, len(self.ends), self.digest.digest()
            )
        )
        return self.digest.hexdigest()


def shard_header(
    token_bytes: int, vocab_size: int, eos_id: int, n_tokens: int, n_documents: int, sha256: bytes
) -> bytes:
    """The first 128 bytes of a token file: the fields, the CRC-32 of the fields, zeros."""
    fields = SHARD_HEADER.pack(
        SHARD_MAGIC, SHARD_VERSION, token_bytes, vocab_size, eos_id, n_tokens, n_documents, sha256
    )
    return (fields + struct.pack("<I", zlib.crc32(fields))).ljust(128, b"\0")


def write_shards(
    documents: Iterable[Sequence[int]],
    folder: str | Path,
    *,
    vocab_size: int,
    eos_id: int,
    shard_tokens: int = 1 << 27,
) -> ShardIndex:
    """Write tokenised documents as memory-mapped files of at most about `shard_tokens` tokens each.

    Streaming: memory holds one document and the boundaries of one file. The folder appears only when it is complete.

    Args:
        documents: ids; `eos_id` is added where a document does not end with it. Empty ones are counted and left out.
        folder: replaced if it holds an older set; refused if it holds anything else.
        vocab_size: ids are in 0..vocab_size - 1; up to 65,536 they take two bytes, otherwise four.
        shard_tokens: a file is closed once it has this many; a document is never cut.

    Raises:
        ValueError: an id outside the vocabulary, or no document at all.
        ShardError: the folder holds something that is not a set of shards.
    """
    folder = Path(folder)
    if not 0 <= eos_id < vocab_size:
        raise ValueError(f"eos_id must be in 0..{vocab_size - 1} (vocab_size {vocab_size}), got {eos_id}")
    if folder.exists() and any(folder.iterdir()) and not (folder / INDEX).is_file():
        raise ShardError(f"{folder}: not empty and holds no {INDEX}; choose another folder for the shards")
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    checked = _CheckedDocuments(documents, vocab_size, eos_id)
    files: list[tuple[str, int, int]] = []
    identity = hashlib.sha256()
    with atomic_folder(folder) as partial:
        for first in checked:
            name = f"tokens-{len(files):05d}.bin"
            with atomic_write(partial / name, "wb") as file:
                file.write(b"\0" * 128)
                writer = _ShardWriter(file, dtype)
                writer.add(first)
                while writer.n_tokens < shard_tokens and (document := next(checked, None)) is not None:
                    writer.add(document)
                identity.update(writer.close(vocab_size, eos_id).encode())
            files.append((name, writer.n_tokens, len(writer.ends)))
        if not files:
            raise ValueError(
                f"no document to write to {folder}: the input is empty ({checked.n_empty} empty documents)"
            )
        index = ShardIndex(
            vocab_size=vocab_size,
            eos_id=eos_id,
            token_bytes=dtype.itemsize,
            n_tokens=sum(tokens for _, tokens, _ in files),
            n_documents=sum(count for _, _, count in files),
            n_empty=checked.n_empty,
            files=files,
            sha256=identity.hexdigest(),
        )
        with atomic_write(partial / INDEX) as file:
            json.dump(asdict(index), file, indent=1)
    if checked.n_empty:
        log.warning("%s: %d empty documents left out", folder, checked.n_empty)
    return index


class _CheckedDocuments:
    """An iterator over documents as arrays that end with eos; counts the empty ones it passes over."""

    def __init__(self, documents: Iterable[Sequence[int]], vocab_size: int, eos_id: int):
        self.documents, self.vocab_size, self.eos_id = enumerate(documents), vocab_size, eos_id
        self.n_empty = 0

    def __iter__(self) -> "_CheckedDocuments":
        return self

    def __next__(self) -> np.ndarray:
        for number, document in self.documents:
            ids = np.asarray(document, dtype=np.int64)
            if len(ids) == 0 or (len(ids) == 1 and ids[0] == self.eos_id):
                self.n_empty += 1
                continue
            if ids.min() < 0 or ids.max() >= self.vocab_size:
                bad = ids[(ids < 0) | (ids >= self.vocab_size)][0]
                raise ValueError(
                    f"document {number}: token {bad} is outside the vocabulary 0..{self.vocab_size - 1}"
                )
            return ids if ids[-1] == self.eos_id else np.append(ids, self.eos_id)
        raise StopIteration


class _Shard(NamedTuple):
    tokens: np.ndarray
    ends: np.ndarray


def open_shard(path: Path, *, verify: bool = False) -> _Shard:
    """Map one token file into memory after checking its header and size, and on request its checksum.

    Raises:
        ShardError: what is wrong, with the file's name.
    """
    if not path.is_file():
        raise ShardError(f"{path}: no such file")
    with open(path, "rb") as file:
        head = file.read(128)
    if len(head) < 128 or head[:8] != SHARD_MAGIC:
        raise ShardError(f"{path}: not a token file of minillm (it must begin with {SHARD_MAGIC!r})")
    (crc,) = struct.unpack_from("<I", head, SHARD_HEADER.size)
    _, version, width, _, _, n_tokens, n_documents, sha256 = SHARD_HEADER.unpack_from(head)
    if version != SHARD_VERSION:
        raise ShardError(
            f"{path}: format version {version}, this package reads {SHARD_VERSION}; write the shards again"
        )
    if zlib.crc32(head[: SHARD_HEADER.size]) != crc or width not in (2, 4):
        raise ShardError(f"{path}: the header is damaged (its CRC-32 differs)")
    ends_at = 128 + n_tokens * width + (-n_tokens * width % 8)
    expected, actual = ends_at + 8 * n_documents, path.stat().st_size
    if actual != expected:
        raise ShardError(
            f"{path}: {actual} bytes, the header promises {expected}; the file is truncated or overwritten"
        )
    if verify:
        verify_shard(path, sha256)
    tokens = np.memmap(path, dtype=f"<u{width}", mode="r", offset=128, shape=(n_tokens,))
    return _Shard(tokens, np.memmap(path, dtype="<u8", mode="r", offset=ends_at, shape=(n_documents,)))


def verify_shard(path: Path, sha256: bytes) -> None:
    """Read a token file once and compare it with the checksum in its header."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(128)
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.digest() != sha256:
        raise ShardError(f"{path}: the SHA-256 of the tokens differs from the header; the file is damaged")


class TokenShards:
    """The documents of a folder of token files, read through a memory map: nothing is loaded until it is used.

    Args:
        folder: what `write_shards` made.
        verify: read every file once and compare checksums (about a second per gigabyte); sizes are always checked.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False):
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self.shards = [open_shard(self.folder / name, verify=verify) for name, _, _ in self.index.files]
        for (name, n_tokens, n_documents), shard in zip(self.index.files, self.shards):
            if len(shard.tokens) != n_tokens or len(shard.ends) != n_documents:
                raise ShardError(
                    f"{self.folder / name}: its counts differ from {INDEX}; the files are of two sets"
                )
        counts = [len(shard.ends) for shard in self.shards]
        self.first = np.concatenate(([0], np.cumsum(counts)))
        self.lengths = np.concatenate(
            [np.diff(shard.ends, prepend=0).astype(np.int64) for shard in self.shards]
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
        shard, local = self.shards[at], i - int(self.first[at])
        start = int(shard.ends[local - 1]) if local else 0
        return shard.tokens[start : int(shard.ends[local])]


def read_index(folder: Path) -> ShardIndex:
    """The index of a folder of token files.

    Raises:
        ShardError: the folder has none, or it cannot be read.
    """
    try:
        fields = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        fields["files"] = [(str(name), int(tokens), int(count)) for name, tokens, count in fields["files"]]
        return ShardIndex(**fields)
    except FileNotFoundError:
        raise ShardError(
            f"{folder}: no {INDEX}; not a folder of token shards, or its writing never finished"
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise ShardError(f"{folder / INDEX}: damaged ({error})") from error


class Piece(NamedTuple):
    """Part of a document: inputs are its tokens start..start + length - 1, targets the tokens one further."""

    document: int
    start: int
    length: int


def pieces(lengths: Sequence[int] | np.ndarray, row_tokens: int) -> list[Piece]:
    """Cut documents so that each piece fits a row. A document of n tokens holds n - 1 predictions.

    Args:
        lengths: tokens of each document, eos included.
        row_tokens: the most predictions a row can hold, T.
    """
    if row_tokens < 1:
        raise ValueError(f"row_tokens must be at least 1, got {row_tokens}")
    return [
        Piece(document, start, min(row_tokens, int(n) - 1 - start))
        for document, n in enumerate(lengths)
        for start in range(0, int(n) - 1, row_tokens)
    ]


def pack(lengths: Sequence[int] | np.ndarray, row_tokens: int) -> list[list[Piece]]:
    """Put documents into as few rows as best-fit-decreasing finds: longest first, each into the fullest row it fits.

    Every prediction of every document is in exactly one row; documents longer than a row are cut.

    Source: best-fit decreasing needs at most 11/9 of the optimal number of rows + 4 (Johnson, 1973);
    for language models: arXiv:2404.10830.
    """
    rows: list[list[Piece]] = []
    open_rows: list[list[int]] = [[] for _ in range(row_tokens + 1)]  # row numbers by the room that is left
    rooms = 0  # bit r is set when some row has r free slots
    for piece in sorted(pieces(lengths, row_tokens), key=lambda piece: -piece.length):
        fitting = rooms >> piece.length
        if fitting:
            room = piece.length + (fitting & -fitting).bit_length() - 1  # the lowest set bit: the best fit
            row = open_rows[room].pop()
            rooms ^= (not open_rows[room]) << room
        else:
            room, row = row_tokens, len(rows)
            rows.append([])
        rows[row].append(piece)
        left = room - piece.length
        if left:
            open_rows[left].append(row)
            rooms |= 1 << left
    return rows


@dataclass(frozen=True)
class Batch:
    """Rows of tokens and what to predict. All are int64 (B, T).

    Args:
        tokens: inputs; 0 where a row is padding.
        targets: the next token of the same document, or -100 where there is none.
        documents: which document of its row a token belongs to, from 0; padding has -1.
        positions: counted from 0 in each document.
        n_targets: how many targets are not -100.
        packed: True when some row holds more than one document.
    """

    tokens: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    documents: Int[Tensor, "B T"]
    positions: Int[Tensor, "B T"]
    n_targets: int
    packed: bool

    def mask(self) -> Mask:
        """Who sees whom: a token sees its own document's past. Rows of one document need plain causality only."""
        return Mask(documents=self.documents) if self.packed else Mask()

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        moved = [
            getattr(self, name).to(device, non_blocking=True)
            for name in ("tokens", "targets", "documents", "positions")
        ]
        return Batch(*moved, n_targets=self.n_targets, packed=self.packed)

    def split(self, parts: int) -> list["Batch"]:
        """Cut by rows into equal micro-batches; together they are this batch.

        Raises:
            ValueError: the rows do not divide.
        """
        rows = self.tokens.shape[0]
        if parts < 1 or rows % parts:
            raise ValueError(
                f"{rows} rows do not divide into {parts} micro-batches; choose a divisor of the batch size"
            )
        if parts == 1:
            return [self]
        chunks = zip(*(t.chunk(parts) for t in (self.tokens, self.targets, self.documents, self.positions)))
        return [
            Batch(t, y, d, p, n_targets=int((y != IGNORE).sum()), packed=bool((d > 0).any()))
            for t, y, d, p in chunks
        ]


def collate(
    rows: Sequence[Sequence[Piece]], read: Any, *, row_tokens: int, joined: bool = False, multiple_of: int = 1
) -> Batch:
    """Lay pieces side by side in rows of tokens.

    Args:
        rows: pieces of each row; an empty row is all padding.
        read: `read(document)` returns its ids.
        row_tokens: the width T. Zero: the longest row, rounded up to `multiple_of`.
        joined: plain concatenation: the last token of a piece predicts the first of the next, and nothing separates them.
    """
    used = [sum(piece.length for piece in row) for row in rows]
    width = row_tokens or -(-max(used) // multiple_of) * multiple_of
    tokens, positions = np.zeros((2, len(rows), width), dtype=np.int64)
    targets, documents = np.full((len(rows), width), IGNORE), np.full((len(rows), width), -1)
    for r, row in enumerate(rows):
        at = 0
        for d, (document, start, length) in enumerate(row):
            ids, span = read(document), slice(at, at + length)
            tokens[r, span] = ids[start : start + length]
            following = ids[start + 1 : start + 1 + length]
            targets[r, at : at + len(following)] = following
            documents[r, span] = 0 if joined else d
            positions[r, span] = np.arange(at, at + length) if joined else np.arange(length)
            if joined and at and start == 0:
                targets[r, at - 1] = ids[0]
            at += length
    n_targets = int((targets != IGNORE).sum())
    arrays = (torch.from_numpy(a) for a in (tokens, targets, documents, positions))
    return Batch(*arrays, n_targets=n_targets, packed=bool((documents > 0).any()))


def shuffled(n: int, *key: int) -> np.ndarray:
    """A permutation of 0..n - 1, fixed by the key on every machine and library version: indices sorted by their hash.

    Source: the hash is splitmix64 (Steele, Lea, Flood, OOPSLA 2014).
    """
    state = np.arange(n, dtype=np.uint64)
    for number in (*key, 0):
        state += np.uint64((0x9E3779B97F4A7C15 * (number + 1)) % (1 << 64))
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return np.argsort(state, kind="stable")


Packing = Literal["documents", "rows", "concat"]


class Loader:
    """An endless, shuffled, resumable stream of batches.

    An epoch visits every document once, in an order that is fixed by (seed, epoch). It is cut into windows of documents,
    and a window into rows and batches, so that resuming costs one window and no replay.

    Args:
        shards: the data.
        batch_size: rows of one optimizer step, over all ranks together. Where a window does not fill its last batch,
            empty rows do: nothing is lost, nothing seen twice.
        seq_len: the most tokens in a row, T.
        seed: of the order.
        rank: which part of each batch this process gets: rows rank * batch_size / world_size and on.
        world_size: the number of processes. The batches, ranks put together, are the same for any of them.
        packing: "documents": several whole documents a row, kept apart by the mask; "rows": one document a row, documents
            of similar length together, rows as wide as their longest; "concat": one stream cut anywhere, no mask.
        window: how many documents are packed together.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        packing: Packing = "documents",
        window: int = 1 << 16,
    ):
        if batch_size < 1 or seq_len < 1 or window < 1:
            raise ValueError(
                f"batch_size, seq_len, window must be at least 1, got {batch_size}, {seq_len}, {window}"
            )
        if world_size < 1 or not 0 <= rank < world_size or batch_size % world_size:
            raise ValueError(
                f"rank must be in 0..world_size - 1 and batch_size a multiple of world_size, "
                f"got rank {rank}, world_size {world_size}, batch_size {batch_size}"
            )
        if packing not in ("documents", "rows", "concat"):
            raise ValueError(f'packing must be "documents", "rows" or "concat", got {packing!r}')
        if int(shards.lengths.max()) < 2:
            raise ValueError("no document has two tokens: there is nothing to predict")
        self.shards, self.batch_size, self.seq_len, self.seed = shards, batch_size, seq_len, seed
        self.rank, self.world_size, self.packing, self.window = rank, world_size, packing, window
        self.epoch, self.at_window, self.at_batch = 0, 0, 0
        self._planned: tuple[tuple[int, int], list[list[list[Piece]]]] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batches = self._plan(self.epoch, self.at_window)
        while self.at_batch >= len(batches):
            self.at_batch, self.at_window = 0, self.at_window + 1
            if self.at_window * self.window >= len(self.shards):
                self.epoch, self.at_window = self.epoch + 1, 0
            batches = self._plan(self.epoch, self.at_window)
        self.at_batch += 1
        return self._collate(batches[self.at_batch - 1])

    def epoch_batches(self, epoch: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, for evaluation; the loader's own position does not move."""
        for window in range(-(-len(self.shards) // self.window)):
            for rows in self._plan(epoch, window):
                yield self._collate(rows)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch is, and of what: JSON."""
        return {"epoch": self.epoch, "window": self.at_window, "batch": self.at_batch, "of": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the position of `state`. The world size may differ from the one that saved it.

        Raises:
            ValueError: the state belongs to other data or another order; the message names the difference.
        """
        for name, value in self._identity().items():
            if state["of"].get(name) != value:
                raise ValueError(
                    f"the loader's state was saved with {name}={state['of'].get(name)!r}, this one has {value!r}"
                )
        self.epoch, self.at_window, self.at_batch = state["epoch"], state["window"], state["batch"]

    def _identity(self) -> dict[str, Any]:
        names = ("batch_size", "seq_len", "seed", "packing", "window")
        return {"data": self.shards.index.sha256, **{name: getattr(self, name) for name in names}}

    def _collate(self, rows: list[list[Piece]]) -> Batch:
        share = self.batch_size // self.world_size
        mine = rows[self.rank * share : (self.rank + 1) * share]
        if self.packing == "rows":  # every rank takes the width of the whole batch
            longest = max(sum(piece.length for piece in row) for row in rows)
            width = min(self.seq_len, -(-longest // 16) * 16)  # few widths: few shapes to compile
        else:
            width = self.seq_len
        return collate(mine, self.shards.document, row_tokens=width, joined=self.packing == "concat")

    def _plan(self, epoch: int, window: int) -> list[list[list[Piece]]]:
        """The batches of one window: lists of rows, which are lists of pieces."""
        if self._planned is None or self._planned[0] != (epoch, window):
            order = shuffled(len(self.shards), self.seed, epoch)
            chosen = order[window * self.window : (window + 1) * self.window]
            plan = plan_batches(
                self.shards.lengths[chosen],
                self.batch_size,
                self.seq_len,
                self.packing,
                key=(self.seed, epoch, window),
            )
            named = [
                [[p._replace(document=int(chosen[p.document])) for p in row] for row in rows] for rows in plan
            ]
            self._planned = ((epoch, window), named)
        return self._planned[1]


def plan_batches(
    lengths: np.ndarray, batch_size: int, row_tokens: int, packing: Packing, *, key: tuple[int, ...]
) -> list[list[list[Piece]]]:
    """Cut the documents of a window into rows and group the rows into shuffled batches of `batch_size`.

    Args:
        lengths: tokens of each document, in the order of the shuffle.
        key: of the second shuffle, of rows or of batches.
    """
    if packing == "concat":
        rows = concatenate(lengths, row_tokens)
    elif packing == "documents":
        rows = pack(lengths, row_tokens)
    else:
        rows = [[piece] for piece in sorted(pieces(lengths, row_tokens), key=lambda piece: piece.length)]
    if packing != "rows":
        rows = [rows[i] for i in shuffled(len(rows), *key)]
    rows += [[] for _ in range(-len(rows) % batch_size)]
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    if packing == "rows":
        batches = [batches[i] for i in shuffled(len(batches), *key)]
    return batches


def concatenate(lengths: Sequence[int] | np.ndarray, row_tokens: int) -> list[list[Piece]]:
    """One stream of all documents, cut every `row_tokens` tokens: no padding, and documents cut and joined anywhere."""
    rows: list[list[Piece]] = [[]]
    room = row_tokens
    for document, n in enumerate(lengths):
        start = 0
        while start < n:
            if not room:
                rows.append([])
                room = row_tokens
            length = min(room, int(n) - start)
            rows[-1].append(Piece(document, start, length))
            start, room = start + length, room - length
    return rows


def fill(rows: Iterable[Sequence[Piece]], row_tokens: int) -> float:
    """The share of slots that hold a token: 1 - padding."""
    used = [sum(piece.length for piece in row) for row in rows]
    return sum(used) / (len(used) * row_tokens)
