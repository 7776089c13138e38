"""Files of weights from strangers: safetensors mapped, pickles read without running them, shards behind one index."""

import ctypes
import json
import mmap
import os
import pickletools
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.base.errors import CheckpointError
from minillm.storage.tensors import load_tensors


def inside(folder: Path, name: Any) -> Path:
    """The path of a regular file that lies in `folder`.

    A link may lead to another file of the folder, or into the `blobs` of a Hugging Face cache, whose snapshots consist of
    such links. Nowhere else.

    Raises:
        CheckpointError: `name` is no plain file name, or there is no such file, or it leads out of the folder.
    """
    if not isinstance(name, str) or not name or name in (".", "..") or re.search(r"[/\\\0]", name):
        raise CheckpointError(f"{folder}: {name!r} is not the name of a file in this folder")
    path = folder / name
    try:
        home, real = folder.resolve(), path.resolve()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: a link that leads nowhere ({error})") from error
    allowed = {home, home.parent.parent / "blobs"} if home.parent.name == "snapshots" else {home}
    if real.parent not in allowed:
        raise CheckpointError(f"{path}: a link out of the folder, to {real}")
    if not path.is_file():
        kind = "not a regular file" if os.path.lexists(path) else "no such file"
        raise CheckpointError(f"{path}: {kind}")
    return path


def read_json(path: Path, max_bytes: int = 1 << 20) -> dict[str, Any]:
    """A JSON object from a file that may hold anything.

    Raises:
        CheckpointError: the file is too large, or is not a JSON object.
    """
    try:
        if path.stat().st_size > max_bytes:
            raise CheckpointError(f"{path}: larger than {max_bytes:,} bytes")
        data = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: not a JSON object but {type(data).__name__}")
    return data


MAX_TABLE_BYTES = 8 << 20  # of a table of contents; that of a 70B model takes 100 kB

SAFE_GLOBALS = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    *(f"torch.{kind}Storage" for kind in ("Double", "Float", "Half", "BFloat16")),
    *(f"torch.{kind}Storage" for kind in ("Long", "Int", "Short", "Char", "Byte", "Bool")),
}


def check_pickle(path: Path) -> None:
    """Read a `.bin` file's list of instructions, and refuse it before one is carried out, unless they only build tensors.

    Raises:
        CheckpointError: the file is damaged or compressed, or names anything but tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise CheckpointError(f"{path}: compressed, which torch never does; refused")
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise CheckpointError(f"{path}: its entries overlap; refused")
            programs = [entry for entry in entries if entry.filename.endswith("data.pkl")]
            if len(programs) != 1 or programs[0].file_size > MAX_TABLE_BYTES:
                raise CheckpointError(f"{path}: not a file of tensors")
            program = archive.read(programs[0])
        for opcode, argument, _ in pickletools.genops(program):
            name = str(argument).replace(" ", ".", 1) if opcode.name == "GLOBAL" else opcode.name
            other = opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4")
            if other or (opcode.name == "GLOBAL" and name not in SAFE_GLOBALS):
                raise CheckpointError(
                    f"{path}: its pickle calls {name}, only tensors are read; nothing was run"
                )
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path}: truncated, or no file of torch 1.6 or later ({error})") from error
    except (OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from error


def map_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.bin` or `.pth` file, as views of the file; no code of it runs.

    Raises:
        CheckpointError: the file is damaged, or holds anything but named tensors.
    """
    check_pickle(path)
    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # what a damaged pickle raises is not listed anywhere
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: damaged ({reason})") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: holds {type(loaded).__name__}, not named tensors")
    for name, value in loaded.items():
        plain = isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu"
        if not isinstance(name, str) or not plain:
            raise CheckpointError(f"{path}: {name!r} is {type(value).__name__}, not a plain tensor")
    return {name: value.detach() for name, value in loaded.items()}


@dataclass(frozen=True)
class Weights:
    """All tensors of a folder, as views of its files, and which file each is from."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)

    def add(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Add those of one file.

        Raises:
            CheckpointError: one is there already.
        """
        for name, tensor in tensors.items():
            if name in self.tensors:
                raise CheckpointError(f"{path}: tensor {name!r} is in {self.files[name].name} as well")
            self.tensors[name], self.files[name] = tensor, path

    def main_dtype(self) -> torch.dtype:
        """The floating dtype of most of the numbers: published files mix float32 norms with float16 matrices."""
        sizes: Counter[torch.dtype] = Counter()
        for tensor in self.tensors.values():
            if tensor.is_floating_point():
                sizes[tensor.dtype] += tensor.numel()
        return sizes.most_common(1)[0][0] if sizes else torch.float32


def read_shard_index(path: Path) -> dict[str, set[str]]:
    """The shards that an index names, each with the tensors that it should hold.

    Raises:
        CheckpointError: the index is damaged.
    """
    names = read_json(path, MAX_TABLE_BYTES).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(v, str) for v in names.values()):
        raise CheckpointError(f"{path}: no 'weight_map' from tensors to files")
    shards: dict[str, set[str]] = {}
    for tensor, shard in names.items():
        shards.setdefault(shard, set()).add(tensor)
    return shards


def open_weights(folder: Path) -> Weights:
    """Map the weights of a folder: safetensors before `.bin`, one file before an index.

    Raises:
        CheckpointError: there are none, or a file is missing, damaged or outside the folder.
    """
    weights = Weights()
    for name, opened in (("model.safetensors", load_tensors), ("pytorch_model.bin", map_pickle)):
        if os.path.lexists(folder / name):
            path = inside(folder, name)
            weights.add(path, opened(path))
            return weights
        if os.path.lexists(folder / f"{name}.index.json"):
            index = inside(folder, f"{name}.index.json")
            for shard, promised in read_shard_index(index).items():
                path = inside(folder, shard)
                weights.add(path, opened(path))
                if missing := sorted(promised - weights.tensors.keys()):
                    raise CheckpointError(f"{path}: {missing[0]!r} is missing, which {index.name} promises")
            return weights
    raise CheckpointError(
        f"{folder}: no weights: neither model.safetensors nor pytorch_model.bin, nor an index of either"
    )


def drop_pages(tensor: Tensor) -> None:
    """Let the kernel drop the pages behind a view of a file. They come back from the file when they are used."""
    if not sys.platform.startswith("linux"):
        return
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page  # whole pages only: the rest belongs to the neighbours
    stop = (tensor.data_ptr() + tensor.nbytes) // page * page
    if stop > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)


def copied(stored: Tensor, dtype: torch.dtype, *, chunk_bytes: int = 1 << 24) -> Tensor:
    """A copy in another dtype, made piece by piece, and of the original no more than a piece in memory."""
    out = torch.empty(stored.shape, dtype=dtype)
    if not stored.is_contiguous() or not stored.numel():
        return out.copy_(stored)
    n_elements = max(1, chunk_bytes // max(stored.itemsize, out.itemsize))
    for target, source in zip(out.view(-1).split(n_elements), stored.view(-1).split(n_elements)):
        target.copy_(source)
        drop_pages(source)
    return out
