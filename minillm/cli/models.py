"""`minillm convert` and `minillm info`: published models, their sizes, plans for many GPUs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from minillm.cli.parsing import parse

if TYPE_CHECKING:
    from minillm.transformer import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertArgs:
    """A published model (LLaMA, ChatGLM, Baichuan; Meta's files) into our format, or one of ours into its family's."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """The model's folder, or a run's."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """A new folder."""
    dtype: Literal["as stored", "float32", "bfloat16", "float16"] = "as stored"
    """Of the weights."""


def _convert(argv: Sequence[str]) -> int:
    args = parse(ConvertArgs, prog="minillm convert", args=list(argv))
    import torch

    from minillm.hub import ModelFolder
    from minillm.transformer import count_parameters

    dtype = None if args.dtype == "as stored" else getattr(torch, args.dtype)
    out = ModelFolder.open(args.folder).convert(args.out, dtype=dtype)
    print(f"{out.path}: {count_parameters(out.config).total:,} parameters")
    return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfoArgs:
    """Parameters, memory and FLOPs of a recipe, of a trained run, or of a published model."""

    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]")] = None
    """A recipe (tiny, small, m125, m350, b1, b7), a model of the zoo (llama2-70b, …), or the folder of a run or a model."""
    plan: bool = False
    """What a training step needs on each GPU, by number of GPUs and ZeRO stage; without a name for LLaMA-2's 7B, 13B and 70B."""
    gpus: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    """How many GPUs the plan looks at."""
    gpu_gb: float = 80.0
    """The memory of one GPU, in GB."""
    seq_len: int | None = None
    """Tokens of context; by default the model's."""
    batch_size: int = 1
    """Rows, for the cache and the activations."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionArgs:
    """Which attention backend a model would take here, for each kind of mask, and why (chapter 12)."""

    attention: bool = True
    """What this page is about."""
    device: str = "auto"
    """auto, cpu, cuda or mps; need not be on this machine."""
    seq_len: int = 2048
    """Tokens T, as many keys."""
    batch_size: int = 8
    """Rows B."""
    n_heads: int = 32
    """Query heads H."""
    head_dim: int = 128
    """Head width Dh."""


def _info_attention(argv: Sequence[str]) -> int:
    args = parse(AttentionArgs, prog="minillm info", args=list(argv))
    import torch

    from minillm.attention import Mask
    from minillm.base.machine import pick_device
    from minillm.flash import INSTALLED, choose_backend

    kind = pick_device("auto").type if args.device == "auto" else args.device
    if kind not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device must be auto, cpu, cuda or mps, got {args.device!r}")
    B, T = args.batch_size, args.seq_len
    if min(B, T, args.n_heads, args.head_dim) < 1:
        raise ValueError("seq_len, batch_size, n_heads and head_dim must be at least 1")
    ids, real = torch.zeros(B, T, dtype=torch.long), torch.ones(B, T, dtype=torch.bool)
    cases: dict[str, tuple[Mask, int, bool, bool]] = {  # mask, queries, ALiBi, gradients
        "causal": (Mask(), T, False, True),
        "prefix": (Mask(prefix=torch.ones(B, dtype=torch.long)), T, False, True),
        "documents": (Mask(documents=ids), T, False, True),
        "padding": (Mask(keys=real), T, False, True),
        "ALiBi, training": (Mask(), T, True, True),
        "ALiBi, reading": (Mask(), T, True, False),
        "one new token": (Mask(), 1, False, False),
    }
    here = " and ".join(
        f"{name.replace('_', '-')} {'is' if there else 'is not'} installed"
        for name, there in INSTALLED.items()
    )
    print(f"attention on {kind}, {B} x {T:,} tokens, {args.n_heads} heads of {args.head_dim}; {here}")
    modern = True
    if kind == "cuda" and torch.cuda.is_available():
        modern = torch.cuda.get_device_properties(0).major >= 8
    for dtype in (
        (torch.bfloat16, torch.float16, torch.float32) if kind == "cuda" else (torch.float32, torch.bfloat16)
    ):
        print(str(dtype).removeprefix("torch."))
        for name, (mask, queries, alibi, gradients) in cases.items():
            shape = (B, args.n_heads, queries, args.head_dim)
            choice = choose_backend(
                kind, dtype, mask, shape=shape, n_keys=T, alibi=alibi, gradients=gradients, modern=modern
            )
            print(f"  {name:16} {choice.backend:10} {choice.why}")
    return 0


def _model_config(name: str) -> ModelConfig:
    from minillm.hub import ModelFolder
    from minillm.runs.recipes import RECIPES, recipe
    from minillm.zoo import MODELS

    if name in RECIPES:
        return recipe(name).model
    if name in MODELS:
        return MODELS[name]
    if ModelFolder.settings_file(name) is None:
        raise ValueError(
            f"{name!r} is neither a recipe ({', '.join(RECIPES)}), nor a published model "
            f"({', '.join(MODELS)}), nor the folder of a run or model"
        )
    return ModelFolder.open(name).config


def _plan(args: InfoArgs, models: dict[str, ModelConfig]) -> int:
    """Tables of what fits where, and what they count."""
    from minillm.transformer import count_parameters
    from minillm.zero import step_bytes

    if not args.gpus or min(args.gpus) < 1 or not args.gpu_gb > 0:
        raise ValueError(f"gpus and gpu_gb must be at least 1 and above 0, got {args.gpus} and {args.gpu_gb}")
    for name, model in models.items():
        seq_len, total = args.seq_len or model.max_seq_len, count_parameters(model).total
        print(f"{name}: {total:,} parameters, {args.batch_size} x {seq_len:,} tokens on each GPU, bfloat16")
        print(f"GB on each GPU; * fits into {args.gpu_gb:g}")
        print(f"{'GPUs':>6}", *(f"{f'stage {stage}':>10} " for stage in range(4)))
        options = {"rows": args.batch_size, "seq_len": seq_len}
        activations = step_bytes(model, stage=0, world_size=1, **options)["activations"]
        for n in args.gpus:
            needs = []
            for stage in range(4):
                parts = step_bytes(model, stage=stage, world_size=n, **options)
                needs.append(sum(parts.values()) / 1e9)
            print(f"{n:6}", *(f"{need:10.1f}{'*' if need <= args.gpu_gb else ' '}" for need in needs))
        whole = 4 * total / 1e9
        print(
            f"of which activations {activations / 1e9:.1f}; at the start each has the whole model in float32, ",
            end="",
        )
        print(f"{whole:.1f}{'' if whole <= args.gpu_gb else ': too much'}\n")
    print("Without what the loss, the libraries and fragmentation take: leave a tenth free.")
    return 0


def _size(n_bytes: int | float) -> str:
    """Bytes in GiB, or in MiB where they are fewer than one."""
    return f"{n_bytes / 2**30:.3f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.2f} MiB"


def _info(argv: Sequence[str]) -> int:
    if "--attention" in argv:
        return _info_attention(argv)
    args = parse(InfoArgs, prog="minillm info", args=list(argv))
    from minillm.transformer import count_parameters, flops_per_token, kv_cache_bytes
    from minillm.zero import state_bytes

    if args.batch_size < 1 or (args.seq_len is not None and args.seq_len < 1):
        raise ValueError(
            f"seq_len and batch_size must be at least 1, got {args.seq_len} and {args.batch_size}"
        )
    if args.plan:
        names = [args.name] if args.name else ["llama2-7b", "llama2-13b", "llama2-70b"]
        return _plan(args, {name: _model_config(name) for name in names})
    if args.name is None:
        raise ValueError(
            "info needs a name: of a recipe, a published model such as llama2-7b, or the folder of a run or model"
        )
    model = _model_config(args.name)
    seq_len = args.seq_len or model.max_seq_len
    count = count_parameters(model)
    print(f"{args.name}: {count.total:,} parameters")
    for field in dataclasses.fields(count):
        print(f"  {field.name.replace('_', ' '):12} {getattr(count, field.name):>18,}")
    print("shape")
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        if field.default is dataclasses.MISSING or value != field.default:
            print(f"  {field.name:12} {value!s:>18}")
    print("memory")
    for bits in (32, 16, 8, 4):
        print(f"  weights, {bits:2} bit {_size(count.total * bits / 8):>20}")
    states = state_bytes(count.total, stage=0, world_size=1).total
    each = f"{states / count.total:g} bytes a parameter"
    print(f"  training in mixed precision, {each}: {_size(states)}, and activations")
    cache = kv_cache_bytes(model, batch_size=args.batch_size, n_tokens=seq_len)
    print(f"  KV cache, 16 bit, {args.batch_size} x {seq_len:,} tokens: {_size(cache)}")
    print("compute")
    forward = flops_per_token(model, seq_len)
    print(f"  forward  {forward / 1e9:12.4f} GFLOP a token at {seq_len:,} tokens")
    print(f"  training {3 * forward / 1e9:12.4f} GFLOP a token")
    return 0
