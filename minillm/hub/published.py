"""Published checkpoints, tensor by tensor: read into our model, and written back."""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minillm.base.errors import CheckpointError
from minillm.base.files import atomic_write
from minillm.hub.own import load_model
from minillm.hub.weights import Weights, copied, inside, map_pickle, open_weights, read_json, release
from minillm.mlp import swiglu_hidden_dim
from minillm.storage.tensors import save_tensors
from minillm.transformer import ModelConfig, Transformer, count_parameters
from minillm.zoo import (
    FAMILIES,
    META_ROWS,
    Family,
    Row,
    bits_of,
    dequantize,
    family_of,
    insist,
    join_heads,
    llama_config,
    pairs_to_halves,
    real,
    recognise,
    split_heads,
    whole,
)


def read_config(folder: str | Path, *, norm_head: bool | None = None) -> tuple[Family, ModelConfig]:
    """The family and the shape that a folder's `config.json` describes; no weights are touched.

    Raises:
        CheckpointError: it is missing, or not JSON, or describes no model of ours.
    """
    path = inside(Path(folder), "config.json")
    settings = read_json(path)
    family = recognise(settings, path)
    try:
        found = family.read(settings)
        return family, found if norm_head is None else replace(found, norm_head=norm_head)
    except KeyError as error:
        raise CheckpointError(f"{path}: no {error.args[0]!r}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


class Job(NamedTuple):
    """One tensor of theirs, checked: which of ours it becomes, and how."""

    row: Row
    name: str
    scale: str | None
    targets: dict[str, torch.Size]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole: the rows of all targets."""
        first = next(iter(self.targets.values()))
        return sum(shape[0] for shape in self.targets.values()), *first[1:]


def jobs_of(rows: Sequence[Row], expected: Mapping[str, torch.Size], n_layers: int) -> Iterator[Job]:
    """Every tensor that a family stores for a model of these tensors, layer by layer.

    Args:
        rows: the family's table.
        expected: shapes of the model's own tensors, by name.
        n_layers: layers of the model.
    """
    for row in rows:
        for n in range(n_layers) if "{n}" in row.theirs else (0,):
            for suffix in ("weight", "bias"):
                ours = [f"{part.format(n=n)}.{suffix}" for part in row.ours]
                if all(name in expected for name in ours):
                    name = f"{row.theirs.format(n=n)}.{suffix}"
                    yield Job(row, name, None, {name: expected[name] for name in ours})


IGNORED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|rope\.freqs)$")


def match(jobs: Sequence[Job], weights: Weights, family: Family, folder: Path) -> list[Job]:
    """Hold what is stored against what is needed: every tensor there, none too many, all of the right shape.

    Raises:
        CheckpointError: naming the tensor, its file and what is wrong.
    """
    left = {name for name in weights.tensors if not IGNORED.search(name)}
    matched = []
    for job in jobs:
        if job.name not in weights.tensors:
            raise CheckpointError(f"{folder}: tensor {job.name!r} is missing")
        stored, path = weights.tensors[job.name], weights.files[job.name]
        base = job.name.removesuffix(".weight")
        scales = [s for s in (f"{base}.weight_scale", f"{base}.scale") if s in weights.tensors]
        scale = scales[0] if scales and not stored.is_floating_point() else None
        if scale is not None:
            try:
                bits_of(stored, weights.tensors[scale], job.shape, transposed=family.transposed_int8)
            except ValueError as error:
                raise CheckpointError(f"{path}: {job.name!r}: {error}") from error
        elif not stored.is_floating_point():
            raise CheckpointError(
                f"{path}: {job.name!r} is {stored.dtype}, and has no weight_scale beside it"
            )
        elif stored.shape != job.shape:
            found = f"has shape {tuple(stored.shape)}"
            raise CheckpointError(f"{path}: {job.name!r} {found}, config.json says {job.shape}")
        left -= {job.name, scale}
        matched.append(job._replace(scale=scale))
    if left:
        name = min(left)
        raise CheckpointError(f"{weights.files[name]}: unknown tensor {name!r}")
    return matched


def carry_out(
    job: Job, weights: Weights, config: ModelConfig, dtype: torch.dtype, transposed: bool
) -> dict[str, Tensor]:
    """Our tensors of one job: views of the file where nothing has to change, else copies."""
    stored = weights.tensors[job.name]
    if job.scale is not None:
        scale = weights.tensors[job.scale].to(torch.promote_types(dtype, torch.float32))
        whole = dequantize(stored, scale, job.shape, transposed=transposed).to(dtype)
        release(stored)
    elif stored.dtype == dtype and stored.is_contiguous():
        whole = stored
    else:
        whole = copied(stored, dtype)
    if job.row.by_head:
        parts = split_heads(whole, len(job.targets), config.n_heads)
    elif job.row.rotary:
        heads = config.n_heads if "wq" in job.row.ours[0] else config.n_kv_heads
        parts = [pairs_to_halves(whole, heads)]
    else:
        return dict(zip(job.targets, whole.split([shape[0] for shape in job.targets.values()])))
    if whole is stored:
        release(stored)
    return dict(zip(job.targets, parts))


MAX_LAYERS = 1024


def check_size(config: ModelConfig, weights: Weights, folder: Path) -> None:
    """Refuse a shape that the files cannot hold, before a byte is allocated for it.

    Raises:
        CheckpointError: too many layers, or more parameters than half-byte numbers would fit in the files.
    """
    n_bytes = sum(path.stat().st_size for path in set(weights.files.values()))  # a tensor can claim any size
    wanted = count_parameters(config).total
    if config.n_layers > MAX_LAYERS or wanted > 2 * n_bytes:
        raise CheckpointError(
            f"{folder}: config.json describes {config.n_layers:,} layers and {wanted:,} parameters, "
            f"the files hold {n_bytes:,} bytes"
        )


class NoStart(TorchFunctionMode):
    """While it is active, `torch.nn.init` does nothing: weights that will be replaced need no random start."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def fill(
    config: ModelConfig,
    weights: Weights,
    family: Family,
    folder: Path,
    dtype: torch.dtype | None,
    device: str | torch.device,
) -> Transformer:
    """A model of this shape with these weights, each tensor made when the one before is done."""
    check_size(config, weights, folder)
    with torch.device("meta"), NoStart():
        model = Transformer(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tied:
        del expected["head.weight"]
    dtype = weights.main_dtype() if dtype is None else dtype
    jobs = match(list(jobs_of(family.rows, expected, config.n_layers)), weights, family, folder)
    state: dict[str, Tensor] = {}
    for job in jobs:
        made = carry_out(job, weights, config, dtype, family.transposed_int8)
        state |= {name: tensor.to(device) for name, tensor in made.items()}
    if config.tied:
        state["head.weight"] = state["embed.weight"]
    model.load_state_dict(state, assign=True)
    if config.tied:
        model.head.weight = model.embed.weight
    return model.to(device)


def settle_head(config: ModelConfig, weights: Weights, family: Family, tied: bool | None) -> ModelConfig:
    """Whether head and embedding are one: they are not where the files hold two, unless config.json ties two equal ones.

    Args:
        tied: what config.json says, or None where it says nothing.
    """
    head, table = (
        next(row.theirs + ".weight" for row in family.rows if row.ours == (part,))
        for part in ("head", "embed")
    )
    if head not in weights.tensors or table not in weights.tensors:
        return config
    same = bool(tied) and torch.equal(weights.tensors[head], weights.tensors[table])
    if same:
        del weights.tensors[head]
    return replace(config, tied=same)


def load_checkpoint(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    norm_head: bool | None = None,
) -> Transformer:
    """The model of a published folder: Hugging Face's layout of LLaMA, ChatGLM, ChatGLM2 and Baichuan, or Meta's.

    Weights stay views of the files where dtype and order are ours already: memory is taken when they are used, and a file
    must not be overwritten in place while the model lives.

    Args:
        folder: with config.json and safetensors or `.bin` files, one or several with an index. Also Meta's params.json and
            consolidated.NN.pth, and the folders of `checkpoint.save_model`.
        dtype: of all weights; by default the one in which most of the numbers are stored.
        device: where they go.
        norm_head: whether the head's rows are normed (Baichuan2); by default the vocabulary of 125,696 says so.

    Raises:
        CheckpointError: anything about the folder is wrong; the message names file and fault. No code of it is run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if not os.path.lexists(folder / "config.json") and os.path.lexists(folder / "params.json"):
        return load_meta(folder, dtype=dtype, device=device)
    settings = read_json(inside(folder, "config.json"))
    if settings.get("format") == "minillm":
        return load_model(folder, dtype=dtype, device=device)
    family, found = read_config(folder, norm_head=norm_head)
    weights = open_weights(folder)
    found = settle_head(found, weights, family, settings.get("tie_word_embeddings"))
    return fill(found, weights, family, folder, dtype, device)


def join_slices(name: str, slices: Sequence[Tensor]) -> Tensor:
    """One tensor of the slices in which Meta's larger models are stored: by rows, or by columns, or a copy in each."""
    if len(slices) == 1 or slices[0].dim() == 1:
        return slices[0]
    columns = re.search(r"(tok_embeddings|attention\.wo|feed_forward\.w2)\.weight$", name)
    joined = torch.cat(list(slices), dim=1 if columns else 0)
    for part in slices:
        release(part)
    return joined


def read_meta(settings: Mapping[str, Any], vocab_size: int, n_hidden: int) -> ModelConfig:
    """The shape that Meta's params.json describes, with the two sizes that only the tensors tell."""
    hidden_dim = swiglu_hidden_dim(
        whole(settings, "dim"),
        multiplier=real(settings, "ffn_dim_multiplier", 1.0),
        multiple_of=whole(settings, "multiple_of"),
    )
    insist({"hidden_dim": n_hidden}, hidden_dim=hidden_dim)
    heads = whole(settings, "n_heads")
    return llama_config(
        whole(settings, "n_layers"),
        whole(settings, "dim"),
        heads,
        hidden_dim,
        n_kv_heads=whole(settings, "n_kv_heads", heads),
        vocab_size=vocab_size,
        norm_eps=real(settings, "norm_eps"),
    )


def load_meta(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Transformer:
    """A LLaMA as Meta published it: params.json and consolidated.00.pth, or several slices of it.

    params.json has no context length; the model gets LLaMA's 2,048. Beyond it nothing fails but the quality.

    Raises:
        CheckpointError: anything about the folder is wrong.
    """
    folder = Path(folder)
    path = inside(folder, "params.json")
    settings = read_json(path)
    files = sorted(p.name for p in folder.glob("consolidated.[0-9][0-9].pth"))
    if not files or files != [f"consolidated.{i:02}.pth" for i in range(len(files))]:
        raise CheckpointError(f"{folder}: consolidated.00.pth … are not all there, found {files}")
    slices = [map_pickle(inside(folder, name)) for name in files]
    weights = Weights({}, {})
    try:
        names = slices[0].keys()
        if any(part.keys() != names for part in slices):
            raise ValueError("the slices hold different tensors")
        table = join_slices("tok_embeddings.weight", [part["tok_embeddings.weight"] for part in slices])
        hidden = sum(part["layers.0.feed_forward.w1.weight"].shape[0] for part in slices)
        found = read_meta(settings, table.shape[0], hidden)
        joined = {name: join_slices(name, [part[name] for part in slices]) for name in names}
    except KeyError as error:
        raise CheckpointError(f"{path}: no {error.args[0]!r}") from error
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    weights.add(folder / files[0], joined)
    return fill(found, weights, FAMILIES["llama"]._replace(rows=META_ROWS), folder, dtype, device)


def shards_of(jobs: Sequence[Job], itemsize: int, max_bytes: int) -> list[list[Job]]:
    """Cut a list of tensors into files of at most `max_bytes`, in order; a larger tensor has a file of its own."""
    shards: list[list[Job]] = [[]]
    size = 0
    for job in jobs:
        n_bytes = math.prod(job.shape) * itemsize
        if shards[-1] and size + n_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(job)
        size += n_bytes
    return shards


def fused(job: Job, state: Mapping[str, Tensor], n_heads: int) -> Tensor:
    """Their tensor of one job, from ours."""
    parts = [state[name] for name in job.targets]
    if len(parts) == 1:
        return parts[0]
    return join_heads(parts, n_heads) if job.row.by_head else torch.cat(parts)


def save_checkpoint(
    model: Transformer, folder: str | Path, *, family: str | None = None, max_shard_bytes: int = 5 << 30
) -> Path:
    """Write a model as its family publishes it: config.json and safetensors, in shards with an index if it is large.

    What is written for the LLaMA family, `transformers` loads. `load_checkpoint` gives every model back, bit for bit.

    Args:
        model: of a shape that one of the families has; else use `checkpoint.save_model`.
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
    jobs = list(jobs_of(kind.rows, {name: t.shape for name, t in state.items()}, shape.n_layers))
    shards = shards_of(jobs, model.embed.weight.itemsize, max_shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards):
        save_tensors(
            folder / name, {job.name: fused(job, state, shape.n_heads) for job in shard}, {"format": "pt"}
        )
    if len(shards) > 1:
        where = {job.name: name for name, shard in zip(names, shards) for job in shard}
        index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": where}
        with atomic_write(folder / "model.safetensors.index.json") as file:
            json.dump(index, file, indent=1)
    settings["torch_dtype"] = str(model.embed.weight.dtype).removeprefix("torch.")
    with atomic_write(folder / "config.json") as file:  # last: a folder without it is visibly unfinished
        json.dump(settings, file, indent=1)
    return folder


def load_shape(folder: str | Path) -> ModelConfig:
    """The shape of a model's folder, published or our own, from its `config.json` alone.

    Raises:
        CheckpointError: it is missing, damaged, or describes no model of ours.
    """
    path = inside(Path(folder), "config.json")
    settings = read_json(path)
    if settings.get("format") != "minillm":
        return read_config(folder)[1]
    try:
        return ModelConfig(**settings["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
