"""Byte-pair encoding from nothing, SentencePiece beside it, and how well they compress. (Draft: chapter 04 replaces it.)"""

from __future__ import annotations

import heapq
import io
import json
import logging
import multiprocessing
import re
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece
from tqdm.auto import tqdm

from minillm.checkpoint import MiniLLMError, atomic_write

log = logging.getLogger(__name__)

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
MAX_TOKEN_BYTES = 64
MAX_FILE_BYTES = 64 << 20
# Scripts that are written without spaces between words, and whose letters are words: Han and Kana.
CJK = (
    "\u3005\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
)


class TokenizerError(MiniLLMError):
    """A tokenizer file is missing, damaged, or not what it says; the message names the file."""


class Tokenizer(ABC):
    """Text to ids and back; what BPETokenizer and SentencePieceTokenizer share. Chapter 04."""

    special_ids: dict[str, int]
    _bytes: list[bytes]

    @property
    def vocab_size(self) -> int:
        """How many ids there are, specials included; ids are 0 … vocab_size - 1."""
        return len(self._bytes)

    def _special(self, name: str) -> int:
        if name not in self.special_ids:
            raise ValueError(f"no special token {name!r}; this tokenizer has {sorted(self.special_ids)}")
        return self.special_ids[name]

    @property
    def bos_id(self) -> int:
        """The id that begins a document."""
        return self._special(BOS)

    @property
    def eos_id(self) -> int:
        """The id that ends a document."""
        return self._special(EOS)

    @property
    def pad_id(self) -> int:
        """The id that fills a batch; no loss is taken on it."""
        return self._special(PAD)

    @abstractmethod
    def _encode_plain(self, text: str) -> list[int]: ...

    @abstractmethod
    def save(self, path: str | Path) -> Path:
        """Write the tokenizer atomically: to this file, or under its usual name into this folder. Returns the file."""

    def encode(
        self,
        text: str,
        *,
        bos: bool = False,
        eos: bool = False,
        allowed_special: Collection[str] | Literal["all"] = (),
    ) -> list[int]:
        """Turn text into ids; `decode` gives the same text back.

        Args:
            text: any string. Special tokens in it are plain text unless they are allowed.
            bos, eos: put the id that begins, ends a document around it.
            allowed_special: names of special tokens that `text` may produce. Never pass this with text from a user.

        Raises:
            ValueError: a name in `allowed_special` is not a special token.
        """
        if isinstance(allowed_special, str):
            if allowed_special != "all":
                raise ValueError(f'allowed_special is a set of names or "all", not {allowed_special!r}')
            allowed_special = set(self.special_ids)
        if unknown := set(allowed_special) - set(self.special_ids):
            raise ValueError(f"not special tokens: {sorted(unknown)}; there are {sorted(self.special_ids)}")
        ids = [self.bos_id] if bos else []
        if allowed_special:
            names = sorted(allowed_special, key=len, reverse=True)
            for part in re.split("(" + "|".join(map(re.escape, names)) + ")", text):
                ids += [self.special_ids[part]] if part in allowed_special else self._encode_plain(part)
        else:
            ids += self._encode_plain(text)
        return [*ids, self.eos_id] if eos else ids

    def encode_batch(self, texts: Iterable[str], *, workers: int = 1) -> list[list[int]]:
        """The ids of many texts, each as `encode` gives them, faster; `workers` > 1 uses as many processes."""
        return [self._encode_plain(text) for text in texts]

    def decode_bytes(self, ids: Iterable[int], *, show_special: bool = False) -> bytes:
        """The bytes behind ids. Special tokens stand for none, unless they are to be shown by name.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        ids = list(ids)
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ValueError(f"id {wrong} is not in this vocabulary: ids are 0 … {self.vocab_size - 1}")
        if show_special:
            names = {index: name.encode() for name, index in self.special_ids.items()}
            return b"".join(names.get(i) or self._bytes[i] for i in ids)
        return b"".join(map(self._bytes.__getitem__, ids))

    def decode(self, ids: Iterable[int], *, show_special: bool = False) -> str:
        """The text behind ids; bytes that are no UTF-8 (a cut character) become U+FFFD."""
        data = self.decode_bytes(ids, show_special=show_special)
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return data.decode("utf-8", "replace")


@lru_cache
def pretoken_pattern(split_digits: bool = True) -> re.Pattern[str]:
    """The rule that cuts text into pre-tokens; merges never cross a cut. Joined, the pre-tokens are the text."""
    digits = r"\d" if split_digits else r" ?\d+"
    return re.compile(
        rf" ?[^\W\d_{CJK}]+"  # a word, with the one space before it
        rf"|[{CJK}]+"  # a run of Han or Kana, never with a space
        rf"|{digits}|\n"  # each digit, each newline alone
        rf"| ?[^\s\w{CJK}]+|_+"  # punctuation and symbols
        r"|[^\S\n]+(?= \S)|[^\S\n]+"  # other space; the last one is left to what follows it
    )


def _keeps_characters(token: bytes) -> bool:
    """Whether a token is whole characters, or a part of a single one; a merge may make nothing else."""
    heads = [i for i, byte in enumerate(token) if byte & 0xC0 != 0x80]
    if len(heads) <= 1:
        return heads in ([], [0])
    try:
        token.decode("utf-8", "surrogatepass")
        return True
    except UnicodeDecodeError:
        return False


class _Positions:
    """All pre-tokens as one array of ids, with the places of each pair; merging happens in the array.

    A token's id stands at its first and at its last byte, so both neighbours of a place are one look away.
    """

    def __init__(self, counts: Counter[str]) -> None:
        words = [word.encode("utf-8", "surrogatepass") for word in counts]
        # 0xFF occurs nowhere in UTF-8: it keeps the words apart, and the ends of the array too.
        self.ids = np.frombuffer(b"\xff" + b"".join(word + b"\xff" for word in words), np.uint8).astype(
            np.int32
        )
        self.ids[self.ids == 255] = -1
        sizes = np.array([1, *(len(word) + 1 for word in words)])
        self.weight = np.repeat(np.array([0, *counts.values()], np.int64), sizes)
        self.size = np.ones(1 << 16, np.int64)

    def bytes_pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Every pair of neighbouring bytes: where it is, and its code."""
        where = np.flatnonzero((self.ids[:-1] >= 0) & (self.ids[1:] >= 0))
        return where, (self.ids[where] * 256 + self.ids[where + 1]).astype(np.uint16)

    def merge(self, where: np.ndarray, a: int, b: int, new: int) -> tuple[np.ndarray, np.ndarray]:
        """Write `new` over every pair at `where`. Returns the pairs that this makes: where, and their codes."""
        ids, size = self.ids, self.size
        if a == b:  # in a run a a a the first two merge: keep every other place of each run
            where = np.sort(where)
            index = np.arange(len(where))
            starts = np.r_[True, np.diff(where) != size[a]]
            where = where[(index - np.maximum.accumulate(np.where(starts, index, 0))) % 2 == 0]
        size[new] = size[a] + size[b]
        ids[where + (size[a] - 1)] = ids[where + size[a]] = -1
        ids[where] = ids[where + (size[new] - 1)] = new
        after, before = ids[where + size[new]], ids[where - 1]
        right, left = after >= 0, (before >= 0) & (before != new)
        codes = np.concatenate(
            [(new << 32) + after[right].astype(np.int64), (before[left].astype(np.int64) << 32) + new]
        )
        return np.concatenate([where[right], where[left] - size[before[left]]]), codes


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    split_digits: bool = True,
    min_count: int = 2,
    progress: bool = False,
) -> BPETokenizer:
    """Learn a byte-level BPE vocabulary: merge the most frequent pair of neighbours, again and again."""
    n_merges = vocab_size - 256 - len(special_tokens)
    if n_merges < 0:
        raise ValueError(
            f"vocab_size {vocab_size} is less than 256 bytes + {len(special_tokens)} special tokens"
        )
    findall = pretoken_pattern(split_digits).findall
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(findall(text))
    return BPETokenizer(
        _learn_merges(counts, n_merges, min_count=min_count, progress=progress),
        special_tokens=special_tokens,
        split_digits=split_digits,
    )


def _learn_merges(
    counts: Counter[str], n_merges: int, *, min_count: int, progress: bool
) -> list[tuple[int, int]]:
    text, heap, places = _Positions(counts), [], {}
    tokens = [bytes([i]) for i in range(256)]

    def push(where: np.ndarray, codes: np.ndarray, shift: int) -> None:
        if not len(codes):
            return
        order = np.argsort(codes, kind="stable")
        where, codes = where[order], codes[order]
        starts = np.flatnonzero(np.r_[True, codes[1:] != codes[:-1]])
        n = np.add.reduceat(text.weight[where], starts)
        ends = np.r_[starts[1:], len(codes)]
        keep = n >= min_count
        for code, count, start, end in zip(*(x[keep].tolist() for x in (codes[starts], n, starts, ends))):
            pair = code >> shift, code & ((1 << shift) - 1)
            places[pair] = where[start:end]
            heapq.heappush(heap, (-count, pair))

    push(*text.bytes_pairs(), 8)
    merges: list[tuple[int, int]] = []
    with tqdm(total=n_merges, desc="merges", disable=not progress) as bar:
        while heap and len(merges) < n_merges:
            bound, (a, b) = heapq.heappop(heap)
            where = places.pop((a, b))
            where = where[(text.ids[where] == a) & (text.ids[where + text.size[a]] == b)]
            count = int(text.weight[where].sum())
            if count < -bound:
                if count >= min_count:
                    places[a, b] = where
                    heapq.heappush(heap, (-count, (a, b)))
                continue
            token = tokens[a] + tokens[b]
            if len(token) > MAX_TOKEN_BYTES or not _keeps_characters(token):
                continue
            new = len(tokens)
            if new == len(text.size):
                text.size = np.concatenate([text.size, np.ones_like(text.size)])
            merges.append((a, b))
            tokens.append(token)
            push(*text.merge(where, a, b, new), 32)
            bar.update()
    if len(merges) < n_merges:
        log.warning(
            "only %d of %d merges occur %d times or more: the vocabulary is smaller",
            len(merges),
            n_merges,
            min_count,
        )
    return merges


class _Pieces(dict[str, tuple[int, ...]]):
    """Piece of text → ids, computed at the first look and kept."""

    LIMIT = 1 << 18

    def __init__(self, tokens: list[bytes], merges: Sequence[tuple[int, int]], offset: int) -> None:
        super().__init__()
        self.offset, self.tokens = offset, tokens
        self.vocab = {token: index for index, token in enumerate(tokens)}
        self.parts = [(i, i) for i in range(256)] + list(merges)
        self.pairs = {pair: 256 + rank for rank, pair in enumerate(merges)}
        self.shorter = [
            next((self.vocab[token[:n]] for n in range(len(token) - 1, 0, -1) if token[:n] in self.vocab), -1)
            for token in tokens
        ]
        lengths: dict[bytes, set[int]] = {}
        for token in tokens:
            for n in (1, 2, 3):
                if len(token) >= n:
                    lengths.setdefault(token[:n], {1}).add(len(token))
        for prefix, found in lengths.items():
            found.update(n for n in (1, 2) if prefix[:n] in self.vocab)
        self.lengths = {prefix: tuple(sorted(found, reverse=True)) for prefix, found in lengths.items()}
        self.agreed: dict[tuple[int, int], bool] = {}

    def longest(self, data: bytes, start: int) -> int:
        lengths = self.lengths
        for n in lengths.get(data[start : start + 3]) or lengths.get(data[start : start + 2]) or (1,):
            token = self.vocab.get(data[start : start + n])
            if token is not None:
                return token
        raise AssertionError("every byte is a token")

    def agree(self, a: int, b: int, limit: int = sys.maxsize) -> bool:
        """Whether a, b is how BPE writes its own bytes: undo both sides' merges, newest first, and look across."""
        while self.pairs.get((a, b), limit) >= limit:
            if a > b:
                limit, a = a, self.parts[a][1]
                if a == limit:
                    return True
            else:
                if b < 256:
                    return True
                limit, b = b + 1, self.parts[b][0]
        return False

    def __missing__(self, piece: str) -> tuple[int, ...]:
        ids = tuple(index + self.offset for index in self.split(piece.encode("utf-8", "surrogatepass")))
        if len(self) >= self.LIMIT:
            self.clear()
        if len(piece) <= 64:
            self[piece] = ids
        return ids

    def split(self, data: bytes) -> list[int]:
        """The BPE tokens of `data`: the longest token that agrees with the one before it, stepping back where none does."""
        if not data:
            return []
        out: list[int] = []
        start, dead = 0, set()
        token = self.longest(data, 0)
        while True:
            end = start + len(self.tokens[token])
            if end not in dead and (not out or self._agree_cached(out[-1], token)):
                out.append(token)
                if end == len(data):
                    return out
                start, token = end, self.longest(data, end)
                continue
            token = self.shorter[token]
            while token < 0:
                dead.add(start)
                token = out.pop()
                start -= len(self.tokens[token])
                token = self.shorter[token]

    def _agree_cached(self, a: int, b: int) -> bool:
        known = self.agreed.get((a, b))
        if known is None:
            if len(self.agreed) >= 1 << 20:
                self.agreed.clear()
            known = self.agreed[a, b] = self.agree(a, b)
        return known


class BPETokenizer(Tokenizer):
    """Byte-level BPE: any string becomes ids and back, without loss. Chapter 04.

    Ids: the special tokens, then the 256 bytes, then the merges in the order in which they were learned.
    """

    def __init__(
        self,
        merges: Sequence[tuple[int, int]],
        *,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
        split_digits: bool = True,
    ) -> None:
        if len(set(special_tokens)) != len(special_tokens) or not all(special_tokens):
            raise ValueError(f"special tokens must be different and not empty, not {list(special_tokens)}")
        self.special_tokens, self.split_digits = tuple(special_tokens), split_digits
        self.merges = [(int(a), int(b)) for a, b in merges]
        tokens = [bytes([i]) for i in range(256)]
        for rank, (a, b) in enumerate(self.merges):
            if not (0 <= a < len(tokens) and 0 <= b < len(tokens)):
                raise ValueError(
                    f"merge {rank} joins {a} and {b}, but only 0 … {len(tokens) - 1} exist before it"
                )
            if len(tokens[a]) + len(tokens[b]) > MAX_TOKEN_BYTES:
                raise ValueError(f"merge {rank} makes a token of more than {MAX_TOKEN_BYTES} bytes")
            tokens.append(tokens[a] + tokens[b])
        self.special_ids = {name: index for index, name in enumerate(self.special_tokens)}
        self._bytes = [b""] * len(self.special_tokens) + tokens
        self._findall = pretoken_pattern(split_digits).findall
        self._pieces = _Pieces(tokens, self.merges, len(self.special_tokens))
        for rank, (a, b) in enumerate(self.merges):
            if not _keeps_characters(tokens[256 + rank]) or not self._pieces.agree(a, b, 256 + rank):
                raise ValueError(f"merge {rank} ({a}, {b}) is none that training can learn")

    def __reduce__(self) -> tuple[Any, ...]:
        make = partial(BPETokenizer, special_tokens=self.special_tokens, split_digits=self.split_digits)
        return make, (self.merges,)

    def _encode_plain(self, text: str) -> list[int]:
        return list(chain.from_iterable(map(self._pieces.__getitem__, self._findall(text))))

    def encode_batch(self, texts: Iterable[str], *, workers: int = 1) -> list[list[int]]:
        """The ids of many texts, each as `encode` gives them; `workers` > 1 uses as many processes."""
        texts = list(texts)
        if workers <= 1 or len(texts) < 2 * workers:
            return [self._encode_plain(text) for text in texts]
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        groups = [texts[i : i + 256] for i in range(0, len(texts), 256)]
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            return list(chain.from_iterable(pool.map(self.encode_batch, groups)))

    def save(self, path: str | Path) -> Path:
        """Write `tokenizer.json` into a folder, or the named .json file. Plain data: merges, names, one flag."""
        path = Path(path)
        path = path if path.suffix == ".json" else path / "tokenizer.json"
        with atomic_write(path) as file:
            json.dump(
                {
                    "format": "minillm.bpe",
                    "version": 1,
                    "split_digits": self.split_digits,
                    "special_tokens": list(self.special_tokens),
                    "merges": self.merges,
                },
                file,
            )
        return path

    @classmethod
    def load(cls, path: str | Path) -> BPETokenizer:
        """Read what `save` wrote.

        Raises:
            TokenizerError: the file is missing, damaged or hostile; the message says where.
        """
        path = Path(path)
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise TokenizerError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MB, no tokenizer")
            data = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(data, dict) or data.get("format") != "minillm.bpe" or data.get("version") != 1:
                raise TokenizerError(f"{path}: not a minillm tokenizer of version 1")
            merges, names, split = data["merges"], data["special_tokens"], data["split_digits"]
            if (
                not isinstance(split, bool)
                or not isinstance(names, list)
                or not all(type(n) is str for n in names)
            ):
                raise TokenizerError(
                    f"{path}: split_digits must be a bool and special_tokens a list of strings"
                )
            if not isinstance(merges, list) or not all(
                isinstance(m, list) and len(m) == 2 and all(type(i) is int for i in m) for m in merges
            ):
                raise TokenizerError(f"{path}: merges must be a list of pairs of integers")
            return cls([(a, b) for a, b in merges], special_tokens=names, split_digits=split)
        except (OSError, ValueError, KeyError, RecursionError) as error:
            raise TokenizerError(f"{path}: {type(error).__name__}: {error}") from error


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model behind the same methods. Chapter 04."""

    def __init__(self, model: bytes) -> None:
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, TypeError) as error:
            raise TokenizerError(f"not a SentencePiece model: {error}") from error
        self._model = model
        sp = self._sp
        count = sp.vocab_size()
        self._bytes, self.special_ids, self._byte_ids = [], {}, {}
        for index in range(count):
            piece = sp.id_to_piece(index)
            if sp.is_control(index) or sp.is_unknown(index):
                self.special_ids[piece] = index
                self._bytes.append(b"")
            elif sp.is_byte(index):
                self._byte_ids[int(piece[3:5], 16)] = index
                self._bytes.append(bytes([int(piece[3:5], 16)]))
            else:
                self._bytes.append(piece.replace("\u2581", " ").encode())

    @property
    def bos_id(self) -> int:
        """The id that begins a document."""
        return self._known(self._sp.bos_id(), "bos")

    @property
    def eos_id(self) -> int:
        """The id that ends a document."""
        return self._known(self._sp.eos_id(), "eos")

    @property
    def pad_id(self) -> int:
        """The id that fills a batch; where the model has none (LLaMA), that of the unknown token."""
        pad = self._sp.pad_id()
        return pad if pad >= 0 else self._sp.unk_id()

    def _known(self, index: int, name: str) -> int:
        if index < 0:
            raise ValueError(f"this SentencePiece model has no {name} token")
        return index

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePieceTokenizer, (self._model,)

    def _encode_plain(self, text: str) -> list[int]:
        if len(self._byte_ids) < 256:
            return self._sp.encode(text)
        ids: list[int] = []
        # SentencePiece writes a space as U+2581 and cannot hold a surrogate: those go in as bytes.
        for part in re.split("([\u2581\ud800-\udfff]+)", text):
            if part and (part[0] == "\u2581" or "\ud800" <= part[0] <= "\udfff"):
                ids += [self._byte_ids[byte] for byte in part.encode("utf-8", "surrogatepass")]
            elif part:
                ids += self._sp.encode(part)
        return ids

    def save(self, path: str | Path) -> Path:
        """Write `tokenizer.model` into a folder, or the named .model file; SentencePiece itself reads it."""
        path = Path(path)
        path = path if path.suffix == ".model" else path / "tokenizer.model"
        with atomic_write(path, "wb") as file:
            file.write(self._model)
        return path

    @classmethod
    def load(cls, path: str | Path) -> SentencePieceTokenizer:
        """Read a `.model` file.

        Raises:
            TokenizerError: the file is missing or no SentencePiece model.
        """
        try:
            return cls(Path(path).read_bytes())
        except (OSError, TokenizerError) as error:
            raise TokenizerError(f"{path}: {error}") from error


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    *,
    model_type: Literal["bpe", "unigram"] = "bpe",
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    split_digits: bool = True,
    byte_fallback: bool = True,
    character_coverage: float = 0.9995,
) -> SentencePieceTokenizer:
    """Train a SentencePiece model that changes nothing in the text: no normalisation, no added space."""
    model = io.BytesIO()
    lines = (line for text in texts for line in text.split("\n") if line)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        vocab_size=vocab_size,
        model_type=model_type,
        split_digits=split_digits,
        byte_fallback=byte_fallback,
        character_coverage=character_coverage,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        max_sentence_length=1 << 20,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece=PAD,
        bos_piece=BOS,
        eos_piece=EOS,
        control_symbols=[name for name in special_tokens if name not in (PAD, BOS, EOS)],
        num_threads=1,
        minloglevel=2,
    )
    return SentencePieceTokenizer(model.getvalue())


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer from its file, or from a folder that holds `tokenizer.json` or `tokenizer.model`.

    Raises:
        TokenizerError: nothing there, or not a tokenizer.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
        if not found:
            raise TokenizerError(f"{path}: neither tokenizer.json nor tokenizer.model here")
        path = found[0]
    return SentencePieceTokenizer.load(path) if path.suffix == ".model" else BPETokenizer.load(path)


@dataclass(frozen=True, kw_only=True)
class Compression:
    """How many tokens a text takes. Fewer is better. Chapter 04."""

    tokens: int
    chars: int
    bytes: int

    @property
    def tokens_per_char(self) -> float:
        """Tokens for each Unicode character."""
        return self.tokens / self.chars

    @property
    def tokens_per_byte(self) -> float:
        """Tokens for each byte of UTF-8."""
        return self.tokens / self.bytes


def compression(tokenizer: Tokenizer, texts: Iterable[str]) -> Compression:
    """Count tokens, characters and UTF-8 bytes of texts.

    Raises:
        ValueError: there is no text.
    """
    texts = list(texts)
    chars = sum(map(len, texts))
    if not chars:
        raise ValueError("compression needs some text; these texts are empty")
    return Compression(
        tokens=sum(map(len, tokenizer.encode_batch(texts))),
        chars=chars,
        bytes=sum(len(text.encode("utf-8", "surrogatepass")) for text in texts),
    )
