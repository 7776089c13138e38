"""What does repeated text cost? Held-out loss of one small model at equal tokens, each document k times in the training text.

python -m benchmarks.repetition          # about four minutes on one quiet core; writes data/results/dedup-repetition.json
"""

import json
import sys
import tempfile
from pathlib import Path

from minillm.base.files import atomic_write
from minillm.base.machine import describe_machine, seed_everything
from minillm.batches import Loader
from minillm.kernels.matmul import tune_allocator
from minillm.storage.shards import TokenShards, write_shards
from minillm.tokenizer import BPETokenizer, train_bpe
from minillm.train import TrainConfig, evaluate_loss, train
from minillm.transformer import ModelConfig, Transformer
from minillm.world.stream import documents
from minillm.world.task import CorpusConfig

RESULTS = Path(__file__).parent.parent / "data" / "results" / "dedup-repetition.json"
COPIES = (1, 2, 4, 8, 16, 64)
SEEDS = (0, 1)
STEPS, ROWS, VOCAB = 400, 9, 512  # nine documents a step, about a thousand tokens


def shards_of(texts: list[str], tokenizer: BPETokenizer, folder: Path) -> TokenShards:
    """Texts as a folder of tokens."""
    write_shards(tokenizer.encode_batch(texts), folder, vocab_size=VOCAB, eos_id=tokenizer.eos_id)
    return TokenShards(folder)


def losses(shards: TokenShards, held_out: TokenShards, seed: int) -> dict[str, float]:
    """Loss on held-out text, and on a part of the training text, of a model trained for STEPS steps."""
    seed_everything(seed)
    size = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 176}
    model = Transformer(ModelConfig(vocab_size=VOCAB, max_seq_len=256, tied=True, **size))
    loader = Loader(shards, batch_size=ROWS, seq_len=256, seed=seed, packing="rows")
    config = TrainConfig(steps=STEPS, batch_size=ROWS, seq_len=256, max_lr=3e-3, warmup_steps=20, seed=seed)
    train(model, loader, config)

    def loss_on(data: TokenShards) -> float:
        batches = Loader(data, batch_size=16, seq_len=256, packing="rows").epoch_batches()
        return evaluate_loss(model, batches, max_batches=25)

    return {"held_out_nats": loss_on(held_out), "train_nats": loss_on(shards)}


def main() -> int:
    tune_allocator()
    made = {
        split: [d.text for d in documents(CorpusConfig(), n_documents=n, split=split)]
        for split, n in (("train", STEPS * ROWS), ("heldout", 400))
    }
    tokenizer = train_bpe(made["train"][:1000], VOCAB)
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        held_out = shards_of(made["heldout"], tokenizer, Path(folder) / "heldout")
        for copies in COPIES:
            texts = made["train"][: STEPS * ROWS // copies]
            shards = shards_of(texts, tokenizer, Path(folder) / str(copies))
            for seed in SEEDS:
                run = {
                    "copies": copies,
                    "documents": len(texts),
                    "seed": seed,
                    **losses(shards, held_out, seed),
                }
                print(run, flush=True)
                runs.append(run)
    result = {
        "command": "python -m benchmarks.repetition",
        "machine": describe_machine(),
        "steps": STEPS,
        "documents_a_step": ROWS,
        "runs": runs,
    }
    with atomic_write(RESULTS) as file:
        json.dump(result, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
