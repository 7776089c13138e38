"""transformers: LlamaForCausalLM with SDPA attention; compiled decoding with its static cache."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.sides.base import Shape, Side, cross_entropy

PARTS = {
    "attn.wq": "self_attn.q_proj",
    "attn.wk": "self_attn.k_proj",
    "attn.wv": "self_attn.v_proj",
    "attn.wo": "self_attn.o_proj",
    "mlp.w_gate": "mlp.gate_proj",
    "mlp.w_up": "mlp.up_proj",
    "mlp.w_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}


class WithTransformers(Side):
    packages = ("transformers",)

    def model(self, shape: Shape, state: dict[str, Tensor]) -> nn.Module:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape["vocab_size"],
                hidden_size=shape["dim"],
                num_hidden_layers=shape["n_layers"],
                num_attention_heads=shape["n_heads"],
                num_key_value_heads=shape["n_kv_heads"],
                intermediate_size=shape["hidden_dim"],
                max_position_embeddings=shape["max_seq_len"],
                rms_norm_eps=1e-5,
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
        for i in range(shape["n_layers"]):
            names |= {f"blocks.{i}.{a}.weight": f"model.layers.{i}.{b}.weight" for a, b in PARTS.items()}
        model.load_state_dict({names[name]: value for name, value in state.items()})
        return model

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model(x, use_cache=False).logits, y)

    def decoder(
        self, model: nn.Module, prompt: Tensor, n_tokens: int, compiled: bool
    ) -> Callable[[], list[list[int]]]:
        assert isinstance(model, LlamaForCausalLM)
        options = {"cache_implementation": "static"} if compiled else {}
        if compiled:
            model.forward = torch.compile(model.forward)  # type: ignore[method-assign]

        @torch.inference_mode()
        def work() -> list[list[int]]:
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=n_tokens,
                do_sample=False,
                use_cache=True,
                **options,
            )
            return out[:, prompt.shape[1] :].tolist()

        return work

    def prefiller(self, model: nn.Module, prompt: Tensor) -> Callable[[], Tensor]:
        @torch.inference_mode()
        def work() -> Tensor:
            return model(prompt, logits_to_keep=1).logits[:, -1]

        return work
