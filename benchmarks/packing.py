"""Does it matter how documents share rows? Held-out loss of one small model, three packings, about equal tokens a step.

python -m benchmarks.packing          # about ten minutes on one core; writes data/results/packing.json
"""

import json
import sys
import tempfile
from pathlib import Path

from minillm.base.files import atomic_write
from minillm.base.machine import describe_machine, seed_everything
from minillm.batches import Loader
from minillm.kernels.matmul import tune_allocator
from minillm.runs.keeper import RunKeeper
from minillm.storage.shards import TokenShards, write_shards
from minillm.tokenizer import train_bpe
from minillm.train import StepInfo, TrainConfig, evaluate_loss, train
from minillm.transformer import ModelConfig, Transformer
from minillm.world.stream import documents
from minillm.world.task import CorpusConfig

RESULTS = Path(__file__).parent.parent / "data" / "results" / "packing.json"
STEPS = (100, 200, 400, 800, 1200)
SEEDS = (0, 1, 2)
ROWS = {"documents": 4, "concat": 4, "rows": 9}  # about 1,000 tokens a step each
VOCAB = 512


def make_shards(folder: Path) -> dict[str, TokenShards]:
    """Training and held-out documents of the own corpus, as tokens."""
    texts = {
        split: [d.text for d in documents(CorpusConfig(), n_documents=n, split=split)]
        for split, n in (("train", 12_000), ("heldout", 300))
    }
    tokenizer = train_bpe(texts["train"][:1000], VOCAB)
    for split, split_texts in texts.items():
        write_shards(
            tokenizer.encode_batch(split_texts), folder / split, vocab_size=VOCAB, eos_id=tokenizer.eos_id
        )
    return {split: TokenShards(folder / split) for split in texts}


def curve(shards: dict[str, TokenShards], packing: str, seed: int) -> list[float]:
    """Held-out loss after each of STEPS; the learning rate stays constant, so that each point stands for itself."""
    seed_everything(seed)
    model = Transformer(
        ModelConfig(
            vocab_size=VOCAB,
            dim=64,
            n_layers=2,
            n_heads=4,
            n_kv_heads=2,
            hidden_dim=176,
            max_seq_len=256,
            tied=True,
        )
    )
    loader = Loader(shards["train"], batch_size=ROWS[packing], seq_len=256, seed=seed, packing=packing)
    held_out = list(Loader(shards["heldout"], batch_size=16, seq_len=256, packing="rows").epoch_batches())
    losses: list[float] = []

    def measure(info: StepInfo) -> None:
        if info.step in STEPS:
            losses.append(evaluate_loss(model, held_out))

    config = TrainConfig(
        steps=max(STEPS),
        batch_size=ROWS[packing],
        seq_len=256,
        max_lr=3e-3,
        min_lr_ratio=1.0,
        warmup_steps=20,
        seed=seed,
    )
    train(model, loader, config, keeper=RunKeeper(on_step=measure, progress=False))
    return losses


def main() -> int:
    tune_allocator()
    with tempfile.TemporaryDirectory() as folder:
        shards = make_shards(Path(folder))
        losses = {packing: [curve(shards, packing, seed) for seed in SEEDS] for packing in ROWS}
    result = {
        "command": "python -m benchmarks.packing",
        "machine": describe_machine(),
        "steps": STEPS,
        "seeds": SEEDS,
        "rows_a_step": ROWS,
        "seq_len": 256,
        "held_out_nats": losses,
    }
    with atomic_write(RESULTS) as file:
        json.dump(result, file, indent=1)
    print(json.dumps(losses, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
