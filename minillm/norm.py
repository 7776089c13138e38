import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def layer_norm(
    x: Float[Tensor, "... D"], weight: Float[Tensor, "D"], bias: Float[Tensor, "D"] | None = None, eps: float = 1e-5
) -> Float[Tensor, "... D"]:
    """Shift and scale each vector to mean 0 and variance 1, then apply a learned scale and shift."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def rms_norm(x: Float[Tensor, "... D"], weight: Float[Tensor, "D"], eps: float = 1e-5) -> Float[Tensor, "... D"]:
    """Divide each vector by its root mean square, computed in float32, then apply a learned scale."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


class LayerNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-5, bias: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return rms_norm(x, self.weight, self.eps)
