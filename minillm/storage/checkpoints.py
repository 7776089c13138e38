"""The numbered checkpoints of a run: tensors in groups, state, and a manifest of checksums; written by one process or by many."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minillm.base.errors import CheckpointError
from minillm.base.files import atomic_folder, sha256_file
from minillm.storage.tensors import load_tensors, save_tensors

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


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
        keep: how many checkpoints stay: this one and those before it. The rest is removed after this one has been read
            back from the disk. One of a later step, which a resumed run has passed over as damaged, is never counted.

    Returns:
        The new checkpoint's folder.

    Raises:
        CheckpointError: it cannot be written, or reads back differently; the checkpoints before it are still there.
    """
    path = Path(folder) / f"step-{step:08d}"
    with atomic_folder(path) as partial:
        for group, named in tensors.items():
            save_tensors(partial / f"{group}.safetensors", named)
        _seal(partial, step, state, {file.name: sha256_file(file) for file in sorted(partial.iterdir())})
    _settle(path, keep)
    return path


def _seal(partial: Path, step: int, state: Mapping[str, Any], sums: Mapping[str, str]) -> None:
    """Write state and manifest beside the tensors of a checkpoint; `atomic_folder` brings all of them to the disk."""
    (partial / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    sums = {**sums, "state.json": sha256_file(partial / "state.json")}
    (partial / MANIFEST).write_text(json.dumps({"step": step, "sha256": sums}, indent=1), encoding="utf-8")


def _settle(path: Path, keep: int) -> None:
    """Read a new checkpoint back from the disk; then let old ones go."""
    verify_checkpoint(path, from_disk=True)
    before = [old for old in _numbered(path.parent) if old.name < path.name]
    for old in before[keep - 1 :]:
        shutil.rmtree(old, ignore_errors=True)


def shard_key(name: str, first: int, shape: Sequence[int]) -> str:
    """The key of a run of a flattened tensor's elements: where it begins, and the whole tensor's shape.

    >>> shard_key("embed.weight", 128, (64, 32))
    'embed.weight@128@64x32'
    """
    return f"{name}@{first}@{'x'.join(map(str, shape))}"


def whole_shards(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Groups of whole tensors as shards: each tensor is one run of elements."""
    return {
        group: {shard_key(name, 0, tensor.shape): tensor.flatten() for name, tensor in named.items()}
        for group, named in groups.items()
    }


def join_shards(pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors from runs of their elements, whoever wrote them and in however many files.

    Raises:
        CheckpointError: a run is missing.
    """
    whole: dict[str, Tensor] = {}
    filled: Counter[str] = Counter()
    for key, piece in pieces.items():
        name, first, sizes = key.split("@")
        if name not in whole:
            whole[name] = piece.new_empty([int(size) for size in sizes.split("x") if size])
        whole[name].view(-1)[int(first) : int(first) + len(piece)] = piece
        filled[name] += len(piece)
    for name, tensor in whole.items():
        if filled[name] != tensor.numel():
            raise CheckpointError(
                f"{name}: {filled[name]:,} of its {tensor.numel():,} elements are in the checkpoint"
            )
    return whole


def save_sharded(
    folder: str | Path,
    step: int,
    *,
    shards: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    rank: int,
    everyone: Callable[[Any], list[Any]],
    keep: int = 2,
) -> Path:
    """`save_checkpoint` by many processes at once, each its own files: `<group>.00001-of-00004.safetensors`.

    All must see the same folder. `load_checkpoint` joins the pieces, for any number of processes.

    Args:
        folder, step, state, keep: as in `save_checkpoint`; process 0's state is written.
        shards: this process's groups; keys by `shard_key`. A group that is not sharded is given by process 0 alone.
        rank: of this process.
        everyone: gives every process the values of all, by rank, as `Engine.gather_objects`.

    Raises:
        CheckpointError: some process could not write; no process keeps anything.
    """
    path = Path(folder) / f"step-{step:08d}"
    with contextlib.ExitStack() as stack:
        try:
            mine: Any = str(stack.enter_context(atomic_folder(path))) if rank == 0 else None
        except OSError as error:
            mine = error
        offers = everyone(mine)
        partial, written = Path(str(offers[0])), {}
        try:
            if isinstance(offers[0], OSError):
                raise offers[0]
            for group, named in shards.items():
                if not named:  # nothing of it is ours, and a file without tensors cannot be read
                    continue
                sharded = any("@" in name for name in named)
                tail = f".{rank:05d}-of-{len(offers):05d}" if sharded else ""
                file = partial / f"{group}{tail}.safetensors"
                save_tensors(file, named)
                written[file.name] = sha256_file(file)
            report: Any = written
        except (OSError, CheckpointError) as error:
            report = error
        reports = everyone(report)
        for number, report in enumerate(reports):
            if isinstance(report, Exception):
                raise CheckpointError(f"{path}: process {number} could not write its part ({report})")
        if rank == 0:
            sums = {name: digest for report in reports for name, digest in report.items()}
            _seal(partial, step, state, sums)
    outcome: Any = None
    if rank == 0:
        try:
            _settle(path, keep)
        except CheckpointError as error:
            outcome = error
    if (failed := everyone(outcome)[0]) is not None:  # and nobody goes on before the folder has its name
        raise failed
    return path


def _numbered(folder: str | Path) -> list[Path]:
    return sorted(Path(folder).glob("step-" + "[0-9]" * 8), reverse=True)


def verify_checkpoint(path: str | Path, *, from_disk: bool = False) -> None:
    """Compare every file of a checkpoint with its manifest.

    Args:
        path: the checkpoint's folder.
        from_disk: read the disk, not the system's copy in memory.

    Raises:
        CheckpointError: a file is missing, cannot be read, or its checksum differs; the message names it.
    """
    for name, expected in _checksums(Path(path)).items():
        file = Path(path) / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        try:
            found = sha256_file(file, from_disk=from_disk)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error})") from error
        if found != expected:
            raise CheckpointError(f"{file}: checksum differs from {MANIFEST}; the file is damaged")


def _checksums(path: Path) -> dict[str, str]:
    try:
        sums = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        if not isinstance(sums, dict) or "state.json" not in sums:
            raise ValueError("no state.json in it")
        return sums
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: unreadable ({error})") from error


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
    files = [path / name for name in sorted(_checksums(path)) if name.endswith(".safetensors")]
    groups: dict[str, dict[str, Tensor]] = {}
    for file in files:
        groups.setdefault(file.name.partition(".")[0], {}).update(load_tensors(file, device))
    for group, named in groups.items():
        if any("@" in name for name in named):
            groups[group] = join_shards(named)
    return groups, json.loads((path / "state.json").read_text(encoding="utf-8"))


def check_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Tensors must have the names and shapes of a model's parameters.

    Raises:
        CheckpointError: which names or shapes differ.
    """
    named = dict(model.named_parameters())
    if named.keys() != tensors.keys():
        missing, extra = sorted(named.keys() - tensors.keys())[:3], sorted(tensors.keys() - named.keys())[:3]
        raise CheckpointError(f"the checkpoint does not fit the model: missing {missing}, unknown {extra}")
    for name, p in named.items():
        if p.shape != tensors[name].shape:
            raise CheckpointError(
                f"{name}: the checkpoint has {tuple(tensors[name].shape)}, the model {tuple(p.shape)}"
            )


@torch.no_grad()
def load_parameters(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into a model's parameters by name, after `check_tensors`."""
    check_tensors(model, tensors)
    for name, p in model.named_parameters():
        p.copy_(tensors[name])
