"""LLaMA as Meta published it: `params.json`, and every matrix cut between `consolidated.00.pth`, `consolidated.01.pth`, …"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.base.errors import CheckpointError
from minillm.hub.weights import drop_pages, inside, map_pickle
from minillm.mlp import swiglu_hidden_dim
from minillm.transformer import ModelConfig
from minillm.zoo import FAMILIES, META_ROWS, float_setting, int_setting, llama_config, require

META = FAMILIES["llama"]._replace(rows=META_ROWS)


def open_slices(folder: Path) -> dict[Path, dict[str, Tensor]]:
    """The tensors of each slice, as views of its file.

    Raises:
        CheckpointError: a slice is missing or damaged.
    """
    files = sorted(path.name for path in folder.glob("consolidated.[0-9][0-9].pth"))
    if not files or files != [f"consolidated.{i:02}.pth" for i in range(len(files))]:
        raise CheckpointError(f"{folder}: consolidated.00.pth … are not all there, found {files}")
    return {path: map_pickle(path) for path in (inside(folder, name) for name in files)}


def read_params(settings: Mapping[str, Any], slices: Sequence[Mapping[str, Tensor]]) -> ModelConfig:
    """The shape that a params.json describes, with the two sizes that only the tensors tell.

    There is no context length in it; the model gets LLaMA's 2,048. Beyond it nothing fails but the quality.

    Raises:
        KeyError, ValueError: a setting or a tensor is missing, or has a value that is not supported.
    """
    hidden_dim = swiglu_hidden_dim(
        int_setting(settings, "dim"),
        multiplier=float_setting(settings, "ffn_dim_multiplier", 1.0),
        multiple_of=int_setting(settings, "multiple_of"),
    )
    require(
        {"hidden_dim": sum(len(part["layers.0.feed_forward.w1.weight"]) for part in slices)},
        hidden_dim=hidden_dim,
    )
    heads = int_setting(settings, "n_heads")
    return llama_config(
        int_setting(settings, "n_layers"),
        int_setting(settings, "dim"),
        heads,
        hidden_dim,
        n_kv_heads=int_setting(settings, "n_kv_heads", heads),
        vocab_size=len(slices[0]["tok_embeddings.weight"]),  # the table is cut by columns
        norm_eps=float_setting(settings, "norm_eps"),
    )


def join_slices(slices: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors from those of all slices: cut by rows, or by columns, or a copy in each.

    Raises:
        ValueError, RuntimeError: they do not fit together.
    """
    if any(part.keys() != slices[0].keys() for part in slices):
        raise ValueError("the slices hold different tensors")
    return {name: _join(name, [part[name] for part in slices]) for name in slices[0]}


def _join(name: str, parts: Sequence[Tensor]) -> Tensor:
    if len(parts) == 1 or parts[0].dim() == 1:
        return parts[0]
    columns = re.search(r"(tok_embeddings|attention\.wo|feed_forward\.w2)\.weight$", name)
    joined = torch.cat(list(parts), dim=1 if columns else 0)
    for part in parts:
        drop_pages(part)
    return joined
