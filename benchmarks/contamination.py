"""The exam in the textbook: one small model trained with and without a leaked benchmark, and canaries of 1 to 32 copies.

python -m benchmarks.contamination       # about five minutes on one quiet core; writes data/results/dedup-contamination.json
"""

import json
import math
import sys
import tempfile
from pathlib import Path

import torch

from minillm.base.files import atomic_write
from minillm.base.machine import describe_machine, seed_everything
from minillm.batches import Loader
from minillm.corpus import Document, dice
from minillm.dedup import Decontaminate
from minillm.extract import Drop
from minillm.kernels.matmul import tune_allocator
from minillm.storage.shards import TokenShards, write_shards
from minillm.tokenizer import BPETokenizer, train_bpe
from minillm.train import TrainConfig, train
from minillm.transformer import ModelConfig, Transformer
from minillm.world.defects import COPIES, benchmark_item, canary
from minillm.world.stream import documents
from minillm.world.task import CorpusConfig

RESULTS = Path(__file__).parent.parent / "data" / "results" / "dedup-contamination.json"
CORPUS = CorpusConfig(knowledge=0.1)
ITEMS, CANARIES = 6, 4  # for each number of copies
DOCUMENTS, EPOCHS, ROWS, VOCAB = 3_600, 8, 9, 512
SEEDS = (0,)
ALTERNATIVES = 255  # so that the exposure of a canary is at most 8 bits


def corpora() -> dict[str, list[str]]:
    """The training texts with leaks and canaries, and the same after decontamination, topped up to the same number."""
    planted = [
        Document(benchmark_item(CORPUS, 2 * (len(COPIES) * i + level)).text)
        for level, copies in enumerate(COPIES)
        for i in range(ITEMS)
        for _ in range(copies)
    ]
    planted += [
        Document(canary(CORPUS, 2 * (len(COPIES) * i + level)))
        for level, copies in enumerate(COPIES)
        for i in range(CANARIES)
        for _ in range(copies)
    ]
    clean = documents(CORPUS)
    leaky = [next(clean) for _ in range(DOCUMENTS - len(planted))] + planted
    step = Decontaminate(benchmark_item(CORPUS, number) for number in range(2 * ITEMS * len(COPIES)))
    cleaned = [document for document in leaky if not isinstance(step(document), Drop)]
    while len(cleaned) < DOCUMENTS:
        document = next(clean)
        if not isinstance(step(document), Drop):
            cleaned.append(document)
    return {"leaky": [d.text for d in leaky], "cleaned": [d.text for d in cleaned]}


def train_on(texts: list[str], tokenizer: BPETokenizer, seed: int) -> Transformer:
    """A small model that has read each text EPOCHS times."""
    with tempfile.TemporaryDirectory() as folder:
        ids = tokenizer.encode_batch(texts)
        write_shards(ids, Path(folder) / "t", vocab_size=VOCAB, eos_id=tokenizer.eos_id)
        seed_everything(seed)
        size = {"dim": 96, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 256}
        model = Transformer(ModelConfig(vocab_size=VOCAB, max_seq_len=256, tied=True, **size))
        loader = Loader(
            TokenShards(Path(folder) / "t"), batch_size=ROWS, seq_len=256, seed=seed, packing="rows"
        )
        steps = EPOCHS * len(texts) // ROWS
        config = TrainConfig(
            steps=steps, batch_size=ROWS, seq_len=256, max_lr=3e-3, warmup_steps=20, seed=seed
        )
        train(model, loader, config)
    return model.eval()


@torch.no_grad()
def answered(model: Transformer, tokenizer: BPETokenizer, item: Document) -> list[bool]:
    """For each question of an item: would the most likely continuation, token by token, be the answer?"""
    ids = tokenizer.encode(item.text)[:256]
    best = model(torch.tensor([ids]))[0].argmax(-1).tolist()
    ends, size = [], 0
    for token in ids:
        size += len(tokenizer.decode_bytes([token]))
        ends.append(size)
    right = []
    for start, end, _ in item.meta["answers"]:
        first, last = (len(item.text[:place].encode()) for place in (start, end))
        inside = [i for i in range(1, len(ids)) if ends[i] > first and ends[i - 1] < last]
        if inside and ends[-1] >= last:
            right.append(all(best[i - 1] == ids[i] for i in inside))
    return right


@torch.no_grad()
def exposure(model: Transformer, tokenizer: BPETokenizer, number: int) -> float:
    """log2(256 / rank) of a canary's loss among the losses of as many random codes: 8 bits is known by heart, 1.4 on average is chance."""
    true = canary(CORPUS, number)
    head, r = true.partition(": ")[0], dice("alternatives", number)
    texts = [true] + [
        f"{head}: " + " ".join(str(int(r() * 10)) for _ in range(10)) + "." for _ in range(ALTERNATIVES)
    ]
    losses = []
    for text in texts:
        ids = torch.tensor(tokenizer.encode(text))
        logits = model(ids[None, :-1])[0]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item())
    rank = 1 + sum(loss < losses[0] for loss in losses[1:])
    return math.log2((ALTERNATIVES + 1) / rank)


def main() -> int:
    tune_allocator()
    texts = corpora()
    tokenizer = train_bpe(texts["cleaned"][:1000], VOCAB)
    runs = []
    for seed in SEEDS:
        for name in texts:
            model = train_on(texts[name], tokenizer, seed)
            scores: dict[str, list[bool]] = {}
            exposures: dict[str, list[float]] = {}
            for number in range(2 * ITEMS * len(COPIES)):
                copies = "0" if number % 2 else str(COPIES[number // 2 % len(COPIES)])
                scores.setdefault(copies, []).extend(
                    answered(model, tokenizer, benchmark_item(CORPUS, number))
                )
            for number in range(2 * CANARIES * len(COPIES)):
                copies = "0" if number % 2 else str(COPIES[number // 2 % len(COPIES)])
                if name == "leaky":
                    exposures.setdefault(copies, []).append(exposure(model, tokenizer, number))
            run = {
                "corpus": name,
                "seed": seed,
                "right": {copies: [sum(found), len(found)] for copies, found in scores.items()},
                "exposure_bits": exposures,
            }
            print(json.dumps(run), flush=True)
            runs.append(run)
    result = {
        "command": "python -m benchmarks.contamination",
        "machine": describe_machine(),
        "documents": DOCUMENTS,
        "epochs": EPOCHS,
        "items_per_level": ITEMS,
        "canaries_per_level": CANARIES,
        "runs": runs,
    }
    with atomic_write(RESULTS) as file:
        json.dump(result, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
