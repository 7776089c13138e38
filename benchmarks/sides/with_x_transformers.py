"""x-transformers in LLaMA's shape. Its layout of rotary and gates is another, so that it has weights of its own."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

from benchmarks.sides.base import Shape, Side, cross_entropy


class WithXTransformers(Side):
    packages = ("x-transformers",)
    same_weights = False

    def model(self, shape: Shape, state: dict[str, Tensor]) -> nn.Module:
        torch.manual_seed(0)
        head_dim = shape["dim"] // shape["n_heads"]
        return TransformerWrapper(
            num_tokens=shape["vocab_size"],
            max_seq_len=shape["max_seq_len"],
            use_abs_pos_emb=False,
            attn_layers=Decoder(
                dim=shape["dim"],
                depth=shape["n_layers"],
                heads=shape["n_heads"],
                attn_dim_head=head_dim,
                attn_kv_heads=shape["n_kv_heads"],
                attn_flash=True,
                rotary_pos_emb=True,
                rotary_emb_dim=head_dim,
                use_rmsnorm=True,
                ff_swish=True,
                ff_glu=True,
                ff_mult=shape["hidden_dim"] / shape["dim"],
                ff_no_bias=True,
            ),
        )

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model(x), y)

    def decoder(
        self, model: nn.Module, prompt: Tensor, n_tokens: int, compiled: bool
    ) -> Callable[[], list[list[int]]]:
        if compiled:
            raise NotImplementedError("its cache grows with every token: each step would compile anew")
        wrapper = AutoregressiveWrapper(model)

        @torch.inference_mode()
        def work() -> list[list[int]]:
            return wrapper.generate(prompt, n_tokens, temperature=0.0, cache_kv=True).tolist()

        return work

    def prefiller(self, model: nn.Module, prompt: Tensor) -> Callable[[], Tensor]:
        @torch.inference_mode()
        def work() -> Tensor:
            return model(prompt)[:, -1]

        return work
