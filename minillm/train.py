import contextlib
import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from minillm.batches import IGNORE, Batch, Loader
from minillm.checkpoint import (
    CheckpointError,
    MiniLLMError,
    atomic_write,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from minillm.transformer import Transformer

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained. Sizes have no default.

    Args:
        steps: optimizer steps.
        batch_size: rows of one optimizer step, over all processes and micro-batches together.
        seq_len: tokens in a row, at most.
        accumulation: micro-batches that a step is computed in; changes memory, not the result.
        max_lr: learning rate after the warm-up.
        min_lr_ratio: the last learning rate, as a share of max_lr.
        warmup_steps: steps in which the learning rate rises from 0.
        decay: "cosine" from the warm-up to the end, or "linear": constant, then straight down in the last part.
        decay_fraction: that last part, as a share of steps.
        clip_norm: gradients are scaled down to this global norm; 0 means never.
        dtype: of the matrix products; parameters and optimizer state stay float32.
        compile: "auto" compiles runs that are long enough to earn the compilation back.
        seed: of everything random in training.
        log_every, eval_every, save_every: steps between; 0 means never (the end is always evaluated and saved).
        keep: checkpoints kept.
    """

    steps: int
    batch_size: int
    seq_len: int
    accumulation: int = 1
    max_lr: float = 1e-3
    min_lr_ratio: float = 0.1
    warmup_steps: int = 50
    decay: Literal["cosine", "linear"] = "cosine"
    decay_fraction: float = 0.3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip_norm: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: Literal["auto", "on", "off"] = "auto"
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 500
    keep: int = 2

    def __post_init__(self):
        for name in ("steps", "batch_size", "seq_len", "accumulation", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in (
            "max_lr",
            "min_lr_ratio",
            "warmup_steps",
            "weight_decay",
            "clip_norm",
            "log_every",
            "eval_every",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size must be a multiple of accumulation, got {self.batch_size} and {self.accumulation}"
            )
        for name, allowed in (
            ("decay", ("cosine", "linear")),
            ("dtype", ("float32", "bfloat16")),
            ("compile", ("auto", "on", "off")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")


class TrainingDiverged(MiniLLMError):
    """The loss or the gradient is no longer a number."""


class Interrupted(Exception):
    """Training was asked to stop (Ctrl-C, SIGTERM); it finished its step and saved. `train` again resumes."""

    def __init__(self, step: int, checkpoint: Path | None, signal_name: str):
        self.step, self.checkpoint, self.signal_name = step, checkpoint, signal_name
        where = (
            f"saved to {checkpoint}; the same command resumes"
            if checkpoint
            else "nothing saved: no run_dir was given"
        )
        super().__init__(f"{signal_name} after step {step}: {where}")


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run says of itself. `metrics` are the lines of metrics.jsonl."""

    steps: int
    tokens: int
    loss_nats: float
    seconds: float
    metrics: list[dict[str, Any]]


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of step 1, 2, … steps: linear warm-up, then cosine or constant-and-linear decay.

    Source: cosine, arXiv:1608.03983; constant then linear, arXiv:2404.06395 (WSD) and arXiv:2405.18392.
    """
    if step <= config.warmup_steps:
        return config.max_lr * step / config.warmup_steps
    low = config.max_lr * config.min_lr_ratio
    if config.decay == "cosine":
        done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        return low + (config.max_lr - low) * (1 + math.cos(math.pi * min(1.0, done))) / 2
    start = max(config.warmup_steps, config.steps * (1 - config.decay_fraction))
    done = min(1.0, max(0.0, (step - start) / max(1, config.steps - start)))
    return config.max_lr + (low - config.max_lr) * done


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for the matrices of linear maps; none for norms, biases and embeddings.

    A norm's scale belongs at 1, not 0; a bias has nothing to overfit with; an embedding row that is not in the batch has no
    gradient, and decay would shrink the rare tokens most.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed, plain = [], []
    for parameter in model.parameters():
        (decayed if parameter.dim() > 1 and id(parameter) not in embeddings else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay, all tensors of a group at once.

    Source: arXiv:1412.6980 algorithm 1; decoupled decay: arXiv:1711.05101 algorithm 2. Chapter 13.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ):
        if lr < 0 or eps <= 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"need lr >= 0, eps > 0, weight_decay >= 0, betas in [0, 1), got {lr}, {eps}, {weight_decay}, {betas}"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {
                        "step": 0,
                        "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p),
                    }
                self.state[p]["step"] += 1
            grads: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]
            means = [self.state[p]["exp_avg"] for p in params]
            squares = [self.state[p]["exp_avg_sq"] for p in params]
            (beta1, beta2), lr, t = group["betas"], group["lr"], self.state[params[0]]["step"]
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_lerp_(means, grads, 1 - beta1)
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
            scale = torch._foreach_sqrt(squares)
            torch._foreach_div_(scale, math.sqrt(1 - beta2**t))
            torch._foreach_add_(scale, group["eps"])
            torch._foreach_addcdiv_(params, means, scale, -lr / (1 - beta1**t))


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Float[Tensor, ""]:
    """Scale all gradients by one factor so that their joint norm is at most `max_norm`; 0 only measures.

    Returns:
        The norm before clipping.

    Source: arXiv:1211.5063.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    if max_norm > 0:
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients chunk by chunk, so that the (rows, V) logits of only one chunk exist."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, dtype: torch.dtype, rows: int
    ):
        wide = torch.promote_types(dtype, torch.float32)
        w = weight.to(dtype)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, len(hidden), rows):
            x, y = hidden[start : start + rows].to(dtype), targets[start : start + rows, None]
            scores = F.log_softmax(F.linear(x, w), dim=-1, dtype=wide)
            kept = y != IGNORE
            y = y.clamp(min=0)
            loss -= scores.gather(1, y).where(kept, 0).sum()
            if not (need_hidden or need_weight):
                continue
            error = scores.exp_()  # softmax - one-hot: the gradient by the logits
            error.scatter_add_(1, y, torch.full_like(y, -1, dtype=wide))
            error = (error * kept).to(dtype) if not kept.all() else error.to(dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + rows] = error @ w
            if grad_weight is not None:
                grad_weight += error.T @ x
        ctx.save_for_backward(
            None if grad_hidden is None else grad_hidden.mul_(scale),
            None if grad_weight is None else grad_weight.mul_(scale).to(weight.dtype),
        )
        return loss * scale

    @staticmethod
    def backward(ctx: Any, *outer: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * outer[0],
            None if grad_weight is None else grad_weight * outer[0],
            None,
            None,
            None,
            None,
        )


def linear_cross_entropy(
    hidden: Float[Tensor, "... D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "..."],
    *,
    n_targets: int | None = None,
    chunk_rows: int | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy of softmax(hidden weightᵀ) without ever holding the (B, T, V) logits.

    The gradient is computed in the forward pass, chunk by chunk. Under autocast the products run in its dtype.

    Args:
        hidden: final hidden states.
        weight: the head's weight.
        targets: token ids; -100 where there is nothing to predict: those rows cost nothing.
        n_targets: divisor of the sum; by default the number of targets here. With accumulation or several processes, the
            number in the whole batch.
        chunk_rows: rows of logits that exist at a time.

    Returns:
        The mean loss in nats.

    Source: arXiv:2411.09009 (cut cross-entropy), arXiv:2410.10989 (Liger kernels).
    """
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    if kind == "cpu":  # elsewhere the wait for the number of rows costs more than the rows
        kept = (targets != IGNORE).nonzero()[:, 0]
        if len(kept) < len(targets):
            hidden, targets = hidden[kept], targets[kept]
    if n_targets is None:
        n_targets = int((targets != IGNORE).sum())
    if n_targets < 1:
        raise ValueError("every target is -100: there is nothing to predict")
    if chunk_rows is None:
        chunk_rows = 256 if kind == "cpu" else max(256, (1 << 27) // weight.shape[0])
    return _LinearCrossEntropy.apply(hidden, weight, targets, 1.0 / n_targets, dtype, chunk_rows)


def head_weight(model: Transformer) -> Float[Tensor, "V D"]:
    """The matrix that turns hidden states into logits."""
    return F.normalize(model.head.weight, dim=-1) if model.config.norm_head else model.head.weight


def batch_loss(
    model: Transformer,
    batch: Batch,
    *,
    n_targets: int | None = None,
    hidden_fn: Callable[..., Tensor] | None = None,
) -> Float[Tensor, ""]:
    """The mean loss of a batch in nats per target.

    Args:
        n_targets: divisor; see `linear_cross_entropy`.
        hidden_fn: `model.hidden`, or its compiled version.
    """
    hidden = (hidden_fn or model.hidden)(batch.tokens, positions=batch.positions, mask=batch.mask())
    return linear_cross_entropy(
        hidden,
        head_weight(model),
        batch.targets,
        n_targets=batch.n_targets if n_targets is None else n_targets,
    )


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager:
    """Matrix products in bfloat16 with float32 parameters, or nothing for float32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


@torch.no_grad()
def evaluate_loss(
    model: Transformer, batches: Iterable[Batch], *, max_batches: int | None = None, dtype: str = "float32"
) -> float:
    """The mean loss over all targets of `batches`, in nats per token.

    Args:
        batches: finite, as `loader.epoch_batches()`, or give `max_batches`.
    """
    device, was_training = model.embed.weight.device, model.training
    model.eval()
    total, count = 0.0, 0
    for number, batch in enumerate(batches):
        if max_batches is not None and number >= max_batches:
            break
        if batch.n_targets:
            with autocast(device, dtype):
                total += batch_loss(model, batch.to(device)).item() * batch.n_targets
            count += batch.n_targets
    model.train(was_training)
    if not count:
        raise ValueError("no target in the batches: there is nothing to evaluate")
    return total / count


def bits_per_byte(loss_nats: float, n_tokens: int, n_bytes: int) -> float:
    """Loss per byte of text, which models with different tokenizers can be compared by."""
    return loss_nats * n_tokens / (math.log(2) * n_bytes)


# Dense bfloat16 FLOP/s without sparsity, from NVIDIA's data sheets: H100/H200 SXM 989.4e12, A100 312e12, L40S 362e12,
# L4 121e12, RTX 4090 165.2e12 (float32 accumulation).
PEAK_FLOPS = {
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
}


@lru_cache(maxsize=8)
def peak_flops(dtype: str = "float32", device: str = "cpu") -> float:
    """FLOP/s that matrix products can reach: from the data sheet for a known GPU in bfloat16, otherwise measured.

    Measured: the best of some products of 1024 × 1024 matrices with the current number of threads.
    """
    if device.startswith("cuda") and dtype == "bfloat16":
        name = torch.cuda.get_device_name(device)
        for key, value in PEAK_FLOPS.items():
            if key in name:
                return value
    n = 1024 if device == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    best = math.inf
    for _ in range(12):
        start = time.perf_counter()
        a @ a
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def flops_per_token(model: Transformer, seq_len: int) -> float:
    """Floating-point operations of training on one token: forward, and twice that for backward.

    2 per weight of a matrix, and attention's two products over (seq_len + 1) / 2 keys on average.
    """
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    matrices -= 0 if model.config.tied else model.embed.weight.numel()
    attention = 2 * model.config.n_layers * model.config.dim * (seq_len + 1)
    return 3 * (2 * matrices + attention)


def model_flops_utilization(tokens_per_s: float, flops_per_token: float, peak: float) -> float:
    """The share of the machine's matrix rate that training uses for the model itself.

    Source: arXiv:2204.02311, appendix B.
    """
    return tokens_per_s * flops_per_token / peak


class Engine:
    """Who owns parameters, gradients and optimizer state: here one process. Chapter 15 has others with these methods."""

    rank = 0
    world_size = 1

    def __init__(self, model: Transformer, config: TrainConfig):
        self.model, self.config = model, config
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, config.weight_decay),
            lr=config.max_lr,
            betas=config.betas,
            eps=config.eps,
            fused=model.embed.weight.device.type in ("cpu", "cuda", "mps"),
        )

    def total(self, value: float) -> float:
        """The sum of a number over all processes."""
        return value

    def backward(self, loss: Float[Tensor, ""]) -> None:
        """Add this loss's gradients."""
        loss.backward()

    def step(self, lr: float) -> float:
        """Clip, update, clear the gradients. Returns the norm before clipping; if it is not finite nothing is updated."""
        norm = clip_gradients(self.model.parameters(), self.config.clip_norm).item()
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything to save, by parameter name: groups "model" and "optimizer"."""
        named = dict(self.model.named_parameters())
        state = self.optimizer.state
        kept = {f"{n}.{key}": state[p][key] for n, p in named.items() if p in state for key in state[p]}
        return {"model": {name: p.detach() for name, p in named.items()}, "optimizer": kept}

    @torch.no_grad()
    def load_tensors(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take back what `tensors` gave.

        Raises:
            CheckpointError: names or shapes differ.
        """
        named = dict(self.model.named_parameters())
        load_parameters(self.model, groups["model"])
        for name, p in named.items():
            keys = ("step", "exp_avg", "exp_avg_sq")
            if f"{name}.exp_avg" in groups["optimizer"]:
                self.optimizer.state[p] = {key: groups["optimizer"][f"{name}.{key}"].clone() for key in keys}


@torch.no_grad()
def load_parameters(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into a model's parameters by name; both must have the same names and shapes.

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
        p.copy_(tensors[name])


def should_compile(model: Transformer, config: TrainConfig) -> bool:
    """Whether compiling pays: "auto" compiles runs that would take over 30 minutes on a CPU, 3 on a GPU."""
    device = model.embed.weight.device
    if config.compile != "auto":
        return config.compile == "on"
    if device.type not in ("cpu", "cuda"):
        return False
    tokens = config.steps * config.batch_size * config.seq_len
    seconds = tokens * flops_per_token(model, config.seq_len) / (0.5 * peak_flops(config.dtype, str(device)))
    return seconds > (1800 if device.type == "cpu" else 180)


@contextlib.contextmanager
def catch_signals() -> Iterator[list[str]]:
    """Collect SIGINT and SIGTERM in a list instead of dying; a second one acts as if nobody caught it."""
    caught: list[str] = []
    old: dict[int, Any] = {}

    def handle(number: int, frame: Any) -> None:
        caught.append(signal.Signals(number).name)
        for each, handler in old.items():
            signal.signal(each, handler)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread: Python delivers signals only there
        log.debug("signals are not caught outside the main thread")
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@dataclass
class MetricsFile:
    """Lines of JSON, one per logged step, appended and flushed at once; kept in memory too."""

    path: Path | None
    lines: list[dict[str, Any]] = field(default_factory=list)

    def truncate(self, step: int) -> None:
        """Keep the lines up to `step`; a run that resumes there writes the rest again."""
        self.lines = []
        if self.path is None or not self.path.exists():
            return
        for text in self.path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # the last line of a killed run may be half a line
                line = json.loads(text)
                if line["step"] <= step:
                    self.lines.append(line)
        with atomic_write(self.path) as file:
            file.writelines(json.dumps(line) + "\n" for line in self.lines)

    def write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


class _Run:
    """The state of one call of `train`: counters, files, and what a step does."""

    def __init__(
        self, model: Transformer, loader: Loader, config: TrainConfig, run_dir: Path | None, engine: Engine
    ):
        self.model, self.loader, self.config, self.engine = model, loader, config, engine
        self.device = model.embed.weight.device
        self.checkpoints = None if run_dir is None else run_dir / "checkpoints"
        self.metrics = MetricsFile(None if run_dir is None or engine.rank else run_dir / "metrics.jsonl")
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.interval = {"loss": 0.0, "targets": 0, "seconds": 0.0}
        self.compiled = should_compile(model, config)
        self.saved_at = -1

    def prepare(self) -> None:
        """Seed, or resume from the newest undamaged checkpoint."""
        torch.manual_seed(self.config.seed)
        path = None if self.checkpoints is None else latest_checkpoint(self.checkpoints)
        if path is None:
            self.metrics.truncate(-1)
        else:
            self.restore(path)
        self.hidden = torch.compile(self.model.hidden) if self.compiled else self.model.hidden
        self.flops = flops_per_token(self.model, self.config.seq_len)
        self.peak = peak_flops(self.config.dtype, str(self.device)) * self.engine.world_size

    def restore(self, path: Path) -> None:
        """Continue as if the process had never stopped."""
        groups, state = load_checkpoint(path, self.device)
        check_same_run(state["config"], asdict(self.config), path)
        self.engine.load_tensors(groups)
        self.loader.load_state_dict(state["loader"])
        torch.set_rng_state(groups["random"]["cpu"].cpu())
        if "cuda" in groups["random"]:
            torch.cuda.set_rng_state(groups["random"]["cuda"].cpu(), self.device)
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.interval, self.compiled = state["interval"], state["compiled"]
        self.saved_at = self.step
        self.metrics.truncate(self.step)
        log.info("resumed from %s", path)

    def save(self) -> Path | None:
        """Write a checkpoint of this moment, once."""
        if self.checkpoints is None:
            return None
        path = self.checkpoints / f"step-{self.step:08d}"
        if self.saved_at == self.step:
            return path
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        state = {
            "config": asdict(self.config),
            "loader": self.loader.state_dict(),
            **{name: getattr(self, name) for name in ("step", "tokens", "seconds", "interval", "compiled")},
        }
        tensors = {**self.engine.tensors(), "random": random}
        if self.engine.rank == 0:
            save_checkpoint(self.checkpoints, self.step, tensors=tensors, state=state, keep=self.config.keep)
        self.saved_at = self.step
        return path

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; returns its loss, learning rate and gradient norm."""
        start = time.perf_counter()
        batch = next(self.loader)
        n_targets = int(self.engine.total(batch.n_targets))
        loss = torch.zeros((), device=self.device)
        for part in batch.split(self.config.accumulation):
            if part.n_targets:
                with autocast(self.device, self.config.dtype):
                    part_loss = batch_loss(
                        self.model, part.to(self.device), n_targets=n_targets, hidden_fn=self.hidden
                    )
                self.engine.backward(part_loss)
                loss += part_loss.detach()
        loss_nats = self.engine.total(loss.item())
        lr = learning_rate(self.step + 1, self.config)
        norm = self.engine.step(lr) if math.isfinite(loss_nats) else math.nan
        if not math.isfinite(loss_nats) or not math.isfinite(norm):
            raise TrainingDiverged(
                f"step {self.step + 1}: loss {loss_nats}, gradient norm {norm}; the parameters are those of step {self.step}. "
                f"Lower max_lr ({self.config.max_lr}), lengthen warmup_steps, or look at this batch"
            )
        self.step, self.tokens = self.step + 1, self.tokens + n_targets
        elapsed = time.perf_counter() - start
        self.seconds += elapsed
        for key, value in (("loss", loss_nats * n_targets), ("targets", n_targets), ("seconds", elapsed)):
            self.interval[key] += value
        return {"step": self.step, "tokens": self.tokens, "loss_nats": loss_nats, "lr": lr, "grad_norm": norm}

    def line(self, info: dict[str, Any]) -> dict[str, Any]:
        """A line of metrics: the mean loss and speed since the last one."""
        speed = self.interval["targets"] / max(self.interval["seconds"], 1e-9)
        line = {
            **info,
            "loss_nats": self.interval["loss"] / self.interval["targets"],
            "tokens_per_s": round(speed, 1),
            "mfu": round(model_flops_utilization(speed, self.flops, self.peak), 4),
        }
        self.interval = {"loss": 0.0, "targets": 0, "seconds": 0.0}
        return line


def check_same_run(saved: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> None:
    """Refuse to continue a run with settings that would have made another run.

    Raises:
        ValueError: the first setting that differs.
    """
    free = {"log_every", "eval_every", "save_every", "keep", "accumulation", "compile"}
    for name, value in json.loads(json.dumps(dict(config))).items():
        if name not in free and saved.get(name) != value:
            raise ValueError(
                f"{path} was trained with {name}={saved.get(name)}, now {name}={value}; use another run_dir"
            )


def train(
    model: Transformer,
    loader: Loader,
    config: TrainConfig,
    *,
    run_dir: str | Path | None = None,
    eval_fn: Callable[[Transformer], Mapping[str, float]] | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = True,
    engine: Engine | None = None,
) -> TrainResult:
    """Train to `config.steps`, from the newest undamaged checkpoint in `run_dir` if there is one.

    Args:
        model: trained in place, on its device.
        loader: with the batch size and row length of `config`.
        run_dir: receives `metrics.jsonl` and `checkpoints/`; None keeps nothing.
        eval_fn: called every `eval_every` steps and at the end; its numbers join that step's line of metrics.
        on_step: called after every step with step, tokens, loss_nats, lr, grad_norm.
        progress: show a bar.
        engine: who owns gradients and optimizer; by default this process.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the step was finished and saved.
        TrainingDiverged: the loss is not finite; nothing was saved since.
        ValueError: loader and config disagree, or the checkpoint belongs to another run.
    """
    if (loader.batch_size, loader.seq_len) != (config.batch_size, config.seq_len):
        raise ValueError(
            f"the loader has batch_size {loader.batch_size} and seq_len {loader.seq_len}, "
            f"the config {config.batch_size} and {config.seq_len}"
        )
    folder = None if run_dir is None else Path(run_dir)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    run = _Run(model, loader, config, folder, engine or Engine(model, config))
    run.prepare()
    model.train()
    bar = tqdm(
        total=config.steps, initial=run.step, disable=not progress, unit="step", desc="train", leave=False
    )
    with catch_signals() as caught, bar:
        while run.step < config.steps:
            info = run.train_step()
            last = run.step == config.steps
            evaluate = eval_fn is not None and (last or due(run.step, config.eval_every))
            if last or evaluate or due(run.step, config.log_every):
                line = run.line(info)
                if evaluate and eval_fn is not None:
                    with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []):
                        line |= eval_fn(model)
                    model.train()
                run.metrics.write(line)
                bar.set_postfix(loss=f"{line['loss_nats']:.3f}", tok_s=f"{line['tokens_per_s']:.0f}")
            bar.update()
            if on_step is not None:
                on_step(info)
            if last or due(run.step, config.save_every):
                run.save()
            if caught and not last:
                raise Interrupted(run.step, run.save(), caught[0])
    loss = run.metrics.lines[-1]["loss_nats"] if run.metrics.lines else math.nan
    return TrainResult(
        steps=run.step, tokens=run.tokens, loss_nats=loss, seconds=run.seconds, metrics=run.metrics.lines
    )


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
