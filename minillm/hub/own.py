"""Models in this package's own folders: one file of weights and a configuration."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minillm.base.errors import CheckpointError
from minillm.base.files import atomic_write
from minillm.storage.tensors import load_tensors, save_tensors

if TYPE_CHECKING:
    from minillm.transformer import Transformer


def save_model(folder: str | Path, model: Transformer, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write a model's config and weights as `config.json` and `model.safetensors`, each atomically.

    `weights`, if given, are its parameters by name, from an engine whose model is in pieces.
    """
    weights = dict(model.state_dict() if weights is None else weights)
    if model.config.tied:
        weights.pop("head.weight", None)  # one storage, stored once
    save_tensors(Path(folder) / "model.safetensors", weights, {"format": "minillm"})
    with atomic_write(Path(folder) / "config.json") as file:
        json.dump({"format": "minillm", "model": dataclasses.asdict(model.config)}, file, indent=1)


def load_model(
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """Read what `save_model` wrote. Weights keep the stored dtype unless one is given.

    Raises:
        CheckpointError: a file is missing or damaged, or tensors and config do not fit each other; it names them.
    """
    from minillm.transformer import (
        ModelConfig,
        Transformer,
        make_position,
    )  # chapters import this module: not at the top

    path = Path(folder) / "config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file; a model's folder has config.json and model.safetensors"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if (
        not isinstance(stored, dict)
        or stored.get("format") != "minillm"
        or not isinstance(stored.get("model"), dict)
    ):
        raise CheckpointError(f"{path}: not a minillm model (no 'format': 'minillm' with a 'model')")
    try:
        config = ModelConfig(**stored["model"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    weights = load_tensors(Path(folder) / "model.safetensors", device)
    with torch.device("meta"):
        model = Transformer(config)
    expected = {name: weight.shape for name, weight in model.state_dict().items()}
    if config.tied:
        del expected["head.weight"]
    for name, shape in expected.items():
        if name not in weights:
            raise CheckpointError(f"{folder}/model.safetensors: tensor {name!r} is missing")
        if weights[name].shape != shape:
            raise CheckpointError(
                f"{folder}/model.safetensors: {name!r} has shape {tuple(weights[name].shape)}, "
                f"config.json says {tuple(shape)}"
            )
    if extra := sorted(weights.keys() - expected.keys()):
        raise CheckpointError(f"{folder}/model.safetensors: unknown tensor {extra[0]!r}")
    if config.tied:
        weights["head.weight"] = weights["embed.weight"]
    model.load_state_dict(weights, assign=True)
    if config.tied:
        model.head.weight = model.embed.weight
    model.position = make_position(config)  # made of constants, which no checkpoint holds
    for block in model.blocks:
        block.attn.position = model.position  # type: ignore[union-attr]
    model.to(device)
    return model.to(dtype) if dtype is not None else model
