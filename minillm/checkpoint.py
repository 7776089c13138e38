"""Files that are either whole or not there: atomic writes, safetensors with checksums, numbered checkpoints."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from minillm.transformer import Transformer

__all__ = [
    "CheckpointError",
    "MiniLLMError",
    "atomic_folder",
    "atomic_write",
    "clean_leftovers",
    "first_difference",
    "latest_checkpoint",
    "load_checkpoint",
    "load_metadata",
    "load_model",
    "load_tensors",
    "save_checkpoint",
    "save_model",
    "save_sharded",
    "save_tensors",
    "sha256_file",
    "shard_key",
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
    """A folder to fill that appears under its name only when it is complete and on disk. An existing folder is replaced."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield partial
        os.chmod(partial, 0o777 & ~_umask())
        for folder, _, files in os.walk(partial):
            for name in files:
                with open(os.path.join(folder, name), "rb") as file:
                    os.fsync(file.fileno())
            _sync_folder(folder)
        if path.exists():
            _exchange(partial, path)
        else:
            os.replace(partial, path)
        _sync_folder(path.parent)
    finally:  # the partial folder, or the one that was replaced
        shutil.rmtree(partial, ignore_errors=True)


def _exchange(new: Path, path: Path) -> None:
    """Swap two names. On Linux and macOS a kill leaves the one or the other; elsewhere `clean_leftovers` mends it."""
    swap = _swap_call()
    if swap is not None and swap(os.fsencode(new), os.fsencode(path)) == 0:
        return
    old = path.with_name(f".{path.name}.old.tmp")
    os.replace(path, old)
    os.replace(new, path)
    shutil.rmtree(old, ignore_errors=True)


def _swap_call() -> Callable[[bytes, bytes], int] | None:
    """The system's call that swaps two names in one step, if there is one; it returns 0 where it could."""
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows
        return None
    if hasattr(libc, "renameat2"):
        here, exchange = -100, 2  # AT_FDCWD in fcntl.h, RENAME_EXCHANGE in linux/fs.h
        return lambda a, b: libc.renameat2(here, a, here, b, exchange)
    if hasattr(libc, "renamex_np"):
        return lambda a, b: libc.renamex_np(a, b, 2)  # RENAME_SWAP in sys/stdio.h
    return None


_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(old|[a-z0-9_]{8})\.tmp")


def clean_leftovers(folder: str | Path) -> list[str]:
    """Remove what writes that a kill cut short have left in a folder. Only the holder of the folder's lock may call it.

    Returns:
        The names that are gone.
    """
    gone = []
    for item in sorted(Path(folder).glob(".*.tmp")):
        found = _LEFTOVER.fullmatch(item.name)
        if found is None:
            continue
        if found[2] == "old" and not item.with_name(found["name"]).exists():
            os.replace(item, item.with_name(found["name"]))  # killed between the two renames of `_exchange`
        elif item.is_dir():
            shutil.rmtree(item)
        else:
            item.unlink()
        gone.append(item.name)
    if gone:
        log.info("%s: removed what a killed process left: %s", folder, ", ".join(gone))
    return gone


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: str | Path) -> None:
    if os.name == "posix":  # a rename is durable once its folder is
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256_file(path: str | Path, *, from_disk: bool = False) -> str:
    """The SHA-256 of a file, as 64 hex digits; on request of what is on the disk, not of the copy in memory (Linux)."""
    with open(path, "rb") as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_difference(old: Any, new: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first setting in which two nested configurations differ: (dotted name, old value, new value)."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            found = first_difference(old.get(key), new.get(key), f"{name}.{key}" if name else key)
            if found:
                return found
        return None
    return None if old == new else (name, old, new)


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors as one safetensors file, atomically.

    Tensors that share storage (a tied head and embedding) must be given once; safetensors refuses aliases.

    Raises:
        CheckpointError: the file cannot be written; a full disk, most often.
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
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        if isinstance(error, SafetensorError):
            raise CheckpointError(f"{path}: cannot be written ({error})") from error
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
