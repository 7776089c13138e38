"""FSDP2, PyTorch's own fully sharded data parallelism, behind the engine of chapter 18, and what DeepSpeed's shares with it."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minillm.storage.checkpoints import check_tensors, shard_key
from minillm.train import TrainConfig, Update, autocast, parameter_groups
from minillm.zero import STATES, Joined, units_of


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Both libraries call collectives of torch by names that it has just replaced; the warning is not for our users."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*Please use `torch\.distributed", FutureWarning)
        yield


class LossModule(nn.Module):
    """A model and its loss behind one `forward`, where FSDP2 and DeepSpeed hook in."""

    def __init__(self, model: nn.Module, dtype: str):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, loss_fn: Callable[..., Tensor], batch: Any, n_targets: int) -> Tensor:
        with autocast(next(self.model.parameters()).device, self.dtype):
            return loss_fn(self.model, batch, n_targets)


class Borrowed(Joined):
    """What the engines around FSDP2 and DeepSpeed share: they show one whole tensor at a time (chapter 18)."""

    compiles = False

    def each(self) -> Iterator[tuple[str, str, Tensor]]:
        """Group, name and whole tensor, on all processes, one after the other."""
        raise NotImplementedError

    @quietly()
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
        for group, name, tensor in self.each():
            if self.rank == 0:
                groups[group][name] = tensor.detach().cpu().clone()
        return groups

    @quietly()
    def shards(self) -> dict[str, dict[str, Tensor]]:
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
        for group, name, tensor in self.each():
            share = -(-tensor.numel() // self.world_size)
            piece = tensor.detach().flatten()[self.rank * share : (self.rank + 1) * share]
            if len(piece):
                groups[group][shard_key(name, self.rank * share, tensor.shape)] = piece.cpu().clone()
        return groups


class FSDP2(Borrowed):
    """PyTorch's own ZeRO: `fully_shard` on every block and on the rest (chapter 18).

    Args:
        stage: 3 frees a block's parameters after its forward pass, 2 keeps them until its backward pass.

    Source: arXiv:2304.11277 for the design; `torch.distributed.fsdp.fully_shard` for the interface.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        *,
        stage: int = 3,
        parameter_dtype: torch.dtype = torch.float32,
    ):
        if stage not in (2, 3):
            raise ValueError(
                f"fsdp2 is ZeRO stage 2 or 3, got zero_stage={stage}: use engine zero or deepspeed for others"
            )
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        super().__init__(model, config)
        options: dict[str, Any] = {"reshard_after_forward": stage == 3}
        if parameter_dtype != torch.float32:
            options["mp_policy"] = MixedPrecisionPolicy(
                param_dtype=parameter_dtype, reduce_dtype=torch.float32
            )
        for module, _ in units_of(model):
            if module is not None:
                fully_shard(module, **options)
        self.root: Any = fully_shard(LossModule(model, config.dtype), **options)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, config.weight_decay), lr=config.max_lr, betas=config.betas, eps=config.eps
        )

    @quietly()
    def loss(self, loss_fn: Callable[..., Tensor], batch: Any, n_targets: int) -> Tensor:
        return self.root(loss_fn, batch, n_targets)

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        with quietly():
            self.root.unshard()
        yield
        self.root.reshard()

    @quietly()
    def backward(self, loss: Float[Tensor, ""]) -> None:
        (loss * self.world_size).backward()  # it takes the mean over processes; ours are parts of a sum

    @quietly()
    def step(self, lr: float, limit: float = math.inf) -> Update:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm: Any = torch.nn.utils.get_total_norm([p.grad for p in parameters])  # type: ignore[misc]
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        applied = norm.item() < limit
        if applied:
            if self.config.clip_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.config.clip_norm, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Update(norm.item(), applied)

    def each(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, p in self.model.named_parameters():
            yield "model", name, _whole(p)
            for key, value in self.optimizer.state.get(p, {}).items():
                yield "optimizer", f"{name}.{key}", _whole(value)

    @torch.no_grad()
    @quietly()
    def load_tensors(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        from torch.distributed.tensor import distribute_tensor

        check_tensors(self.model, groups["model"])
        for name, p in self.model.named_parameters():
            like: Any = p

            def sharded(tensor: Tensor, like: Any = like) -> Tensor:
                return distribute_tensor(
                    tensor.to(like.device, like.dtype), like.device_mesh, like.placements
                )

            like.copy_(sharded(groups["model"][name]))
            if f"{name}.step" in groups["optimizer"]:
                means = {key: sharded(groups["optimizer"][f"{name}.{key}"]) for key in STATES}
                self.optimizer.state[p] = {"step": groups["optimizer"][f"{name}.step"].clone(), **means}


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
