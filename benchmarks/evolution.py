"""What each generation changed, one change at a time: the held-out loss of small models that differ in one thing.

python -m benchmarks.evolution        # about 20 minutes on one core; resumes; writes data/results/evolution.json

Every model reads the same text in the same order and has the same size to 2 %: what fewer kv heads save goes into the
MLP, as it did in ChatGLM2 and in LLaMA-2-70B. And every model gets its best learning rate in steps of a factor of two, chosen
with the first seed: at one rate for all, the table would measure which model that rate suits.
"""

import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from minillm.attention import Mask
from minillm.base.files import atomic_write
from minillm.base.machine import describe_machine, seed_everything
from minillm.batches import Batch, Loader
from minillm.kernels.matmul import tune_allocator
from minillm.storage.shards import TokenShards, write_shards
from minillm.tokenizer import train_bpe
from minillm.train import TrainConfig, batch_loss, head_weight, linear_cross_entropy, train
from minillm.transformer import ModelConfig, Transformer, count_parameters, kv_cache_bytes
from minillm.world.stream import documents
from minillm.world.task import CorpusConfig

RESULTS = Path(__file__).parent.parent / "data" / "results" / "evolution.json"
SEEDS = (0, 1, 2)
RATES = (3e-3, 6e-3, 1.2e-2)
STEPS, TUNING_STEPS, ROWS, T, LONG = 800, 80, 8, 128, 512
VOCAB = 512
BASE = ModelConfig(
    vocab_size=VOCAB, dim=64, n_layers=2, n_heads=4, n_kv_heads=4, hidden_dim=176, max_seq_len=T, tied=True
)
OLD_AND_NEW = {  # what the base (LLaMA's block) is changed into; the mask is not in the configuration
    "base": {},
    "prefix": {},
    "deepnorm": {"residual": "glm"},
    "layernorm": {"norm": "layer"},
    "gelu": {"mlp": "gelu", "hidden_dim": 264},
    "gqa": {"n_kv_heads": 2, "hidden_dim": 176 + 64 // 3},
    "mqa": {"n_kv_heads": 1, "hidden_dim": 176 + 96 // 3},
    "half rotary": {"rope_fraction": 0.5, "rope_interleaved": True},
    "alibi": {"position": "alibi"},
}


def make_text(folder: Path) -> tuple[TokenShards, Tensor]:
    """Shards to train on, and the held-out text as rows of LONG + 1 tokens."""
    texts = {
        split: [d.text for d in documents(CorpusConfig(), n_documents=n, split=split)]
        for split, n in (("train", 8_000), ("heldout", 1_200))
    }
    tokenizer = train_bpe(texts["train"][:1000], VOCAB)
    write_shards(
        tokenizer.encode_batch(texts["train"]),
        folder / "train",
        vocab_size=VOCAB,
        eos_id=tokenizer.eos_id,
    )
    held_out = np.concatenate([[*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(texts["heldout"])])
    return TokenShards(folder / "train"), torch.tensor(held_out).unfold(0, LONG + 1, LONG)


def make_model(name: str, seed: int) -> Transformer:
    seed_everything(seed)
    model = Transformer(replace(BASE, **OLD_AND_NEW[name]))
    if name == "deepnorm":
        alpha = math.sqrt(2 * BASE.n_layers)  # the published 28 layers have their constant, these two theirs
        for block in model.blocks:
            block.alpha = alpha  # type: ignore[assignment]
    return model


def prefix_loss(generator: torch.Generator) -> Callable[..., Tensor]:
    """The prefix-LM's objective: a random part of each row is read in both directions, the rest is predicted."""

    def loss(model: Transformer, batch: Batch, n_targets: int | None = None) -> Tensor:
        rows, width = batch.tokens.shape
        prefix = torch.randint(1, width, (rows,), generator=generator)
        targets = batch.targets.masked_fill(torch.arange(width) < prefix[:, None] - 1, -100)
        hidden = model.hidden(batch.tokens, mask=Mask(prefix=prefix))
        return linear_cross_entropy(hidden, head_weight(model), targets)

    return loss


def fit(
    model: Transformer,
    shards: TokenShards,
    seed: int,
    *,
    seq_len: int,
    steps: int,
    lr: float,
    loss_fn: Callable[..., Tensor] = batch_loss,
) -> None:
    rows = ROWS * T // seq_len
    loader = Loader(shards, batch_size=rows, seq_len=seq_len, seed=seed, packing="concat")
    config = TrainConfig(
        steps=steps, batch_size=rows, seq_len=seq_len, max_lr=lr, warmup_steps=20, seed=seed, compile="off"
    )
    train(model, loader, config, loss_fn=loss_fn)


@torch.inference_mode()
def tail_loss(model: Transformer, rows: Tensor, n_tail: int, *, two_way: bool = False) -> float:
    """Nats per token of the last n_tail targets of each row; with `two_way` what is before them is a prefix."""
    total, count, width = 0.0, 0, rows.shape[1] - 1
    for part in rows.split(max(1, 8192 // width)):
        mask = Mask(prefix=torch.full((len(part),), width - n_tail + 1)) if two_way else Mask()
        logits = model(part[:, :-1], mask=mask)[:, -n_tail:]
        total += F.cross_entropy(logits.flatten(0, 1), part[:, -n_tail:].flatten(), reduction="sum").item()
        count += part.shape[0] * n_tail
    return total / count


def stretched(model: Transformer, scale: float) -> Transformer:
    """A copy whose positions are divided by `scale`."""
    copy = Transformer(replace(model.config, rope_scale=scale))
    copy.load_state_dict(model.state_dict())
    return copy


def one_run(name: str, rate: float, seed: int, shards: TokenShards, held_out: Tensor) -> dict[str, Any]:
    model, start = make_model(name, seed), time.monotonic()
    prefix = name == "prefix"
    loss_fn = prefix_loss(torch.Generator().manual_seed(seed)) if prefix else batch_loss
    fit(model, shards, seed, seq_len=T, steps=STEPS, lr=rate, loss_fn=loss_fn)
    # The same targets for all: the last quarter of the long rows, with at most T tokens in view, and with all.
    short = torch.cat([held_out[:, end - T : end + 1] for end in (LONG - T // 2, LONG)])
    result: dict[str, Any] = {
        "parameters": count_parameters(model.config).total,
        "cache_bytes": kv_cache_bytes(model.config, 1),
        "nats": tail_loss(model, short, T // 2, two_way=prefix),
    }
    if not prefix:
        result["long_nats"] = tail_loss(model, held_out, T)
    if name == "base":
        tune = {"seq_len": LONG, "steps": TUNING_STEPS, "lr": 1e-3}
        longer = stretched(model, LONG / T)
        result["interpolated_long_nats"] = tail_loss(longer, held_out, T)
        fit(longer, shards, seed + 100, **tune)
        result["interpolated_tuned_long_nats"] = tail_loss(longer, held_out, T)
        result["interpolated_tuned_nats"] = tail_loss(longer, short, T // 2)
        direct = stretched(model, 1.0)
        fit(direct, shards, seed + 100, **tune)
        result["tuned_long_nats"] = tail_loss(direct, held_out, T)
        fit(model, shards, seed + 100, **{**tune, "seq_len": T})
        result["more_steps_nats"] = tail_loss(model, short, T // 2)
        result["more_steps_long_nats"] = tail_loss(model, held_out, T)
    result["seconds"] = round(time.monotonic() - start, 1)
    return result


@torch.inference_mode()
def decoding(rounds: int = 7, rows: int = 8, n_cached: int = 2048, steps: int = 8) -> dict[str, Any]:
    """Tokens per second behind a long context, multi-head against shared kv heads; in turns, CPU time."""
    shape = replace(BASE, dim=512, n_layers=4, n_heads=16, n_kv_heads=16, hidden_dim=1408, vocab_size=4096)
    models = {
        "base": Transformer(shape),
        "gqa": Transformer(replace(shape, n_kv_heads=4, hidden_dim=1408 + 256)),
        "mqa": Transformer(replace(shape, n_kv_heads=1, hidden_dim=1408 + 320)),
    }
    speed: dict[str, list[float]] = {name: [] for name in models}
    caches = {name: model.make_cache(rows, n_cached + steps) for name, model in models.items()}
    token = torch.zeros(rows, 1, dtype=torch.long)
    for _ in range(rounds + 1):
        for name, model in models.items():
            caches[name].length = n_cached
            start = time.process_time()
            for _ in range(steps):
                model(token, cache=caches[name])
            speed[name].append(rows * steps / (time.process_time() - start))
    return {
        name: {
            "tokens_per_s": [round(s, 1) for s in speed[name][1:]],
            "cache_bytes": caches[name].n_bytes,
            "parameters": count_parameters(model.config).total,
        }
        for name, model in models.items()
    }


def main() -> int:
    torch.set_num_threads(1)
    tune_allocator()
    settings = {
        "steps": STEPS, "tuning_steps": TUNING_STEPS, "rows": ROWS, "seq_len": T, "long": LONG, "vocab_size": VOCAB,
        "dim": BASE.dim, "n_layers": BASE.n_layers, "changes": OLD_AND_NEW,
    }  # fmt: skip
    record: dict[str, Any] = {
        "command": "python -m benchmarks.evolution",
        "machine": describe_machine(),
        "settings": settings,
        "seeds": SEEDS,
        "rates": RATES,
        "runs": {},
    }
    if RESULTS.exists():
        stored = json.loads(RESULTS.read_text())
        if stored["settings"] == json.loads(json.dumps(settings)):
            record["runs"] = stored["runs"]

    def save() -> None:
        with atomic_write(RESULTS) as file:
            json.dump(record, file, indent=1)

    with tempfile.TemporaryDirectory() as folder:
        shards, held_out = make_text(Path(folder))
        record["held_out_targets"] = len(held_out) * T

        def nats(name: str, rate: float, seed: int) -> float:
            key = f"{name}/{rate:g}/{seed}"
            if key not in record["runs"]:
                record["runs"][key] = one_run(name, rate, seed, shards, held_out)
                print(key, record["runs"][key], flush=True)
                save()
            return record["runs"][key]["nats"]

        def best_rate(name: str) -> float:
            """The best of RATES with the first seed; where it is the last on either side, the search goes on beyond it."""
            rates = list(RATES)
            while (best := min(rates, key=lambda rate: nats(name, rate, SEEDS[0]))) in (rates[0], rates[-1]):
                rates = [rates[0] / 2, *rates] if best == rates[0] else [*rates, 2 * rates[-1]]
            return best

        record["best_rate"] = {name: best_rate(name) for name in OLD_AND_NEW}
        for seed in SEEDS[1:]:
            for name, rate in record["best_rate"].items():
                nats(name, rate, seed)
    record["decoding"] = decoding()
    save()
    for name, result in record["decoding"].items():
        print(f"{name:6} {statistics.median(result['tokens_per_s']):8.0f} tokens/s behind 2048 tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
