"""`minillm tokenizer`: train, encode, decode."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from minillm.base.errors import MiniLLMError
from minillm.cli.parsing import parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerTrain:
    """Learn a vocabulary from text, and say how well it compresses."""

    files: tyro.conf.Positional[tuple[str, ...]] = ()
    """Files (txt, jsonl, parquet; gz, zst), folders, `stdlib:`; none for the own corpus."""
    out: Path = Path("tokenizer.json")
    """Where it is written."""
    vocab_size: int = 4096
    """Tokens, bytes and special ones included."""
    kind: Literal["bpe", "sentencepiece"] = "bpe"
    """Ours from chapter 07, or SentencePiece's BPE."""
    max_characters: int = 10_000_000
    """Read at most so much text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerEncode:
    """Turn text into token ids, a line each."""

    text: Annotated[str | None, tyro.conf.Positional] = None
    """The text; by default standard input, line by line."""
    tokenizer: Path = Path("tokenizer.json")
    """A tokenizer's file, or a run's folder."""
    pieces: bool = False
    """Show the pieces instead of the ids."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerDecode:
    """Turn token ids back into text."""

    ids: tyro.conf.Positional[tuple[int, ...]] = ()
    """The ids; by default standard input, a line of ids each."""
    tokenizer: Path = Path("tokenizer.json")
    """A tokenizer's file, or a run's folder."""


def _load_tokenizer(path: Path) -> Any:
    from minillm.tokenizer import load_tokenizer

    return load_tokenizer(path / "tokenizer.json" if path.is_dir() else path)


def _tokenizer(argv: Sequence[str]) -> int:
    commands = {"train": TokenizerTrain, "encode": TokenizerEncode, "decode": TokenizerDecode}
    if not argv or argv[0] not in commands:
        wanted = bool(argv) and argv[0] in ("-h", "--help")
        text = "minillm tokenizer train | encode | decode    (each with --help)"
        print(text if wanted else f"minillm: error: {text}", file=sys.stdout if wanted else sys.stderr)
        return 0 if wanted else 2
    args: Any = parse(commands[argv[0]], prog=f"minillm tokenizer {argv[0]}", args=list(argv[1:]))
    if argv[0] == "train":
        return _tokenizer_train(args)
    tokenizer = _load_tokenizer(args.tokenizer)
    if argv[0] == "encode":
        for text in [args.text] if args.text is not None else (line.rstrip("\n") for line in sys.stdin):
            ids = tokenizer.encode(text)
            print("|".join(tokenizer.decode([i]) for i in ids) if args.pieces else " ".join(map(str, ids)))
        return 0
    for ids in [list(args.ids)] if args.ids else (line.split() for line in sys.stdin):
        try:
            numbers = [int(i) for i in ids]
        except ValueError:
            raise ValueError(f"token ids are whole numbers, got {' '.join(map(str, ids))!r}") from None
        if bad := [i for i in numbers if not 0 <= i < tokenizer.vocab_size]:
            raise ValueError(f"token id {bad[0]} is not in 0..{tokenizer.vocab_size - 1}")
        print(tokenizer.decode(numbers))
    return 0


def _tokenizer_train(args: TokenizerTrain) -> int:
    from minillm.readers.documents import read_documents
    from minillm.tokenizer import compression, train_bpe, train_sentencepiece
    from minillm.world.stream import documents
    from minillm.world.task import CorpusConfig

    texts, characters = [], 0
    for document in read_documents(list(args.files)) if args.files else documents(CorpusConfig()):
        texts.append(document.text)
        characters += len(document.text)
        if characters >= args.max_characters:
            break
    if not texts:
        raise MiniLLMError(f"{', '.join(args.files)}: no text to learn from")
    start = time.monotonic()
    if args.kind == "bpe":
        tokenizer = train_bpe(texts, args.vocab_size, progress=True)
    else:
        tokenizer = train_sentencepiece(texts, args.vocab_size)
    tokenizer.save(args.out)
    rate = compression(tokenizer, texts[:2000])
    print(
        f"{args.out}: {tokenizer.vocab_size:,} tokens from {characters:,} characters in {time.monotonic() - start:.1f} s; "
        f"{rate.tokens_per_char:.3f} tokens a character, {rate.tokens_per_byte:.3f} a byte"
    )
    return 0
