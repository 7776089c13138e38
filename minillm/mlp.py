from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def gelu_tanh(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """GELU in its tanh approximation."""
    return F.gelu(x, approximate="tanh")


class MLP(nn.Module):
    """Two linear maps with a non-linearity between them: `w_down(activation(w_up(x)))`."""

    def __init__(
        self, dim: int, hidden_dim: int, *, activation: Callable[[Tensor], Tensor] = gelu_tanh, bias: bool = False
    ):
        super().__init__()
        self.activation = activation
        self.w_up = nn.Linear(dim, hidden_dim, bias=bias)
        self.w_down = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return self.w_down(self.activation(self.w_up(x)))


class SwiGLU(nn.Module):
    """A gated MLP: `w_down(silu(w_gate(x)) * w_up(x))`."""

    def __init__(self, dim: int, hidden_dim: int, *, bias: bool = False):
        super().__init__()
        self.w_gate = nn.Linear(dim, hidden_dim, bias=bias)
        self.w_up = nn.Linear(dim, hidden_dim, bias=bias)
        self.w_down = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return self.w_down(F.silu(self.w_gate(x)) * self.w_up(x))


def swiglu_hidden_dim(dim: int, *, multiplier: float = 1.0, multiple_of: int = 256) -> int:
    """LLaMA's hidden width: two thirds of 4 dim, times a multiplier, rounded up to a multiple."""
    hidden = int(multiplier * int(8 * dim / 3))
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)
