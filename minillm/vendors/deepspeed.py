"""DeepSpeed behind the engine of chapter 18."""

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minillm.base.errors import CheckpointError, TrainingDiverged
from minillm.base.optional import optional
from minillm.train import TrainConfig, Update, clip_gradients, parameter_groups
from minillm.vendors.fsdp import Borrowed, LossModule, quietly
from minillm.zero import STATES


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """A variable of the environment inside, unless the user has set it."""
    theirs = os.environ.get(name)
    os.environ.setdefault(name, value)
    try:
        yield
    finally:
        if theirs is None:
            del os.environ[name]


@cache
def import_deepspeed(kind: str) -> Any:
    """DeepSpeed for a kind of device, quiet, and on a CPU without the operation that it would compile for two minutes.

    That operation is an all-reduce through shared memory; without it DeepSpeed uses gloo. It looks at `DS_ACCELERATOR` once, when
    it is imported, and has no other way to be told.
    """
    with optional("scale"), _variable("DS_ACCELERATOR", "cpu") if kind == "cpu" else contextlib.nullcontext():
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = kind != "cpu"
    return deepspeed


def deepspeed_states(outer: Any, stage: int) -> dict[Any, dict[str, Tensor]]:
    """AdamW's state, by the flat tensors that DeepSpeed's optimizer `outer` gives it; zeros before the first step."""
    if stage == 0:
        return outer.state
    flats = outer.fp32_partitioned_groups_flat if stage == 3 else outer.single_partition_of_fp32_groups
    for flat in flats:
        if not outer.optimizer.state[flat]:
            zeros = {key: torch.zeros_like(flat) for key in STATES}
            outer.optimizer.state[flat] = {"step": torch.zeros(()), **zeros}
    if stage < 3:  # DeepSpeed links names to states at the first step, and then only those of the first group
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for group, flat in zip(outer.bit16_groups, flats):
            lazy_init_hp_params_optimizer_state(group, flat, outer.optimizer.state)
    return outer.optimizer.state


class DeepSpeed(Borrowed):
    """DeepSpeed's engine behind our interface (chapter 18).

    Args:
        stage: 0 to 3.
        offload: keep the optimizer's state, and at stage 3 the parameters, in the memory of the host.

    Source: arXiv:1910.02054, and arXiv:2104.07857 for `offload`; `deepspeed.initialize` for the interface.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        *,
        stage: int = 2,
        offload: bool = False,
        parameter_dtype: torch.dtype = torch.float32,
    ):
        if stage == 0 and parameter_dtype != torch.float32:
            raise ValueError("deepspeed with parameters in bfloat16 needs zero_stage 1, 2 or 3")
        device = next(model.parameters()).device
        deepspeed = import_deepspeed(device.type)
        super().__init__(model, config)
        self.stage, self.gathered = stage, deepspeed.zero.GatheredParameters
        module = LossModule(model, config.dtype)
        settings = deepspeed_settings(
            config,
            stage=stage,
            offload=offload,
            world_size=self.world_size,
            bf16=parameter_dtype == torch.bfloat16,
        )
        optimizer = torch.optim.AdamW(
            parameter_groups(model, config.weight_decay), lr=config.max_lr, betas=config.betas, eps=config.eps
        )
        with quietly():
            self.deepspeed, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=settings, dist_init_required=False
            )
        if stage == 3:  # the loss reads the head's matrix without a call of the head
            deepspeed.zero.register_external_parameter(
                module, dict(model.named_parameters(remove_duplicate=False))["head.weight"]
            )
        self.micro = 0

    @quietly()
    def loss(self, loss_fn: Callable[..., Tensor], batch: Any, n_targets: int) -> Tensor:
        return self.deepspeed(loss_fn, batch, n_targets)

    @quietly()
    def backward(self, loss: Float[Tensor, ""]) -> None:
        if self.micro:
            self.deepspeed.step()  # between two parts of a batch it only counts
        self.micro += 1
        # It takes the mean over processes and over parts; ours are parts of a sum.
        self.deepspeed.backward(loss * (self.world_size * self.config.accumulation))

    @quietly()
    def step(self, lr: float, limit: float = math.inf) -> Update:
        if limit < 0:
            raise TrainingDiverged(
                "a bad loss, and DeepSpeed cannot leave out a step; go on from the last checkpoint"
            )
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        norm = clip_gradients(self.model.parameters(), 0.0).item() if self.stage == 0 else None
        self.deepspeed.step()
        self.micro, norm = 0, float(self.deepspeed.get_global_grad_norm() if norm is None else norm)
        if not norm < limit:
            raise TrainingDiverged(
                f"the gradient's norm is {norm:.4g}, and DeepSpeed says so only after its update; go on from the last checkpoint"
            )
        return Update(norm, True)

    def each(self) -> Iterator[tuple[str, str, Any]]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        states = deepspeed_states(self.deepspeed.optimizer, self.stage)
        step = next((state["step"] for state in states.values()), torch.zeros(()))
        for name, p in self.model.named_parameters():
            yield "model", name, safe_get_full_fp32_param(p) if self.stage else p
            for key in STATES if step > 0 else ():
                mean = safe_get_full_optimizer_state(p, key) if self.stage else states[p][key]
                yield "optimizer", f"{name}.{key}", mean
            if step > 0:
                yield "optimizer", f"{name}.step", torch.as_tensor(float(step))

    @torch.no_grad()
    @quietly()
    def load_tensors(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        named, saved = dict(self.model.named_parameters()), groups["optimizer"]
        if (
            named.keys() != groups["model"].keys()
        ):  # shapes are DeepSpeed's to know: at stage 3 a parameter has none
            raise CheckpointError(
                f"the checkpoint does not fit the model: {sorted(named.keys() ^ groups['model'].keys())[:3]}"
            )
        states = deepspeed_states(self.deepspeed.optimizer, self.stage)
        for name, p in named.items():
            means = {key: saved[f"{name}.{key}"].clone() for key in STATES if f"{name}.step" in saved}
            if self.stage == 0:
                p.copy_(groups["model"][name])
                states[p] = {"step": torch.zeros(()), **means} if means else {}
                continue
            safe_set_full_fp32_param(p, groups["model"][name])
            with self.gathered([p], modifier_rank=0, enabled=self.stage == 3):
                p.copy_(groups["model"][name])
            for key, mean in means.items():
                safe_set_full_optimizer_state(p, mean, key)
        steps = [tensor for name, tensor in saved.items() if name.endswith(".step")]
        for state in states.values() if steps else ():
            state["step"] = steps[0].clone()


def deepspeed_settings(
    config: TrainConfig, *, stage: int, offload: bool, world_size: int, bf16: bool
) -> dict[str, Any]:
    """The configuration file of DeepSpeed, from ours."""
    if config.batch_size % (world_size * config.accumulation):
        raise ValueError(
            f"batch_size {config.batch_size} does not divide among {world_size} processes times {config.accumulation} parts"
        )
    zero: dict[str, Any] = {"stage": stage}
    if offload:
        if stage == 0:
            raise ValueError("offload needs zero_stage 1, 2 or 3: stage 0 is not sharded")
        zero["offload_optimizer"] = {"device": "cpu"}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.batch_size // (world_size * config.accumulation),
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.clip_norm,  # since 0.18 it is 1.0 if nothing is said
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its own has to be compiled; torch's runs on the host too
        "bf16": {"enabled": bf16},
        "steps_per_print": 10**9,
    }
