"""One setting that picks the engine: plain, ZeRO from nothing, FSDP2, DeepSpeed."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import nn

from minillm.train import Engine, TrainConfig
from minillm.vendors.deepspeed import DeepSpeed
from minillm.vendors.fsdp import FSDP2
from minillm.zero import DataParallel, Zero1, Zero2, Zero3

EngineName = Literal["plain", "zero", "deepspeed", "fsdp2"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Who trains: one setting between our ZeRO, DeepSpeed and FSDP2 (chapter 18). A run may be taken up by another engine."""

    engine: EngineName = "plain"
    """plain: one process, or a copy on each; zero: chapter 18's; deepspeed; fsdp2: PyTorch's. Start several with torchrun."""
    zero_stage: int = 2
    """0: nothing is shared out, 1: the optimizer's state, 2: and gradients, 3: and parameters. fsdp2 knows 2 and 3."""
    parameters: Literal["float32", "bfloat16"] = "float32"
    """Of the model in forward and backward; with bfloat16 the optimizer keeps a float32 copy."""
    offload: bool = False
    """deepspeed: the optimizer's state in the memory of the host."""
    sharded: bool = False
    """Checkpoints in pieces: every process writes its own, in place of process 0 everything. Either kind can be read."""
    timeout_s: float = 600.0
    """How long a process waits for another one before it gives up."""

    def __post_init__(self):
        if self.engine not in get_args(EngineName) or self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(
                f"engine must be one of {', '.join(get_args(EngineName))} and zero_stage 0 to 3, got {self.engine!r}, {self.zero_stage}"
            )
        if self.parameters not in ("float32", "bfloat16") or not self.timeout_s > 0:
            raise ValueError(
                f"parameters must be float32 or bfloat16 and timeout_s above 0, got {self.parameters!r} and {self.timeout_s}"
            )
        if self.offload and self.engine != "deepspeed":
            raise ValueError(f"offload is for engine deepspeed, got engine {self.engine!r}")
        if self.engine == "fsdp2" and self.zero_stage < 2:
            raise ValueError(
                f"fsdp2 is ZeRO stage 2 or 3, got zero_stage={self.zero_stage}: use engine zero or deepspeed for others"
            )


def make_engine(model: nn.Module, config: TrainConfig, settings: EngineConfig) -> Engine:
    """The engine that `settings` name, for the processes that are there.

    Raises:
        ValueError: settings that do not go together.
    """
    dtype = getattr(torch, settings.parameters)
    if dtype == torch.bfloat16 and config.dtype != "bfloat16":
        raise ValueError("parameters in bfloat16 need products in bfloat16: set dtype='bfloat16'")
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if settings.engine == "plain":
        if dtype == torch.float32 and world_size == 1:
            return Engine(model, config)
        engine: Engine = DataParallel(model, config, parameter_dtype=dtype)
    elif settings.engine == "zero":
        kind = (DataParallel, Zero1, Zero2, Zero3)[settings.zero_stage]
        engine = kind(model, config, parameter_dtype=dtype)
    elif settings.engine == "fsdp2":
        engine = FSDP2(model, config, stage=settings.zero_stage, parameter_dtype=dtype)
    else:
        stage, offload = settings.zero_stage, settings.offload
        engine = DeepSpeed(model, config, stage=stage, offload=offload, parameter_dtype=dtype)
    engine.sharded = settings.sharded
    return engine
