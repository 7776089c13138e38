from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Angles(NamedTuple):
    """Cosines and sines for one call of the model, computed once and used by every layer. Each is (1 or B, 1, T, P):
    P pairs; the singleton axis broadcasts over heads."""

    cos: Tensor
    sin: Tensor


def rope_frequencies(rotary_dim: int, theta: float = 10000.0) -> Float[Tensor, "P"]:
    """The angle per token of each of the rotary_dim / 2 pairs, in radians, float32."""
    return 1.0 / theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)


def rotate_half_split(x: Float[Tensor, "B H T R"], angles: Angles) -> Float[Tensor, "B H T R"]:
    """Rotate the pairs (i, i + R/2): LLaMA's layout."""
    cos, sin = angles.cos.to(x.dtype), angles.sin.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rotate_interleaved(x: Float[Tensor, "B H T R"], angles: Angles) -> Float[Tensor, "B H T R"]:
    """Rotate the pairs (2i, 2i + 1): the paper's and ChatGLM2's layout."""
    cos, sin = angles.cos.to(x.dtype), angles.sin.to(x.dtype)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)


class RoPE(nn.Module):
    """Rotary position embedding over the first `rotary_dim` of each head, in one of two layouts.

    `scale` divides positions (linear position interpolation); `frequencies` replaces the default ones.
    """

    slopes: Tensor | None = None

    def __init__(
        self,
        head_dim: int,
        *,
        theta: float = 10000.0,
        rotary_dim: int | None = None,
        interleaved: bool = False,
        scale: float = 1.0,
        frequencies: Float[Tensor, "P"] | None = None,
    ):
        super().__init__()
        self.rotary_dim = head_dim if rotary_dim is None else rotary_dim
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= head_dim:
            raise ValueError(f"rotary_dim must be even and in 2..{head_dim} (head_dim), got {self.rotary_dim}")
        self.rotate = rotate_interleaved if interleaved else rotate_half_split
        self.scale = scale
        frequencies = rope_frequencies(self.rotary_dim, theta) if frequencies is None else frequencies
        self.register_buffer("frequencies", frequencies, persistent=False)

    def angles(self, positions: Int[Tensor, "B T"] | Int[Tensor, "1 T"]) -> Angles:
        """Cosines and sines for these positions, in float32."""
        phase = (positions.float() / self.scale)[:, None, :, None] * self.frequencies
        return Angles(phase.cos(), phase.sin())

    def forward(self, x: Float[Tensor, "B H T Dh"], angles: Angles) -> Float[Tensor, "B H T Dh"]:
        if self.rotary_dim == x.shape[-1]:
            return self.rotate(x, angles)
        rotated, rest = x.split([self.rotary_dim, x.shape[-1] - self.rotary_dim], dim=-1)
        return torch.cat((self.rotate(rotated, angles), rest), dim=-1)


class RoPE2D(nn.Module):
    """ChatGLM-6B's rotary: the first half of a head turns by positions[:, 0], the second by positions[:, 1]."""

    slopes: Tensor | None = None

    def __init__(self, head_dim: int, *, theta: float = 10000.0):
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"head_dim must be a multiple of 4 for two rotary halves, got {head_dim}")
        # The published model rounds its frequencies to float16, whatever dtype it runs in.
        frequencies = rope_frequencies(head_dim // 2, theta).half().float()
        self.register_buffer("frequencies", frequencies, persistent=False)

    def angles(self, positions: Int[Tensor, "B 2 T"]) -> Angles:
        phase = positions.float()[:, :, None, :, None] * self.frequencies  # B 2 1 T P
        return Angles(phase.cos(), phase.sin())

    def forward(self, x: Float[Tensor, "B H T Dh"], angles: Angles) -> Float[Tensor, "B H T Dh"]:
        first, second = x.chunk(2, dim=-1)
        return torch.cat(
            (
                rotate_half_split(first, Angles(angles.cos[:, 0], angles.sin[:, 0])),
                rotate_half_split(second, Angles(angles.cos[:, 1], angles.sin[:, 1])),
            ),
            dim=-1,
        )


def alibi_slopes(n_heads: int) -> Float[Tensor, "H"]:
    """ALiBi's slope of each head, a geometric sequence; for head counts that are no power of two, two of them."""
    power = 2 ** (n_heads.bit_length() - 1)
    first = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    rest = [2.0 ** (-8.0 * (2 * i + 1) / (2 * power)) for i in range(n_heads - power)]
    return torch.tensor(first + rest)


class ALiBi(nn.Module):
    """Attention with linear biases: nothing is rotated; head h subtracts slopes[h] * distance from its scores."""

    slopes: Tensor

    def __init__(self, n_heads: int):
        super().__init__()
        self.register_buffer("slopes", alibi_slopes(n_heads), persistent=False)

    def angles(self, positions: Int[Tensor, "..."]) -> None:
        return None

    def forward(self, x: Float[Tensor, "B H T Dh"], angles: None = None) -> Float[Tensor, "B H T Dh"]:
        return x


Position = RoPE | RoPE2D | ALiBi
