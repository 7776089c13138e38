"""What a side offers, and what is the same for all of them."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Shape = dict[str, int]
Step = Callable[[], float]


class Side:
    """A library that can train and decode a LLaMA of a given shape.

    A side raises `NotImplementedError` for what its library does not have.
    """

    packages: tuple[str, ...] = ()
    same_weights = True

    def versions(self) -> dict[str, str]:
        found = {}
        for package in ("torch", *self.packages):
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                found[package] = "not installed"
        return found

    def model(self, shape: Shape, state: dict[str, Tensor]) -> nn.Module:
        """The model with these weights (in minillm's names), float32."""
        raise NotImplementedError

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The mean next-token loss, as the library's users compute it."""
        raise NotImplementedError

    def trainer(self, model: nn.Module, x: Tensor, y: Tensor, dtype: str, compiled: bool) -> Step:
        """A whole optimizer step: forward, loss, backward, clipping to 1, fused AdamW. Returns the loss."""
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        loss_of = torch.compile(self.loss) if compiled else self.loss
        device = x.device.type

        def step() -> float:
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = loss_of(model, x, y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return step

    def decoder(
        self, model: nn.Module, prompt: Tensor, n_tokens: int, compiled: bool
    ) -> Callable[[], list[list[int]]]:
        """Greedy decoding of `n_tokens` after the prompt (B, T); returns the new tokens."""
        raise NotImplementedError

    def prefiller(self, model: nn.Module, prompt: Tensor) -> Callable[[], Tensor]:
        """The logits (B, V) after the last token of the prompt."""
        raise NotImplementedError


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
