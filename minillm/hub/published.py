"""A model written as its family publishes it: its names, its settings, safetensors in shards with an index."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from minillm.base.files import atomic_write
from minillm.hub.build import TensorPlan, plan_tensors
from minillm.storage.tensors import save_tensors
from minillm.transformer import Transformer
from minillm.zoo import FAMILIES, family_of, join_heads


def shards_of(plans: Sequence[TensorPlan], itemsize: int, max_bytes: int) -> list[list[TensorPlan]]:
    """Cut a list of tensors into files of at most `max_bytes`, in order; a larger tensor has a file of its own."""
    shards: list[list[TensorPlan]] = [[]]
    size = 0
    for plan in plans:
        n_bytes = math.prod(plan.shape) * itemsize
        if shards[-1] and size + n_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(plan)
        size += n_bytes
    return shards


def fused(plan: TensorPlan, state: Mapping[str, Tensor], n_heads: int) -> Tensor:
    """Their tensor of one plan, from ours."""
    parts = [state[name] for name in plan.targets]
    if len(parts) == 1:
        return parts[0]
    return join_heads(parts, n_heads) if plan.row.by_head else torch.cat(parts)


def save_published(
    model: Transformer, folder: str | Path, *, family: str | None = None, max_shard_bytes: int = 5 << 30
) -> Path:
    """Write a model as its family publishes it: config.json and safetensors, in shards with an index if it is large.

    What is written for the LLaMA family, `transformers` loads. `ModelFolder` gives every model back, bit for bit.

    Args:
        model: of a shape that one of the families has; else use `own.save_model`.
        folder: new, or without a model in it.
        family: llama, chatglm, chatglm2 or baichuan; by default the first that can hold the shape.
        max_shard_bytes: size of a file.

    Returns:
        The folder.

    Raises:
        ValueError: no family has this shape, or not the one named; or the folder holds a model already.
    """
    folder, shape = Path(folder), model.config
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    kind = family_of(shape) if family is None else FAMILIES[family]
    settings = kind.write(shape)
    if kind.read(settings) != shape:
        raise ValueError(f"the family {kind.name!r} cannot hold this shape; {family_of(shape).name!r} can")
    if any(next(folder.glob(pattern), None) for pattern in ("config.json", "*.safetensors", "*.bin")):
        raise ValueError(f"{folder} holds a model already: choose another folder")
    state = dict(model.state_dict())
    if shape.tied:
        del state["head.weight"]
    plans = plan_tensors(kind.rows, {name: t.shape for name, t in state.items()}, shape.n_layers)
    shards = shards_of(plans, model.embed.weight.itemsize, max_shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards):
        save_tensors(
            folder / name, {plan.name: fused(plan, state, shape.n_heads) for plan in shard}, {"format": "pt"}
        )
    if len(shards) > 1:
        where = {plan.name: name for name, shard in zip(names, shards) for plan in shard}
        index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": where}
        with atomic_write(folder / "model.safetensors.index.json") as file:
            json.dump(index, file, indent=1)
    settings["torch_dtype"] = str(model.embed.weight.dtype).removeprefix("torch.")
    with atomic_write(folder / "config.json") as file:  # last: a folder without it is visibly unfinished
        json.dump(settings, file, indent=1)
    return folder
