"""Models in this package's own format: `config.json` and `model.safetensors`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from minillm.base.files import atomic_write
from minillm.storage.tensors import save_tensors
from minillm.transformer import Transformer

FORMAT = "minillm"


def save_model(folder: str | Path, model: Transformer, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write a model's config and weights as `config.json` and `model.safetensors`, each atomically.

    `weights`, if given, are its parameters by name, from an engine whose model is in pieces.
    """
    weights = dict(model.state_dict() if weights is None else weights)
    if model.config.tied:
        weights.pop("head.weight", None)  # one storage, stored once
    save_tensors(Path(folder) / "model.safetensors", weights, {"format": FORMAT})
    with atomic_write(Path(folder) / "config.json") as file:
        json.dump({"format": FORMAT, "model": dataclasses.asdict(model.config)}, file, indent=1)
