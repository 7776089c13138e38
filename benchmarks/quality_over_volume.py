"""Quality over volume: one small model on raw text and on cleaned text, equal tokens, measured on clean held-out text.

python -m benchmarks.quality_over_volume     # about half an hour on one core; writes data/results/quality_over_volume.json

The raw text is the project's own corpus with 30 and with 50 percent of planted defects. The cleaned text is what
`minillm clean --recipe own` makes of it. "sound" is the same corpus without defects: the most that cleaning could give.
Every run makes the same number of steps over full rows, and so reads the same number of tokens, each at most once. The
last runs answer with volume: up to four times as many tokens, which is nearly all of the raw text once, and the clean
text one and a half times.
"""

import json
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev

from minillm.base.files import atomic_write
from minillm.base.machine import describe_machine, seed_everything
from minillm.batches import Loader
from minillm.kernels.matmul import tune_allocator
from minillm.pipeline.run import clean
from minillm.pipeline.steps import clean_recipe, default_steps
from minillm.readers.documents import read_documents, write_documents
from minillm.runs.keeper import RunKeeper
from minillm.storage.shards import TokenShards, write_shards
from minillm.tokenizer import Tokenizer, train_bpe
from minillm.train import StepInfo, TrainConfig, evaluate_loss, train
from minillm.transformer import ModelConfig, Transformer
from minillm.world.defects import benchmark_item
from minillm.world.stream import documents
from minillm.world.task import CorpusConfig

RESULTS = Path(__file__).parent.parent / "data" / "results" / "quality_over_volume.json"
SHARES = (0.3, 0.5)
MORE = (1.5, 2, 4)  # times as many tokens, of the first share
SEEDS = (0, 1, 2)
DOCUMENTS = 12_000  # of raw text; enough for STEPS steps after cleaning, and for four times as many before it
STEPS, BATCH, SEQ_LEN, VOCAB = 400, 4, 256, 512
EVAL_EVERY = 100


def make_texts(folder: Path) -> tuple[dict[str, list[str]], dict[str, dict]]:
    """The texts of each way to train, and what cleaning did."""
    texts, books = {}, {}
    sound = documents(CorpusConfig(), n_documents=DOCUMENTS)
    texts["sound"] = [document.text for document in sound]
    texts["heldout"] = [
        document.text for document in documents(CorpusConfig(), n_documents=500, split="heldout")
    ]
    for share in SHARES:
        config, name = CorpusConfig(defects=share), f"{share:g}"
        write_documents(documents(config, n_documents=DOCUMENTS), folder / f"{name}.jsonl")
        write_documents((benchmark_item(config, number) for number in range(200)), folder / "benchmark.jsonl")
        own = clean_recipe("own")
        steps = default_steps(_against(own, str(folder / "benchmark.jsonl")), [str(folder / f"{name}.jsonl")])
        report = clean(folder / f"{name}.jsonl", steps, folder / f"clean-{name}", report=False)
        texts[f"raw {name}"] = [d.text for d in read_documents(folder / f"{name}.jsonl", max_chars=10**7)]
        texts[f"clean {name}"] = [d.text for d in read_documents(folder / f"clean-{name}" / "documents")]
        books[name] = report["balance"]
    return texts, books


def _against(config, path):
    import dataclasses

    return dataclasses.replace(
        config, decontaminate=dataclasses.replace(config.decontaminate, against=(path,))
    )


def make_shards(folder: Path, texts: dict[str, list[str]], tokenizer: Tokenizer) -> dict[str, TokenShards]:
    """All texts as tokens of one tokenizer, so that losses can be compared."""
    shards = {}
    for name, pool in texts.items():
        place = folder / name.replace(" ", "-")
        write_shards(tokenizer.encode_batch(pool), place, vocab_size=VOCAB, eos_id=tokenizer.eos_id)
        shards[name] = TokenShards(place)
    return shards


def curve(train_on: TokenShards, held_out: list, seed: int, steps: int) -> list[float]:
    """Held-out loss in nats a token every EVAL_EVERY steps; the learning rate falls to the end."""
    seed_everything(seed)
    model = Transformer(
        ModelConfig(
            vocab_size=VOCAB,
            dim=96,
            n_layers=2,
            n_heads=4,
            n_kv_heads=2,
            hidden_dim=256,
            max_seq_len=SEQ_LEN,
            tied=True,
        )
    )
    losses: list[float] = []

    def measure(info: StepInfo) -> None:
        if info.step % EVAL_EVERY == 0:
            losses.append(evaluate_loss(model, held_out))

    loader = Loader(train_on, batch_size=BATCH, seq_len=SEQ_LEN, seed=seed, packing="concat")
    config = TrainConfig(
        steps=steps,
        batch_size=BATCH,
        seq_len=SEQ_LEN,
        max_lr=3e-3,
        warmup_steps=20,
        seed=seed,
        decay_fraction=0.5,
    )
    train(model, loader, config, keeper=RunKeeper(on_step=measure, progress=False))
    return losses


def main() -> int:
    tune_allocator()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts, books = make_texts(folder)
        # A vocabulary from sound text: its choice is no advantage of any of the two.
        tokenizer = train_bpe(texts["sound"][:1000], VOCAB)
        shards = make_shards(folder / "shards", texts, tokenizer)
        held_out = list(
            Loader(shards["heldout"], batch_size=16, seq_len=SEQ_LEN, packing="rows").epoch_batches()
        )
        ways = {way: (way, STEPS) for way in texts if way != "heldout"}
        for text in (f"raw {SHARES[0]:g}", f"clean {SHARES[0]:g}"):
            ways |= {f"{text} x{times:g}": (text, int(times * STEPS)) for times in MORE}
        losses = {}
        for way, (text, steps) in ways.items():
            losses[way] = [curve(shards[text], held_out, seed, steps) for seed in SEEDS]
            last = [line[-1] for line in losses[way]]
            print(f"{way:12} {mean(last):.4f} ± {stdev(last):.4f}", flush=True)
    result = {
        "command": "python -m benchmarks.quality_over_volume",
        "machine": describe_machine(),
        "documents": DOCUMENTS,
        "books": books,
        "tokens_a_step": BATCH * SEQ_LEN,
        "steps": STEPS,
        "eval_every": EVAL_EVERY,
        "seeds": SEEDS,
        "tokens": {text: shards[text].n_tokens for text, _ in ways.values()},
        "held_out_nats": losses,
    }
    with atomic_write(RESULTS) as file:
        json.dump(result, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
