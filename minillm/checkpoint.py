"""Files that are either whole or not there: atomic writes, safetensors with checksums, numbered checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from minillm.transformer import Transformer

__all__ = [
    "CheckpointError",
    "MiniLLMError",
    "atomic_folder",
    "atomic_write",
    "latest_checkpoint",
    "load_checkpoint",
    "load_model",
    "load_tensors",
    "save_checkpoint",
    "save_model",
    "save_tensors",
    "sha256_file",
]

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"


class MiniLLMError(Exception):
    """Something is wrong with a file or with data; the message names it. The command line exits with status 2."""


class CheckpointError(MiniLLMError):
    """A checkpoint is missing, damaged or does not fit."""


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file for writing that appears under its name only when it is complete and on disk.

    A crash, a full disk or an exception leaves the old file, or none, and no partial one.

    Args:
        path: the file; its folder is created.
        mode: "w" for UTF-8 text with \\n line ends, "wb" for bytes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    options: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with os.fdopen(handle, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill that appears under its name only when it is complete. An existing folder is replaced."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield partial
        os.chmod(partial, 0o777 & ~_umask())
        for file in partial.iterdir():
            if file.is_file():
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old.", suffix=".tmp"))
            os.replace(path, old / "old")
            os.replace(partial, path)
            shutil.rmtree(old)
        else:
            os.replace(partial, path)
        _sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # a rename is durable once its folder is
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file, as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors as one safetensors file, atomically.

    Tensors that share storage (a tied head and embedding) must be given once; safetensors refuses aliases.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        save_file(plain, partial, metadata=dict(metadata or {}))
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise


def load_tensors(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file.

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


def save_checkpoint(
    folder: str | Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write `folder/step-00001000/` with one safetensors file per group, `state.json` and a manifest of checksums.

    Args:
        folder: where a run keeps its checkpoints.
        step: the number of finished optimizer steps.
        tensors: groups of named tensors, as in {"model": …, "optimizer": …}; each becomes `<group>.safetensors`.
        state: everything else; must be JSON.
        keep: how many checkpoints stay, newest first; older ones are removed after the new one is safe.

    Returns:
        The new checkpoint's folder.
    """
    path = Path(folder) / f"step-{step:08d}"
    with atomic_folder(path) as partial:
        for group, named in tensors.items():
            save_tensors(partial / f"{group}.safetensors", named)
        with atomic_write(partial / "state.json") as file:
            json.dump(state, file, indent=1)
        sums = {file.name: sha256_file(file) for file in sorted(partial.iterdir())}
        with atomic_write(partial / MANIFEST) as file:
            json.dump({"step": step, "sha256": sums}, file, indent=1)
    for old in _numbered(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def _numbered(folder: str | Path) -> list[Path]:
    return sorted(Path(folder).glob("step-" + "[0-9]" * 8), reverse=True)


def verify_checkpoint(path: str | Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        CheckpointError: a file is missing or its checksum differs; the message names it.
    """
    path = Path(path)
    try:
        sums = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path / MANIFEST}: unreadable ({error})") from error
    for name, expected in sums.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name}: missing")
        if sha256_file(path / name) != expected:
            raise CheckpointError(f"{path / name}: checksum differs from {MANIFEST}; the file is damaged")


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest undamaged checkpoint of a run, or None. Damaged ones are logged and passed over."""
    for path in _numbered(folder):
        try:
            verify_checkpoint(path)
            return path
        except CheckpointError as error:
            log.warning("%s; falling back to the checkpoint before it", error)
    return None


def load_checkpoint(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint that `save_checkpoint` wrote, after verifying its checksums.

    Returns:
        The groups of tensors, and the state.
    """
    path = Path(path)
    verify_checkpoint(path)
    groups = {file.stem: load_tensors(file, device) for file in sorted(path.glob("*.safetensors"))}
    return groups, json.loads((path / "state.json").read_text(encoding="utf-8"))


def save_model(folder: str | Path, model: Transformer) -> None:
    """Write a model's config and weights as `config.json` and `model.safetensors`, each atomically."""
    weights = dict(model.state_dict())
    if model.config.tied:
        del weights["head.weight"]  # one storage, stored once
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
