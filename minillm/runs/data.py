"""From text to shards of tokens: the stages corpus, tokenizer and shards, and the loaders of what they make."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import ClassVar

from tqdm.auto import tqdm

from minillm.base.errors import MiniLLMError
from minillm.base.files import need_disk
from minillm.batches import Loader
from minillm.runs.folder import Record, RunFolder, Stage
from minillm.runs.recipes import RunConfig
from minillm.runs.text import SPLITS, SplitCounts, TextStore, read_split
from minillm.storage.shards import TokenShards, write_shards
from minillm.tokenizer import Tokenizer, load_tokenizer, train_bpe, train_sentencepiece

ENCODE_BATCH = 2000

OPENINGS, OPENING_CHARACTERS = 3, 40  # beginnings of held-out documents, for samples of real text


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusCounts(Record):
    """What there is to read, and how some held-out documents begin."""

    key: ClassVar[str] = "counts"
    heldout: SplitCounts
    train: SplitCounts
    openings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """How much there is in the token files of one side of the split; `bytes` is of the text, in UTF-8."""

    tokens: int
    documents: int
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardCounts(Record):
    """What was written as tokens."""

    key: ClassVar[str] = "shards_counts"
    heldout: TokenCounts
    train: TokenCounts


def stored_text(run: RunFolder) -> TextStore:
    """The text of a run, whole. What is not on the disk is read now."""
    return TextStore(run.path / "text", run.config).fill(progress=run.launch.progress)


def openings(run: RunFolder) -> tuple[str, ...]:
    """How some held-out documents begin; a run of an older version did not write them down, and reads them now."""
    kept = run.found(CorpusCounts).openings
    if kept:
        return kept
    data = run.config.data
    made = read_split(run.config, data.sources or SPLITS, data.held_out)
    return _openings(document.text for split, document in made if split == "heldout")


def _openings(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(text[:OPENING_CHARACTERS] for text in islice(texts, OPENINGS))


def _corpus(run: RunFolder) -> str:
    """Read all text once. It must be readable and hold enough; count what there is."""
    text = stored_text(run)
    heldout, train = (text.counts(split) for split in SPLITS)
    if train.documents < 2 or heldout.documents < 1:
        raise MiniLLMError(
            f"{', '.join(run.config.data.sources) or 'the corpus'}: {train.documents} documents to train on, "
            f"{heldout.documents} held out by a hash of each: a run needs at least 2 and 1; give more text"
        )
    run.remember(CorpusCounts(heldout=heldout, train=train, openings=_openings(text.texts("heldout"))))
    languages = Counter((heldout + train).languages)
    mix = ", ".join(f"{lang} {100 * n / languages.total():.0f} %" for lang, n in languages.most_common(4))
    return f"{train.documents:,} documents, {train.characters / 1e6:.1f}M characters ({mix})"


def _limited(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def _tokenizer(run: RunFolder) -> str:
    """Learn a vocabulary from the beginning of the training text."""
    settings = run.config.tokenizer
    texts = _limited(stored_text(run).texts("train"), settings.train_characters)
    if settings.kind == "bpe":
        tokenizer = train_bpe(texts, settings.vocab_size)
    else:
        tokenizer = train_sentencepiece(texts, settings.vocab_size)
    tokenizer.save(run.path / "tokenizer.json")
    return f"{tokenizer.vocab_size:,} tokens ({settings.kind})"


def _shards(run: RunFolder) -> str:
    """Write both sides of the split as tokens."""
    tokenizer, text = run_tokenizer(run), stored_text(run)
    written = {}
    for split in SPLITS:
        index = write_shards(
            _encoded(run, tokenizer, text, split),
            run.path / "shards" / split,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
        )
        counts = text.counts(split)
        written[split] = TokenCounts(tokens=index.n_tokens, documents=index.n_documents, bytes=counts.bytes)
    run.remember(ShardCounts(**written))
    tokens, characters = written["train"].tokens, text.counts("train").characters
    return f"{tokens / 1e6:.2f}M training tokens, {tokens / characters:.2f} per character"


def _encoded(run: RunFolder, tokenizer: Tokenizer, text: TextStore, split: str) -> Iterator[list[int]]:
    """The documents of a split as ids; the first batch tells how much room all will take."""
    counts, texts, first = text.counts(split), text.texts(split), True
    hidden = not run.launch.progress
    with tqdm(total=counts.documents, disable=hidden, unit="doc", desc=f"encode {split}", leave=False) as bar:
        while batch := list(islice(texts, ENCODE_BATCH)):
            ids = tokenizer.encode_batch(batch)
            if first:  # the whole will be about as dense as its beginning
                tokens = sum(map(len, ids)) * counts.characters / max(1, sum(map(len, batch)))
                width = 2 if tokenizer.vocab_size <= 1 << 16 else 4
                need_disk(run.path, int(width * tokens), f"about {tokens / 1e6:,.0f}M tokens")
                first = False
            yield from ids
            bar.update(len(batch))


DATA_STAGES = (
    Stage(name="corpus", work=_corpus),
    Stage(name="tokenizer", work=_tokenizer, makes="tokenizer.json"),
    Stage(name="shards", work=_shards, makes="shards"),
)


def run_tokenizer(run: RunFolder) -> Tokenizer:
    """The vocabulary of a run. Little text may hold fewer tokens than were asked for."""
    return load_tokenizer(run.path / "tokenizer.json")


def verify_shards(run: RunFolder) -> None:
    """Read every token file once: a flipped bit would be trained on, and nobody would ever know. Then the text may go.

    Raises:
        MiniLLMError: a file is missing or damaged; the message says how to write it again.
    """
    for split in SPLITS:
        try:
            TokenShards(run.path / "shards" / split, verify=True)
        except MiniLLMError as error:
            raise MiniLLMError(
                f"{error}. Remove {run.path / 'shards'}: the same command writes it again, and goes on"
            ) from error
    TextStore(run.path / "text", run.config).remove()


def train_loader(run: RunFolder, config: RunConfig) -> Loader:
    """This process's share of the batches to train on."""
    return Loader(
        TokenShards(run.path / "shards" / "train"),
        batch_size=config.train.batch_size,
        seq_len=config.train.seq_len,
        seed=config.train.seed,
        rank=run.launch.peers.rank,
        world_size=run.launch.peers.world_size,
    )


def held_out_loader(run: RunFolder, config: RunConfig) -> Loader:
    """This process's share of the batches to measure with: one document a row."""
    return Loader(
        TokenShards(run.path / "shards" / "heldout"),
        batch_size=16,
        seq_len=config.train.seq_len,
        packing="rows",
        rank=run.launch.peers.rank,
        world_size=run.launch.peers.world_size,
    )
