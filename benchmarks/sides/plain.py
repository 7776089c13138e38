"""LLaMA in plain, careful PyTorch: what an experienced user writes in an afternoon, with the library's own fused parts."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.sides.base import Shape, Side, cross_entropy


class Rotary(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, length: int):
        super().__init__()
        turns = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
        phase = torch.outer(torch.arange(length), turns).repeat(1, 2)
        self.register_buffer("cos", phase.cos(), persistent=False)
        self.register_buffer("sin", phase.sin(), persistent=False)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return x * self.cos[places].to(x.dtype) + torch.cat((-b, a), dim=-1) * self.sin[places].to(x.dtype)


class Layer(nn.Module):
    def __init__(self, shape: Shape, rotary: Rotary):
        super().__init__()
        dim, hidden = shape["dim"], shape["hidden_dim"]
        self.heads, self.kv_heads = shape["n_heads"], shape["n_kv_heads"]
        self.head_dim, self.rotary = dim // self.heads, rotary
        self.norm1, self.norm2 = nn.RMSNorm(dim, 1e-5), nn.RMSNorm(dim, 1e-5)
        self.qkv = nn.Linear(dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.cache: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, places: Tensor, mask: Tensor | None) -> Tensor:
        B, T, _ = x.shape
        heads = self.qkv(self.norm1(x)).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = self.rotary(q, places), self.rotary(k, places)
        if self.cache is not None:
            k = self.cache[0].index_copy_(2, places, k)
            v = self.cache[1].index_copy_(2, places, v)
        o = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.heads > self.kv_heads
        )
        x = x + self.out(o.transpose(1, 2).reshape(B, T, -1))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Model(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.embed = nn.Embedding(shape["vocab_size"], shape["dim"])
        rotary = Rotary(shape["dim"] // shape["n_heads"], shape["max_seq_len"])
        self.layers = nn.ModuleList(Layer(shape, rotary) for _ in range(shape["n_layers"]))
        self.norm = nn.RMSNorm(shape["dim"], 1e-5)
        self.head = nn.Linear(shape["dim"], shape["vocab_size"], bias=False)

    def forward(self, x: Tensor, places: Tensor, mask: Tensor | None = None, last: bool = False) -> Tensor:
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h, places, mask)
        return self.head(self.norm(h[:, -1:] if last else h))

    def open_cache(self, batch: int, length: int) -> None:
        weight = self.head.weight
        for layer in self.layers:
            assert isinstance(layer, Layer)
            shape = (batch, layer.kv_heads, length, layer.head_dim)
            layer.cache = (weight.new_zeros(shape), weight.new_zeros(shape))


class Plain(Side):
    def model(self, shape: Shape, state: dict[str, Tensor]) -> nn.Module:
        model = Model(shape)
        theirs = {f"{name}.weight": state[f"{name}.weight"] for name in ("embed", "norm", "head")}
        for i in range(shape["n_layers"]):
            a, b = f"blocks.{i}", f"layers.{i}"
            theirs |= {
                f"{b}.norm1.weight": state[f"{a}.attn_norm.weight"],
                f"{b}.norm2.weight": state[f"{a}.mlp_norm.weight"],
                f"{b}.qkv.weight": torch.cat([state[f"{a}.attn.w{n}.weight"] for n in "qkv"]),
                f"{b}.out.weight": state[f"{a}.attn.wo.weight"],
                f"{b}.gate_up.weight": torch.cat([state[f"{a}.mlp.w_{n}.weight"] for n in ("gate", "up")]),
                f"{b}.down.weight": state[f"{a}.mlp.w_down.weight"],
            }
        model.load_state_dict(theirs)
        return model

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model(x, torch.arange(x.shape[1], device=x.device)), y)

    def decoder(
        self, model: nn.Module, prompt: Tensor, n_tokens: int, compiled: bool
    ) -> Callable[[], list[list[int]]]:
        assert isinstance(model, Model)
        B, T = prompt.shape
        columns = torch.arange(T + n_tokens, device=prompt.device)
        step = torch.compile(model) if compiled else model

        @torch.inference_mode()
        def work() -> list[list[int]]:
            model.open_cache(B, T + n_tokens)
            places = columns[:T]
            logits = model(prompt, places, columns <= places[:, None], last=True)
            new = [logits[:, -1].max(-1).indices]
            for t in range(T, T + n_tokens - 1):
                places = columns[t : t + 1]
                logits = step(new[-1][:, None], places, columns <= places[:, None])
                new.append(logits[:, -1].max(-1).indices)
            return torch.stack(new, dim=1).tolist()

        return work

    def prefiller(self, model: nn.Module, prompt: Tensor) -> Callable[[], Tensor]:
        places = torch.arange(prompt.shape[1], device=prompt.device)

        @torch.inference_mode()
        def work() -> Tensor:
            return model(prompt, places, last=True)[:, -1]

        return work
