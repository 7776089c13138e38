"""From stored tensors to a model: held against what is needed, converted one by one, each in its place."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minillm.base.errors import CheckpointError
from minillm.hub.weights import Weights, copied, drop_pages
from minillm.transformer import ModelConfig, Transformer, count_parameters
from minillm.zoo import Family, Row, bits_of, dequantize, pairs_to_halves, split_heads

IGNORED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|rope\.freqs)$")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MAX_LAYERS = 1024


class TensorPlan(NamedTuple):
    """One stored tensor: which of ours it becomes, and how."""

    row: Row
    name: str
    targets: dict[str, torch.Size]
    scale: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole: the rows of all targets."""
        first = next(iter(self.targets.values()))
        return sum(shape[0] for shape in self.targets.values()), *first[1:]


def plan_tensors(
    rows: Sequence[Row] | None, expected: Mapping[str, torch.Size], n_layers: int
) -> list[TensorPlan]:
    """Every tensor that is stored for a model of these tensors, layer by layer.

    Args:
        rows: a family's table of names; None for our own format, whose names are ours.
        expected: shapes of the model's own tensors, by name.
        n_layers: layers of the model.
    """
    if rows is None:
        return [TensorPlan(Row(name, (name,)), name, {name: shape}) for name, shape in expected.items()]
    plans = []
    for row in rows:
        for n in range(n_layers) if "{n}" in row.theirs else (0,):
            for suffix in ("weight", "bias"):
                ours = [f"{part.format(n=n)}.{suffix}" for part in row.ours]
                if all(name in expected for name in ours):
                    name = f"{row.theirs.format(n=n)}.{suffix}"
                    plans.append(TensorPlan(row, name, {name: expected[name] for name in ours}))
    return plans


def check_stored(
    plans: Sequence[TensorPlan], weights: Weights, transposed: bool, folder: Path
) -> list[TensorPlan]:
    """Hold what is stored against what is needed: every tensor there, none too many, all of the right shape.

    Returns:
        The plans; where a tensor has few bits, with the name of its scale.

    Raises:
        CheckpointError: naming the tensor, its file and what is wrong.
    """
    left = {name for name in weights.tensors if not IGNORED.search(name)}
    checked = []
    for plan in plans:
        if plan.name not in weights.tensors:
            raise CheckpointError(f"{folder}: tensor {plan.name!r} is missing")
        stored, where = weights.tensors[plan.name], f"{weights.files[plan.name]}: {plan.name!r}"
        base = plan.name.removesuffix(".weight")
        scales = [s for s in (f"{base}.weight_scale", f"{base}.scale") if s in weights.tensors]
        scale = scales[0] if scales and not stored.is_floating_point() else None
        if scale is not None:
            try:
                bits_of(stored, weights.tensors[scale], plan.shape, transposed=transposed)
            except ValueError as error:
                raise CheckpointError(f"{where}: {error}") from error
        elif not stored.is_floating_point():
            raise CheckpointError(f"{where} is {stored.dtype}, and has no weight_scale beside it")
        elif stored.dtype not in FLOATS:
            raise CheckpointError(f"{where} is {stored.dtype}, which is not supported")
        elif stored.shape != plan.shape:
            found = f"has shape {tuple(stored.shape)}"
            raise CheckpointError(f"{where} {found}, config.json says {plan.shape}")
        left -= {plan.name, scale}
        checked.append(plan._replace(scale=scale))
    if left:
        name = min(left)
        raise CheckpointError(f"{weights.files[name]}: unknown tensor {name!r}")
    return checked


def check_size(config: ModelConfig, weights: Weights, folder: Path) -> None:
    """Refuse a shape that the files cannot hold, before a byte is allocated for it.

    Raises:
        CheckpointError: too many layers, or more parameters than half-byte numbers would fit in the files.
    """
    n_bytes = sum(path.stat().st_size for path in set(weights.files.values()))
    wanted = count_parameters(config).total
    if config.n_layers > MAX_LAYERS or wanted > 2 * n_bytes:
        raise CheckpointError(
            f"{folder}: config.json describes {config.n_layers:,} layers and {wanted:,} parameters, "
            f"the files hold {n_bytes:,} bytes"
        )


def resolve_tied(config: ModelConfig, weights: Weights, family: Family, tied: bool | None) -> ModelConfig:
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


def convert(
    plan: TensorPlan, weights: Weights, config: ModelConfig, dtype: torch.dtype | None, transposed: bool
) -> dict[str, Tensor]:
    """Our tensors of one plan: views of the file where nothing has to change, else copies."""
    stored = weights.tensors[plan.name]
    dtype = stored.dtype if dtype is None else dtype
    if plan.scale is not None:
        scale = weights.tensors[plan.scale].to(torch.promote_types(dtype, torch.float32))
        whole = dequantize(stored, scale, plan.shape, transposed=transposed).to(dtype)
        drop_pages(stored)
    elif stored.dtype == dtype and stored.is_contiguous():
        whole = stored
    else:
        whole = copied(stored, dtype)
    if plan.row.by_head:
        parts = split_heads(whole, len(plan.targets), config.n_heads)
    elif plan.row.rotary:
        heads = config.n_heads if "wq" in plan.row.ours[0] else config.n_kv_heads
        parts = [pairs_to_halves(whole, heads)]
    else:
        return dict(zip(plan.targets, whole.split([shape[0] for shape in plan.targets.values()])))
    if whole is stored:
        drop_pages(stored)
    return dict(zip(plan.targets, parts))


class _NoStart(TorchFunctionMode):
    """While it is active, `torch.nn.init` does nothing.

    Weights that will be replaced need no random start; and the first random number on the meta device makes torch import sympy:
    140 MB and a second or two.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def build(
    config: ModelConfig,
    weights: Weights,
    family: Family | None,
    *,
    folder: Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Transformer:
    """A model of this shape with these weights, each tensor made when the one before is done.

    Args:
        config: the shape.
        weights: what the folder holds.
        family: whose names and layouts; None for our own format.
        folder: for messages.
        dtype: of all weights; None leaves each as it is stored.
        device: where they go.

    Raises:
        CheckpointError: tensors and shape do not fit each other.
    """
    check_size(config, weights, folder)
    with torch.device("meta"), _NoStart():
        model = Transformer(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tied:
        del expected["head.weight"]
    rows, transposed = (None, False) if family is None else (family.rows, family.transposed_int8)
    state: dict[str, Tensor] = {}
    for plan in check_stored(plan_tensors(rows, expected, config.n_layers), weights, transposed, folder):
        made = convert(plan, weights, config, dtype, transposed)
        state |= {name: tensor.to(device) for name, tensor in made.items()}
    if config.tied:
        state["head.weight"] = state["embed.weight"]
    model.load_state_dict(state, assign=True)
    if config.tied:
        model.head.weight = model.embed.weight
    return model.to(device)
