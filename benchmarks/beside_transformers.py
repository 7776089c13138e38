"""Training, prefill and decoding beside transformers' LlamaForCausalLM: same shape, same weights, in turns.

python -m benchmarks.beside_transformers --threads 1 --rounds 5
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch.nn import functional as F

from minillm.checkpoint import atomic_write
from minillm.generate import Sampler, generate
from minillm.runtime import describe_machine, fast_bfloat16, pick_device, tune_allocator
from minillm.train import autocast, clip_gradients, linear_cross_entropy, parameter_groups
from minillm.transformer import ModelConfig, Transformer

TINY = ModelConfig(
    vocab_size=4096, dim=256, n_layers=6, n_heads=8, n_kv_heads=4, hidden_dim=688, max_seq_len=2048
)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Measure minillm beside transformers and write the samples as JSON."""

    rounds: int = 5
    """How many times each side is measured, in turns."""
    threads: int = 1
    """CPU threads."""
    device: str = "cpu"
    """cpu, cuda, mps."""
    out: Path = Path("data/results")
    """The folder of the result file."""
    new_tokens: int = 128
    """Tokens decoded after a prompt of 128."""


def their_model(model: Transformer) -> torch.nn.Module:
    """LlamaForCausalLM with our weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.dim,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads,
            intermediate_size=c.hidden_dim,
            max_position_embeddings=c.max_seq_len,
            rms_norm_eps=c.norm_eps,
            tie_word_embeddings=c.tied,
            attention_bias=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    )
    names = {
        "embed.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    parts = {
        "attn.wq": "self_attn.q_proj", "attn.wk": "self_attn.k_proj", "attn.wv": "self_attn.v_proj", "attn.wo": "self_attn.o_proj",
        "mlp.w_gate": "mlp.gate_proj", "mlp.w_up": "mlp.up_proj", "mlp.w_down": "mlp.down_proj",
        "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    }  # fmt: skip
    for i in range(c.n_layers):
        names |= {f"blocks.{i}.{a}.weight": f"model.layers.{i}.{b}.weight" for a, b in parts.items()}
    state = model.state_dict()
    theirs.load_state_dict({names[name]: value for name, value in state.items() if name in names})
    return theirs


def seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(ours: Callable, theirs: Callable, *, units: int, rounds: int, device: torch.device) -> dict:
    """Units per second of both, and the ratio of each pair; one warm-up each."""
    ours(), theirs()
    pairs = [(seconds(ours, device), seconds(theirs, device)) for _ in range(rounds)]
    return {
        "minillm": [units / a for a, _ in pairs],
        "transformers": [units / b for _, b in pairs],
        "ratio": statistics.median(b / a for a, b in pairs),
    }


def training(dtype: str, device: torch.device, rounds: int) -> dict:
    """A whole optimizer step: forward, cross-entropy, backward, clipping, AdamW."""
    torch.manual_seed(0)
    model = Transformer(TINY).to(device)
    theirs = their_model(model).to(device).train()
    tokens = torch.randint(TINY.vocab_size, (16, 257), device=device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    optimizers = [
        torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
        for groups in (
            parameter_groups(model, 0.1),
            [{"params": list(theirs.parameters()), "weight_decay": 0.1}],
        )
    ]

    def step_ours() -> None:
        with autocast(device, dtype):
            loss = linear_cross_entropy(model.hidden(x), model.head.weight, y)
        loss.backward()
        clip_gradients(model.parameters(), 1.0)
        optimizers[0].step()
        optimizers[0].zero_grad(set_to_none=True)

    def step_theirs() -> None:
        with autocast(device, dtype):
            logits = theirs(x).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizers[1].step()
        optimizers[1].zero_grad(set_to_none=True)

    return in_turns(step_ours, step_theirs, units=x.numel(), rounds=rounds, device=device)


def decoding(batch_size: int, dtype: torch.dtype, device: torch.device, rounds: int, new_tokens: int) -> dict:
    """Greedy decoding after a prompt of 128; the tokens of both must be the same in float32."""
    torch.manual_seed(0)
    model = Transformer(TINY).to(device, dtype).eval()
    theirs = their_model(model).to(device, dtype).eval()
    prompt = torch.randint(1, TINY.vocab_size, (batch_size, 128), device=device)

    def ours() -> list[list[int]]:
        return generate(model, prompt, max_new_tokens=new_tokens, sampler=Sampler.greedy())

    def peer() -> list[list[int]]:
        with torch.inference_mode():
            out = theirs.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=new_tokens,
                do_sample=False,
                use_cache=True,
            )
        return out[:, 128:].tolist()

    if dtype == torch.float32:
        assert ours() == peer(), "the two models do not decode the same tokens"
    return in_turns(ours, peer, units=batch_size * new_tokens, rounds=rounds, device=device)


def prefill(device: torch.device, rounds: int) -> dict:
    """Logits of the last of 2048 tokens."""
    torch.manual_seed(0)
    model = Transformer(TINY).to(device).eval()
    theirs = their_model(model).to(device).eval()
    prompt = torch.randint(TINY.vocab_size, (1, 2048), device=device)

    def ours() -> None:
        with torch.inference_mode():
            model.logits(model.hidden(prompt)[:, -1])

    def peer() -> None:
        with torch.inference_mode():
            theirs(prompt, logits_to_keep=1)

    return in_turns(ours, peer, units=2048, rounds=rounds, device=device)


def main(argv: list[str]) -> int:
    import transformers

    args = tyro.cli(Args, args=argv, description=__doc__)
    torch.set_num_threads(args.threads)
    tune_allocator()
    device, rounds = pick_device(args.device), args.rounds
    results = {}
    plan = {
        "train tiny float32": lambda: training("float32", device, rounds),
        "train tiny bfloat16": lambda: training("bfloat16", device, rounds),
        "decode tiny float32 batch 1": lambda: decoding(1, torch.float32, device, rounds, args.new_tokens),
        "decode tiny float32 batch 16": lambda: decoding(16, torch.float32, device, rounds, args.new_tokens),
        "decode tiny bfloat16 batch 1": lambda: decoding(1, torch.bfloat16, device, rounds, args.new_tokens),
        "prefill tiny 2048": lambda: prefill(device, rounds),
    }
    if not fast_bfloat16(device):  # emulated, it measures the emulation
        plan = {name: work for name, work in plan.items() if "bfloat16" not in name}
    for name, work in plan.items():
        results[name] = work()
        ours, theirs = (statistics.median(results[name][side]) for side in ("minillm", "transformers"))
        print(
            f"{name:30} {ours:10,.0f} {theirs:10,.0f} tokens/s  ratio {results[name]['ratio']:.2f}",
            flush=True,
        )
    path = args.out / f"beside-transformers-{device.type}.json"
    record = {
        "command": f"python -m benchmarks.beside_transformers --threads {args.threads} --rounds {rounds}",
        "machine": {**describe_machine(device), "transformers": transformers.__version__},
        "unit": "tokens/s",
        "results": results,
    }
    with atomic_write(path) as file:
        json.dump(record, file, indent=1)
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
