"""Largest difference of logits between a published folder's model and a reference, per family, into data/results/parity.json.

python -m benchmarks.parity           # half a minute

References: transformers where it has the model, else the slow ones of tests/references.py. Weights are random and tiny, in the
published layout, written by code that shares nothing with the hub. Norms of transformers run in the model's own dtype.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from minillm.base.files import atomic_write
from minillm.base.machine import describe_machine
from minillm.hub import ModelFolder

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "data" / "results" / "parity.json"
sys.path.insert(0, str(ROOT / "tests"))


def exact_norms() -> None:
    """transformers norms in float32 even in a float64 model; that would be all one measures."""
    from transformers.models.glm import modeling_glm
    from transformers.models.llama import modeling_llama

    def forward(self: Any, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.variance_epsilon)

    modeling_glm.GlmRMSNorm.forward = forward  # type: ignore[method-assign]
    modeling_llama.LlamaRMSNorm.forward = forward  # type: ignore[method-assign]


def largest(
    settings: dict[str, Any], dtype: torch.dtype, reference: Callable[..., Tensor], prompts: Tensor
) -> float:
    """The largest difference over plain, left-padded and cached reading, of three models."""
    from published import random_weights, write_folder  # type: ignore[import-not-found]

    worst = 0.0
    for seed in range(3):
        torch.manual_seed(seed)
        weights = random_weights(settings, dtype, settings.get("tie_word_embeddings", False))
        with tempfile.TemporaryDirectory() as folder:
            model = ModelFolder.open(write_folder(Path(folder), weights, settings, n_shards=2)).model()
            expected = reference(weights, settings, prompts)
            width = prompts.shape[1]
            padded = F.pad(prompts, (3, 0), value=3)
            mask = torch.arange(width + 3).expand(len(prompts), -1) >= 3
            cache = model.make_cache(len(prompts), width)
            cached = [model(prompts[:, : width - 4], cache=cache)]
            cached += [model(prompts[:, t : t + 1], cache=cache) for t in range(width - 4, width)]
            for ours in (
                model(prompts),
                model(padded, attention_mask=mask)[:, 3:],
                torch.cat(cached, dim=1),
            ):
                worst = max(worst, (ours - expected).abs().max().item())
    return worst


def main() -> int:
    from published import BAICHUAN_7B, BAICHUAN_13B, CHATGLM, CHATGLM2, LLAMA, glm_peer, llama_peer
    from references import baichuan_reference, chatglm_reference  # type: ignore[import-not-found]

    torch.set_num_threads(1)
    exact_norms()
    torch.manual_seed(0)
    odd = {"hidden_size": 40, "num_attention_heads": 5}
    long, short = torch.randint(3, 50, (2, 70)), torch.randint(3, 50, (2, 12))
    glm = short.clone()
    glm[0, 6:8], glm[1, 3], glm[1, 5] = torch.tensor([51, 54]), 50, 54  # gMASK, sop; MASK … sop

    def peer(build: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda weights, settings, tokens: (
            build(weights, settings, tokens_dtype(weights))(tokens).logits
        )

    def tokens_dtype(weights: dict[str, Tensor]) -> torch.dtype:
        return next(iter(weights.values())).dtype

    def slow(reference: Callable[..., Tensor], *more: Any) -> Callable[..., Tensor]:
        return lambda weights, settings, tokens: torch.stack(
            [reference(weights, settings, row, *more) for row in tokens.tolist()]
        )

    transformers_llama, transformers_glm = "transformers LlamaForCausalLM", "transformers GlmForCausalLM"
    rows: list[tuple[str, list[str], dict[str, Any], str, Callable[..., Tensor], Tensor]] = [
        ("LLaMA, LLaMA-2", ["llama-7b", "llama2-7b"], LLAMA, transformers_llama, peer(llama_peer), long),
        ("… grouped heads", ["llama2-70b"], {**LLAMA, "num_key_value_heads": 2}, transformers_llama, peer(llama_peer), long),
        ("… tied head, 5 heads", [], {**LLAMA, **odd, "num_key_value_heads": 5, "tie_word_embeddings": True}, transformers_llama, peer(llama_peer), long),
        ("Baichuan-7B", ["baichuan-7b"], BAICHUAN_7B, transformers_llama, peer(llama_peer), long),
        ("ChatGLM2-6B", ["chatglm2-6b"], CHATGLM2, transformers_glm, peer(glm_peer), long),
        ("ChatGLM2-6B-32K", ["chatglm2-6b-32k"], {**CHATGLM2, "rope_ratio": 16}, transformers_glm, peer(glm_peer), long),
        ("ChatGLM-6B", ["chatglm-6b"], CHATGLM, "slow reference", slow(chatglm_reference), glm),
        ("Baichuan-13B, 5 heads", ["baichuan-13b"], {**BAICHUAN_13B, **odd}, "slow reference", slow(baichuan_reference), short),
        ("Baichuan2-13B", ["baichuan2-13b"], {**BAICHUAN_13B, "norm_head": True}, "slow reference", slow(baichuan_reference, True), short),
    ]  # fmt: skip
    results = []
    with torch.no_grad():
        for name, models, settings, against, reference, prompts in rows:
            errors = [
                largest(settings, dtype, reference, prompts) for dtype in (torch.float32, torch.float64)
            ]
            results.append(
                {
                    "family": name,
                    "models": models,
                    "against": against,
                    "float32": errors[0],
                    "float64": errors[1],
                }
            )
            print(f"{name:24} {errors[0]:.1e} {errors[1]:.1e}   {against}", flush=True)
    with atomic_write(RESULTS) as file:
        json.dump(
            {"command": "python -m benchmarks.parity", "machine": describe_machine(), "rows": results},
            file,
            indent=1,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
