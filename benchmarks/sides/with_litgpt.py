"""litgpt: its GPT in LLaMA's shape, its `generate` (one row at a time)."""

from collections.abc import Callable

import torch
from litgpt import GPT, Config
from litgpt.generate.base import generate
from litgpt.utils import chunked_cross_entropy
from torch import Tensor, nn

from benchmarks.sides.base import Shape, Side


class WithLitgpt(Side):
    packages = ("litgpt",)

    def model(self, shape: Shape, state: dict[str, Tensor]) -> nn.Module:
        model = GPT(
            Config(
                name="llama",
                block_size=shape["max_seq_len"],
                vocab_size=shape["vocab_size"],
                padded_vocab_size=shape["vocab_size"],
                n_layer=shape["n_layers"],
                n_head=shape["n_heads"],
                n_embd=shape["dim"],
                n_query_groups=shape["n_kv_heads"],
                intermediate_size=shape["hidden_dim"],
                norm_class_name="RMSNorm",
                mlp_class_name="LLaMAMLP",
                rotary_percentage=1.0,
                bias=False,
                parallel_residual=False,
                norm_eps=1e-5,
            )
        )
        theirs = {
            "transformer.wte.weight": state["embed.weight"],
            "transformer.ln_f.weight": state["norm.weight"],
            "lm_head.weight": state["head.weight"],
        }
        for i in range(shape["n_layers"]):
            a, b = f"blocks.{i}", f"transformer.h.{i}"
            theirs |= {
                f"{b}.norm_1.weight": state[f"{a}.attn_norm.weight"],
                f"{b}.norm_2.weight": state[f"{a}.mlp_norm.weight"],
                f"{b}.attn.qkv.weight": torch.cat([state[f"{a}.attn.w{n}.weight"] for n in "qkv"]),
                f"{b}.attn.proj.weight": state[f"{a}.attn.wo.weight"],
                f"{b}.mlp.fc_1.weight": state[f"{a}.mlp.w_gate.weight"],
                f"{b}.mlp.fc_2.weight": state[f"{a}.mlp.w_up.weight"],
                f"{b}.mlp.proj.weight": state[f"{a}.mlp.w_down.weight"],
            }
        model.load_state_dict(theirs)
        return model

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return chunked_cross_entropy(model(x), y, chunk_size=0)  # as its pretraining script does

    def decoder(
        self, model: nn.Module, prompt: Tensor, n_tokens: int, compiled: bool
    ) -> Callable[[], list[list[int]]]:
        if len(prompt) > 1:
            raise NotImplementedError("its generate takes one prompt")
        assert isinstance(model, GPT)
        if compiled:
            model.forward = torch.compile(model.forward, dynamic=True)  # type: ignore[method-assign]

        def work() -> list[list[int]]:
            model.clear_kv_cache()
            with torch.device(prompt.device):
                model.set_kv_cache(batch_size=1, max_seq_length=prompt.shape[1] + n_tokens)
            model.to(next(model.parameters()).dtype)
            out = generate(
                model, prompt[0], prompt.shape[1] + n_tokens, temperature=0.0, top_k=1, include_prompt=False
            )
            return [out.tolist()]

        return work

    def prefiller(self, model: nn.Module, prompt: Tensor) -> Callable[[], Tensor]:
        @torch.inference_mode()
        def work() -> Tensor:
            return model(prompt)[:, -1]

        return work
