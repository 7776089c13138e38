"""minillm, as its command line runs it."""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from benchmarks.sides.base import Shape, Side, Step
from minillm.generate import Sampler, generate
from minillm.kernels.matmul import tune_allocator, tune_matmul
from minillm.runs.keeper import compiled
from minillm.serving.fast import prepare
from minillm.train import Engine, TrainConfig, autocast, linear_cross_entropy
from minillm.transformer import ModelConfig, Transformer


class Ours(Side):
    packages = ("minillm",)

    def __init__(self):
        tune_allocator()
        tune_matmul()
        self.open = ExitStack()  # what is entered here stays: a context that nobody holds is left at once

    def fresh(self, shape: Shape) -> Transformer:
        return Transformer(ModelConfig(**shape))

    def model(self, shape: Shape, state: dict[str, Tensor]) -> nn.Module:
        model = self.fresh(shape)
        model.load_state_dict(state, strict=False, assign=False)
        return model

    def trainer(self, model: nn.Module, x: Tensor, y: Tensor, dtype: str, compiled_: bool) -> Step:
        assert isinstance(model, Transformer)
        config = TrainConfig(steps=1, batch_size=x.shape[0], seq_len=x.shape[1], clip_norm=1.0)
        engine = Engine(model, config)
        self.open.enter_context(compiled(model, compiled_))

        def step() -> float:
            with autocast(x.device, dtype):
                loss = linear_cross_entropy(model.hidden(x), model.head.weight, y)
            engine.backward(loss)
            engine.step(1e-3)
            return loss.item()

        return step

    def decoder(
        self, model: nn.Module, prompt: Tensor, n_tokens: int, compiled: bool
    ) -> Callable[[], list[list[int]]]:
        assert isinstance(model, Transformer)
        greedy = Sampler.greedy()  # preparing is part of the time, as in a program with one prompt
        return lambda: generate(prepare(model, n_tokens), prompt, max_new_tokens=n_tokens, sampler=greedy)

    def prefiller(self, model: nn.Module, prompt: Tensor) -> Callable[[], Tensor]:
        assert isinstance(model, Transformer)

        @torch.inference_mode()
        def work() -> Tensor:
            return model.logits(model.hidden(prompt)[:, -1])

        return work
