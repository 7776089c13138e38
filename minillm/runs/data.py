"""From text to shards of tokens: the corpus of a run, its tokenizer, its loaders."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice

from tqdm.auto import tqdm

from minillm.base.errors import MiniLLMError
from minillm.base.files import need_disk
from minillm.batches import Loader
from minillm.corpus import Document
from minillm.readers.documents import read_documents
from minillm.runs.folder import _Run
from minillm.runs.recipes import RunConfig
from minillm.storage.shards import TokenShards, write_shards
from minillm.tokenizer import load_tokenizer, train_bpe, train_sentencepiece
from minillm.world.stream import documents

HELD_OUT_SHARE = 0.02  # of the documents of real text, by a hash of each

ENCODE_BATCH = 2000


def run_documents(config: RunConfig, split: str) -> Iterator[Document]:
    """The documents that a run trains on (split "train") or measures with ("heldout")."""
    data = config.data
    if not data.sources:
        yield from documents(
            data.corpus, n_documents=data.documents if split == "train" else data.held_out, split=split
        )
        return
    held_out, characters = 0, 4 * config.train.seq_len
    read = read_documents(list(data.sources), on_error="skip")
    for document in (
        dataclasses.replace(d, text=text) for d in read for text in passages(d.text, characters)
    ):
        digest = hashlib.blake2b(document.text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        if int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**64 and held_out < data.held_out:
            held_out += 1
            if split == "heldout":
                yield document
        elif split == "train":
            yield document


def passages(text: str, characters: int) -> Iterator[str]:
    """A text in passages of about so many characters, cut at the ends of lines where it can be; a whole book is one document."""
    while len(text) > characters:
        line, word = (text.rfind(end, characters // 2, characters) + 1 for end in "\n ")
        cut = line or word or characters
        yield text[:cut]
        text = text[cut:]
    if text:
        yield text


def _corpus(run: _Run) -> str:
    """Look through the data once: it must be readable and hold enough; count what there is."""
    counts = {}
    languages: Counter[str] = Counter()
    for split in ("heldout", "train"):
        count = characters = 0
        bar = tqdm(
            run_documents(run.config, split),
            disable=not run.progress,
            unit="doc",
            desc=f"corpus {split}",
            leave=False,
        )
        for document in bar:
            count, characters = count + 1, characters + len(document.text)
            languages[document.lang] += 1
        counts[split] = {"documents": count, "characters": characters}
    if counts["train"]["documents"] < 2 or counts["heldout"]["documents"] < 1:
        raise MiniLLMError(
            f"{', '.join(run.config.data.sources) or 'the corpus'}: {counts['train']['documents']} documents to train on, "
            f"{counts['heldout']['documents']} held out by a hash of each: a run needs at least 2 and 1; give more text"
        )
    run.done["counts"] = counts
    mix = ", ".join(f"{lang} {100 * n / languages.total():.0f} %" for lang, n in languages.most_common(4))
    return f"{counts['train']['documents']:,} documents, {counts['train']['characters'] / 1e6:.1f}M characters ({mix})"


def _limited(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def _tokenizer(run: _Run) -> str:
    settings = run.config.tokenizer
    texts = _limited((d.text for d in run_documents(run.config, "train")), settings.train_characters)
    if settings.kind == "bpe":
        tokenizer = train_bpe(texts, settings.vocab_size)
    else:
        tokenizer = train_sentencepiece(texts, settings.vocab_size)
    tokenizer.save(run.folder / "tokenizer.json")
    return f"{tokenizer.vocab_size:,} tokens ({settings.kind})"


def _shards(run: _Run) -> str:
    tokenizer = load_tokenizer(run.folder / "tokenizer.json")
    counts = {}
    for split in ("heldout", "train"):
        texts, n_bytes = (d.text for d in run_documents(run.config, split)), 0

        def encoded(texts: Iterator[str] = texts, split: str = split) -> Iterator[list[int]]:
            nonlocal n_bytes
            total, first = run.done["counts"][split], not n_bytes
            with tqdm(
                total=total["documents"],
                disable=not run.progress,
                unit="doc",
                desc=f"encode {split}",
                leave=False,
            ) as bar:
                while batch := list(islice(texts, ENCODE_BATCH)):
                    n_bytes += sum(len(text.encode("utf-8", "surrogatepass")) for text in batch)
                    ids = tokenizer.encode_batch(batch)
                    if first:  # the whole will be about as dense as its beginning
                        tokens = sum(map(len, ids)) * total["characters"] / max(1, sum(map(len, batch)))
                        width = 2 if tokenizer.vocab_size <= 1 << 16 else 4
                        need_disk(run.folder, int(width * tokens), f"about {tokens / 1e6:,.0f}M tokens")
                        first = False
                    yield from ids
                    bar.update(len(batch))

        index = write_shards(
            encoded(), run.folder / "shards" / split, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id
        )
        counts[split] = {"tokens": index.n_tokens, "documents": index.n_documents, "bytes": n_bytes}
    run.done["shards_counts"] = counts
    tokens = counts["train"]["tokens"]
    ratio = tokens / run.done["counts"]["train"]["characters"]
    return f"{tokens / 1e6:.2f}M training tokens, {ratio:.2f} per character"


def _shards_of(run: _Run, split: str) -> TokenShards:
    return TokenShards(run.folder / "shards" / split)


def _verify_shards(run: _Run) -> None:
    """Read every token file once: a flipped bit would be trained on, and nobody would ever know."""
    for split in ("heldout", "train"):
        try:
            TokenShards(run.folder / "shards" / split, verify=True)
        except MiniLLMError as error:
            raise MiniLLMError(
                f"{error}. Remove {run.folder / 'shards'}: the same command writes it again, and goes on"
            ) from error


def _loader(run: _Run, config: RunConfig) -> Loader:
    return Loader(
        _shards_of(run, "train"),
        batch_size=config.train.batch_size,
        seq_len=config.train.seq_len,
        seed=config.train.seed,
        rank=run.world.rank,
        world_size=run.world.world_size,
    )


def _held_out(run: _Run, config: RunConfig) -> Loader:
    return Loader(
        _shards_of(run, "heldout"),
        batch_size=16,
        seq_len=config.train.seq_len,
        packing="rows",
        rank=run.world.rank,
        world_size=run.world.world_size,
    )
