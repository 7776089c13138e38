"""Named tensors in safetensors files, which are whole or not there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from minillm.base.errors import CheckpointError
from minillm.base.files import atomic_path


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors as one safetensors file, atomically.

    Tensors that share storage (a tied head and embedding) must be given once; safetensors refuses aliases.

    Raises:
        CheckpointError: the file cannot be written; a full disk, most often.
    """
    try:
        with atomic_path(path) as partial:
            plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
            save_file(plain, partial, metadata=dict(metadata or {}))
    except SafetensorError as error:
        raise CheckpointError(f"{path}: cannot be written ({error})") from error


def load_tensors(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file. On the CPU its tensors are views of the file: nothing is read until it is used.

    Raises:
        CheckpointError: the file is missing, truncated or not safetensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        return load_file(path, device=str(device))
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({error})") from error


def load_metadata(path: str | Path) -> dict[str, str]:
    """What `save_tensors` was given as metadata.

    Raises:
        CheckpointError: the file is missing, truncated or not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({error})") from error
