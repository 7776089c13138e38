import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from references import adamw_reference
from tolerances import assert_close, assert_low_precision
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from minillm import train as training
from minillm.base.errors import CheckpointError, Interrupted, TrainingDiverged
from minillm.batches import IGNORE, Loader, make_batch
from minillm.check import check, laws
from minillm.runs import keeper
from minillm.runs.keeper import RunKeeper, should_compile
from minillm.runs.recipes import recipe
from minillm.runs.signals import catch_signals
from minillm.storage.checkpoints import latest_checkpoint, load_checkpoint, load_parameters
from minillm.storage.shards import TokenShards, write_shards
from minillm.train import (
    Engine,
    TrainConfig,
    batch_loss,
    bits_per_byte,
    clip_gradients,
    evaluate_loss,
    learning_rate,
    linear_cross_entropy,
    parameter_groups,
    train,
)
from minillm.transformer import ModelConfig, Transformer

VOCAB = 64
SHAPE = ModelConfig(
    vocab_size=VOCAB, dim=16, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=32, max_seq_len=32
)
CONFIG = TrainConfig(
    steps=12, batch_size=4, seq_len=32, max_lr=1e-2, warmup_steps=3, log_every=1, save_every=4
)


def write_data(folder, n=80, seed=0):
    """Documents that count upwards from a random start: a pattern to learn."""
    dice = random.Random(seed)
    documents = []
    for _ in range(n):
        start, step = dice.randrange(1, VOCAB), dice.choice((1, 2))
        documents.append([1 + (start + step * i) % (VOCAB - 1) for i in range(dice.randint(3, 30))])
    write_shards(documents, folder, vocab_size=VOCAB, eos_id=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "tokens"
    write_data(folder)
    return TokenShards(folder)


def make(data, config=CONFIG, **shape):
    torch.manual_seed(0)
    model = Transformer(replace(SHAPE, **shape))
    return model, Loader(data, batch_size=config.batch_size, seq_len=config.seq_len, seed=config.seed)


def quiet(model, loader, config=CONFIG, *, run_dir=None, eval_fn=None, on_step=None, **options):
    kept = RunKeeper(run_dir, eval_fn=eval_fn, on_step=on_step, progress=False)
    return train(model, loader, config, keeper=kept, **options)


def adamw(theta, grad, m, v, t, lr, betas, eps, weight_decay):
    """One step for one tensor, as the exercise asks for it."""
    m, v = betas[0] * m + (1 - betas[0]) * grad, betas[1] * v + (1 - betas[1]) * grad**2
    m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    return theta * (1 - lr * weight_decay) - lr * m_hat / (v_hat.sqrt() + eps), m, v


def cross_entropy_grad(logits, targets):
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(linear_cross_entropy(logits, torch.eye(logits.shape[1]), targets), logits)[0]


def cosine(step, steps, warmup_steps, max_lr, min_lr):
    settings = {"warmup_steps": warmup_steps, "max_lr": max_lr, "min_lr_ratio": min_lr / max_lr}
    return learning_rate(step, TrainConfig(steps=steps, batch_size=1, seq_len=1, **settings))


SOLUTIONS = {
    "train.adamw": adamw,
    "train.accumulate": lambda losses, n: sum(x * k for x, k in zip(losses, n)) / sum(n),
    "train.cross_entropy_grad": cross_entropy_grad,
    "train.cosine": cosine,
}


@pytest.mark.parametrize(
    ("exercise", "law"), [(name, law) for name in SOLUTIONS for law in laws(name)], ids=str
)
def test_the_package_obeys_its_laws(exercise, law):
    law(SOLUTIONS[exercise])


@pytest.mark.parametrize(
    ("exercise", "wrong", "law"),
    [
        ("train.adamw", lambda th, g, m, v, t, *rest: adamw(th, g, m, v, 10**6, *rest), "the first step moves every weight by the learning rate"),
        ("train.adamw", lambda th, g, m, v, t, lr, b, e, wd: adamw(th, g + wd * th, m, v, t, lr, b, e, 0.0), "weight decay is decoupled"),
        ("train.accumulate", lambda losses, n: sum(losses) / len(losses), "a part counts by its targets"),
        ("train.cross_entropy_grad", lambda z, y: (z.softmax(-1) - F.one_hot(y.clamp(0), z.shape[1])) / len(y), "rows without a target have no gradient"),
        ("train.cosine", lambda s, n, w, hi, lo: hi * s / w if s <= w else hi + (lo - hi) * (s - w) / (n - w), "falls slowly, fast, slowly"),
    ],
)  # fmt: skip
def test_check_names_the_broken_law(exercise, wrong, law):
    report = check(exercise, wrong, quiet=True)
    assert next(rule.name for rule, reason in report.reasons.items() if reason is not None) == law


# ---------------------------------------------------------------- the optimizer


def test_the_optimizer_that_trains_equals_the_slow_reference():
    torch.manual_seed(1)
    start = [torch.randn(shape, dtype=torch.float64) for shape in ((3, 4), (5,), (2, 2, 2))]
    grads = [[torch.randn_like(p) for p in start] for _ in range(12)]
    layers = torch.nn.ParameterList([p.clone() for p in start])
    engine = Engine(layers, replace(CONFIG, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2, clip_norm=0.0))
    for step in grads:
        for p, grad in zip(layers, step):
            p.grad = grad.clone()
        assert engine.step(0.03).applied
    settings = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3}
    for i, (p, first) in enumerate(zip(layers, start)):
        decay = 0.2 * (first.dim() > 1)
        assert_close(
            p.detach(), adamw_reference(first, [step[i] for step in grads], **settings, weight_decay=decay)
        )


@pytest.mark.parametrize("tied", [False, True])
def test_only_matrices_of_linear_maps_decay(tied):
    model = Transformer(replace(SHAPE, tied=tied, qkv_bias=True))
    decayed, plain = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    listed = [names[id(p)] for p in decayed["params"] + plain["params"]]
    assert sorted(listed) == sorted(names.values())
    kept = {names[id(p)] for p in plain["params"]}
    assert kept == {n for n in names.values() if "norm" in n or n.endswith("bias") or n == "embed.weight"}
    assert ("head.weight" in {names[id(p)] for p in decayed["params"]}) != tied


def test_clipping_equals_torch():
    for max_norm in (0.5, 1.0, 1e6):
        ours, theirs = ([torch.nn.Parameter(torch.zeros(s)) for s in (3, 50)] for _ in range(2))
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        unused = torch.nn.Parameter(torch.zeros(2))
        norm = clip_gradients([*ours, unused], max_norm)
        assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm))
        for a, b in zip(ours, theirs):
            assert_close(a.grad, b.grad)


def test_clipping_to_zero_only_measures():
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([p], 0.0).item() == pytest.approx(5.0)
    assert p.grad.tolist() == [3.0, 4.0]


# ---------------------------------------------------------------- the schedule


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_the_learning_rate_rises_stays_and_falls(decay):
    config = replace(
        CONFIG, steps=100, warmup_steps=10, max_lr=2.0, min_lr_ratio=0.1, decay=decay, decay_fraction=0.3
    )
    rates = [learning_rate(step, config) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert max(rates) == rates[9] == 2.0
    assert rates[-1] == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(rates[9:], rates[10:]))
    if decay == "linear":
        assert rates[9:70] == [2.0] * 61
        assert rates[84] == pytest.approx(1.1)
    else:
        assert rates[54] == pytest.approx(1.1)
        assert rates[32] == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi * 23 / 90)) / 2)


def test_a_schedule_without_warm_up_begins_at_the_top():
    for decay in ("cosine", "linear"):
        config = replace(CONFIG, warmup_steps=0, decay=decay, max_lr=1.0)
        assert learning_rate(1, config) > 0.95


def test_a_warm_up_longer_than_the_run_is_no_division_by_zero():
    for decay in ("cosine", "linear"):
        config = replace(CONFIG, steps=5, warmup_steps=5, decay=decay, max_lr=1.0)
        assert [learning_rate(step, config) for step in range(1, 6)] == pytest.approx(
            [0.2, 0.4, 0.6, 0.8, 1.0]
        )


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"accumulation": 3}, "batch_size must be a multiple of accumulation, got 4 and 3"),
        ({"max_lr": -1.0}, "max_lr must be a number that is not negative, got -1.0"),
        ({"max_lr": math.nan}, "max_lr must be a number that is not negative, got nan"),
        ({"save_every": -1}, "save_every must be a number that is not negative, got -1"),
        ({"betas": (0.9, 1.0)}, r"betas in \[0, 1\), got 0.3, 1e-08 and \(0.9, 1.0\)"),
        ({"decay_fraction": 0.0}, r"decay_fraction must be in \(0, 1\]"),
    ],
)
def test_bad_settings_are_named(change, error):
    with pytest.raises(ValueError, match=error):
        replace(CONFIG, **change)


# ---------------------------------------------------------------- the loss


def problem(rows=37, dim=8, vocab=23, dtype=torch.float64, ignored=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, dim, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, dim, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = IGNORE
    return hidden, weight, targets


@pytest.mark.parametrize("chunk_rows", [1, 5, 1000, None])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 0.95])
def test_linear_cross_entropy_equals_torch(chunk_rows, ignored):
    hidden, weight, targets = problem(ignored=ignored)
    ours = linear_cross_entropy(hidden, weight, targets, chunk_rows=chunk_rows)
    theirs = F.cross_entropy(hidden @ weight.T, targets)
    assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(3 * ours, (hidden, weight)), torch.autograd.grad(3 * theirs, (hidden, weight))
    ):
        assert_close(a, b)


def test_linear_cross_entropy_passes_gradcheck():
    hidden, weight, targets = problem(rows=7, vocab=5)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, chunk_rows=2), (hidden, weight)
    )


def test_linear_cross_entropy_takes_any_leading_axes_and_a_divisor():
    hidden, weight, targets = problem(rows=24)
    flat = linear_cross_entropy(hidden, weight, targets)
    assert_close(linear_cross_entropy(hidden.view(2, 12, -1), weight, targets.view(2, 12)), flat)
    count = int((targets != IGNORE).sum())
    assert_close(linear_cross_entropy(hidden, weight, targets, n_targets=4 * count), flat / 4)


def test_linear_cross_entropy_of_nothing():
    hidden, weight, targets = problem(ignored=2.0)
    with pytest.raises(ValueError, match="every target is -100"):
        linear_cross_entropy(hidden, weight, targets)
    loss = linear_cross_entropy(hidden, weight, targets, n_targets=5)  # a rank whose rows are all padding
    assert loss.item() == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_linear_cross_entropy_gives_only_the_gradients_that_are_asked_for(which):
    hidden, weight, targets = problem()
    frozen, free = (weight, hidden) if which == "hidden" else (hidden, weight)
    frozen.requires_grad_(False)
    linear_cross_entropy(hidden, weight, targets).backward()
    assert frozen.grad is None
    (expected,) = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, targets), free)
    assert_close(free.grad, expected)


def test_without_gradients_none_are_computed():
    hidden, weight, targets = problem(rows=1200)
    with torch.no_grad(), LargestTensor() as work:
        loss = linear_cross_entropy(hidden, weight, targets)
    assert_close(loss, F.cross_entropy(hidden @ weight.T, targets))
    assert "mm" in work.calls
    assert work.calls.count("mm") == math.ceil(
        int((targets != IGNORE).sum()) / 512
    )  # of each chunk the logits only


def test_linear_cross_entropy_survives_large_logits():
    hidden, weight, targets = problem(dtype=torch.float32)
    loss = linear_cross_entropy(hidden * 1e3, weight, targets)
    assert_close(loss, F.cross_entropy(hidden * 1e3 @ weight.T, targets))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, (hidden, weight)))


def test_linear_cross_entropy_in_bfloat16():
    hidden, weight, targets = problem(rows=300, dim=32, vocab=100)

    def run(loss, dtype):
        h, w = hidden.detach().to(dtype).requires_grad_(), weight.detach().to(dtype).requires_grad_()
        value = loss(h, w, targets)
        return value, *torch.autograd.grad(value, (h, w))

    def naive(h, w, y):
        return F.cross_entropy(h @ w.T, y)

    low, exact = run(naive, torch.bfloat16), run(naive, torch.float64)
    for ours, rough, right in zip(run(linear_cross_entropy, torch.bfloat16), low, exact):
        assert_low_precision(ours, rough, right, floor=1e-5)


def test_autocast_decides_the_dtype_of_the_products():
    hidden, weight, targets = problem(rows=300, dim=32, vocab=100, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        low = linear_cross_entropy(hidden, weight, targets)
    assert low.dtype == torch.float32
    exact = linear_cross_entropy(hidden, weight, targets)
    assert 0 < abs(low.item() - exact.item()) < 1e-2 * exact.item()
    grads = torch.autograd.grad(low, (hidden, weight))
    assert all(grad.dtype == torch.float32 for grad in grads)


class LargestTensor(TorchDispatchMode):
    """Which operations run, and the most elements of any tensor that one of them makes."""

    def __init__(self):
        super().__init__()
        self.numel, self.calls = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append(func.overloadpacket.__name__)
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, torch.Tensor):
                self.numel = max(self.numel, each.numel())
        return out


def test_the_logits_of_all_rows_never_exist():
    hidden, weight, targets = problem(rows=400, dim=16, vocab=64, dtype=torch.float32)
    with LargestTensor() as naive:
        F.cross_entropy(hidden @ weight.T, targets).backward()
    with LargestTensor() as ours:
        linear_cross_entropy(hidden, weight, targets, chunk_rows=50).backward()
    assert naive.numel == 400 * 64
    assert ours.numel <= 400 * 16


@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"norm_head": True}], ids=str)
def test_the_loss_of_a_batch_is_that_of_the_logits(data, changes):
    model, loader = make(data, **changes)
    batch = next(loader)
    logits = model(batch.tokens, positions=batch.positions, mask=batch.mask())
    expected = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
    loss = batch_loss(model, batch)
    assert_close(loss, expected)
    for a, b in zip(
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True),
        torch.autograd.grad(expected, list(model.parameters())),
    ):
        assert_close(a, b)


def test_a_fresh_model_is_as_wise_as_a_die(data):
    model, loader = make(data)
    assert evaluate_loss(model, loader.epoch_batches()) == pytest.approx(math.log(VOCAB), abs=0.05)


def test_evaluation_is_one_mean_over_all_targets(data):
    model, _ = make(data)
    model.requires_grad_(False)
    for weight in model.parameters():
        weight.mul_(8 if weight.dim() > 1 else 1)  # so that documents differ
    one = Loader(data, batch_size=200, seq_len=32, packing="rows")
    many = Loader(data, batch_size=3, seq_len=32, packing="rows")
    batches = list(many.epoch_batches())
    assert len({batch.n_targets for batch in batches}) > 3
    assert evaluate_loss(model, batches) == pytest.approx(evaluate_loss(model, one.epoch_batches()), rel=1e-6)
    part = sum(batch_loss(model, batch).item() * batch.n_targets for batch in batches[:2])
    assert evaluate_loss(model, batches, max_batches=2) == pytest.approx(
        part / sum(batch.n_targets for batch in batches[:2]), rel=1e-6
    )


def test_evaluation_leaves_the_mode_and_the_gradients(data):
    model, loader = make(data)
    for mode in (True, False):
        model.train(mode)
        evaluate_loss(model, loader.epoch_batches())
        assert model.training is mode
    modes, hidden = [], model.hidden
    model.hidden = lambda *args, **options: modes.append(model.training) or hidden(*args, **options)
    evaluate_loss(model.train(), loader.epoch_batches())
    assert set(modes) == {False}
    assert all(p.grad is None for p in model.parameters())


def test_evaluation_of_nothing_is_an_error(data):
    model, _ = make(data)
    empty = torch.full((1, 4), IGNORE)
    batch = make_batch(torch.zeros_like(empty), empty, torch.full_like(empty, -1), torch.zeros_like(empty))
    for batches in ([], [batch]):
        with pytest.raises(ValueError, match="no target in the batches"):
            evaluate_loss(model, batches)


def test_bits_per_byte():
    assert bits_per_byte(math.log(256), 10, 10) == pytest.approx(8.0)  # one byte a token, a uniform guess
    assert bits_per_byte(math.log(2), 10, 40) == pytest.approx(0.25)


# ---------------------------------------------------------------- accumulation


@pytest.mark.parametrize("clip_norm", [0.0, 0.1])
def test_accumulation_is_the_full_batch(data, clip_norm):
    config = replace(CONFIG, steps=4, batch_size=4, clip_norm=clip_norm, eps=1e-3)
    results = []
    for parts in (1, 2, 4):
        model, loader = make(data)
        model.double()
        counts = [part.n_targets for part in next(iter(loader.epoch_batches())).split(4)]
        quiet(model, loader, replace(config, accumulation=parts))
        results.append([p.detach() for p in model.parameters()])
    assert len(set(counts)) > 1, (
        "the parts must hold different numbers of targets for this test to say anything"
    )
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert_close(a, b)


def test_a_mean_of_means_is_another_loss(data):
    """What the law above guards against: micro-batch means averaged with equal weights."""
    model, loader = make(data)
    model.double().requires_grad_(False)
    for weight in model.parameters():
        weight.mul_(8 if weight.dim() > 1 else 1)
    batch = next(loader)
    parts = batch.split(4)
    whole = batch_loss(model, batch).item()
    right = sum(batch_loss(model, part, n_targets=batch.n_targets).item() for part in parts)
    wrong = sum(batch_loss(model, part).item() for part in parts) / 4
    assert right == pytest.approx(whole, rel=1e-12)
    assert abs(wrong - whole) > 1e-3


# ---------------------------------------------------------------- the loop

GOLDEN = [
    4.16641,
    4.12778,
    4.04197,
    3.97199,
    3.90081,
    3.79315,
    3.90893,
    3.66113,
    3.6806,
    3.79163,
    3.70105,
    3.61537,
]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-4), ("bfloat16", 2e-3)])
def test_the_golden_curve(data, dtype, tolerance):
    """A change that means to change nothing leaves these losses as they are. Products in 16 bits stay near them."""
    model, loader = make(data)
    losses = [line["loss_nats"] for line in quiet(model, loader, replace(CONFIG, dtype=dtype)).metrics]
    assert losses == pytest.approx(GOLDEN, abs=tolerance)


def test_the_loop_equals_a_loop_written_out(data):
    config = replace(CONFIG, weight_decay=0.2, clip_norm=0.5)
    model, loader = make(data, config)
    model.double()
    quiet(model, loader, config)
    slow, loader = make(data, config)
    slow.double()
    decayed = [p for n, p in slow.named_parameters() if p.dim() == 2 and not n.startswith("embed")]
    plain = [p for n, p in slow.named_parameters() if p.dim() == 1 or n.startswith("embed")]
    groups = [{"params": decayed, "weight_decay": 0.2}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for step in range(1, config.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        batch = next(loader)
        logits = slow(batch.tokens, positions=batch.positions, mask=batch.mask())
        F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE).backward()
        torch.nn.utils.clip_grad_norm_(slow.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(model.parameters(), slow.parameters()):
        assert_close(a.detach(), b.detach(), scale=1000)  # the angles are float32, the order of sums differs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_16_bits_are_refused(data, dtype):
    model, loader = make(data)
    with pytest.raises(
        ValueError,
        match=r"embed.weight is torch.b?float16, in which small updates are lost: call model.float",
    ):
        quiet(model.to(dtype), loader)


def test_bfloat16_leaves_the_weights_in_float32(data):
    model, loader = make(data)
    quiet(model, loader, replace(CONFIG, dtype="bfloat16"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_another_loss_can_be_trained(data):
    def toward_zero(model, batch, n_targets):
        return batch.n_targets / n_targets * sum(p.square().sum() for p in model.parameters())

    model, loader = make(data)
    before = sum(p.square().sum().item() for p in model.parameters())
    quiet(model, loader, replace(CONFIG, accumulation=2), loss_fn=toward_zero)
    assert sum(p.square().sum().item() for p in model.parameters()) < before


def test_it_learns_to_count(data):
    model, loader = make(data)
    result = quiet(model, loader, replace(CONFIG, steps=150, log_every=10))
    assert result.loss_nats < 0.5 * math.log(VOCAB)


def test_the_metrics_say_what_happened(data, tmp_path):
    model, loader = make(data)
    seen = []
    config = replace(CONFIG, log_every=3, eval_every=6)
    result = quiet(
        model, loader, config, run_dir=tmp_path, on_step=seen.append, eval_fn=lambda m: {"answer": 42.0}
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.metrics
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert [line["step"] for line in lines if "answer" in line] == [6, 12]
    assert [info.step for info in seen] == list(range(1, 13))
    counts = [0, *(info.tokens for info in seen)]
    for line in lines:
        steps = [info for info in seen if line["step"] - 3 < info.step <= line["step"]]
        weights = [counts[info.step] - counts[info.step - 1] for info in steps]
        mean = sum(info.loss_nats * n for info, n in zip(steps, weights)) / sum(weights)
        assert line["loss_nats"] == pytest.approx(mean)
        assert line["lr"] == learning_rate(line["step"], config)
        assert line["tokens"] == counts[line["step"]]
        assert line["tokens_per_s"] > 0
        assert line["mfu"] >= 0
    assert (result.steps, result.tokens) == (12, counts[-1])


def test_without_a_keeper_every_step_is_remembered_and_nothing_is_written(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    alone, kept = train(*make(data), CONFIG), quiet(*make(data))
    assert [line["step"] for line in alone.metrics] == list(range(1, 13))
    assert [line["loss_nats"] for line in alone.metrics] == pytest.approx(
        [line["loss_nats"] for line in kept.metrics]
    )
    assert (alone.steps, alone.tokens) == (kept.steps, kept.tokens)
    assert list(tmp_path.iterdir()) == []


def test_evaluation_does_not_touch_training(data):
    losses = []
    for eval_fn in (
        None,
        lambda m: {
            "noise": torch.rand(1).item(),
            "held_out": evaluate_loss(m, make(data)[1].epoch_batches()),
        },
    ):
        model, loader = make(data)
        result = quiet(model, loader, replace(CONFIG, eval_every=2), eval_fn=eval_fn)
        losses.append([line["loss_nats"] for line in result.metrics])
    assert losses[0] == losses[1]


def test_loader_and_config_must_agree(data):
    model, loader = make(data)
    with pytest.raises(ValueError, match="the loader has batch_size 4 and seq_len 32, the config 8 and 32"):
        quiet(model, loader, replace(CONFIG, batch_size=8))


# ---------------------------------------------------------------- stopping and going on


def contents(run_dir):
    """Everything of the last checkpoint that must not depend on interruptions, and the losses so far."""
    groups, state = load_checkpoint(latest_checkpoint(run_dir / "checkpoints"))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    measured = [{k: v for k, v in line.items() if k not in ("tokens_per_s", "mfu")} for line in lines]
    kept = {name: state[name] for name in ("step", "tokens", "loader")}
    return groups, kept, measured


def assert_same(a, b):
    assert a[1:] == b[1:]
    assert a[0].keys() == b[0].keys()
    for group in a[0]:
        assert a[0][group].keys() == b[0][group].keys()
        for name in a[0][group]:
            assert torch.equal(a[0][group][name], b[0][group][name]), f"{group} {name}"


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    folders = {}
    for dtype in ("float32", "bfloat16"):
        folders[dtype] = tmp_path_factory.mktemp(dtype)
        quiet(*make(data), replace(CONFIG, dtype=dtype), run_dir=folders[dtype])
    return {dtype: contents(folder) for dtype, folder in folders.items()}


def stop_at(step, number=signal.SIGTERM):
    def on_step(info):
        if info.step == step:
            os.kill(os.getpid(), number)

    return on_step


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_and_resumed_is_uninterrupted_bit_for_bit(data, tmp_path, uninterrupted, dtype, number):
    config = replace(CONFIG, dtype=dtype)
    for stop in (1, 6, 7):
        with pytest.raises(
            Interrupted, match=f"{number.name} after step {stop}: saved to .*; the same command resumes"
        ) as caught:
            quiet(*make(data), config, run_dir=tmp_path, on_step=stop_at(stop, number))
        assert caught.value.step == stop
        assert caught.value.checkpoint == latest_checkpoint(tmp_path / "checkpoints")
    result = quiet(*make(data), config, run_dir=tmp_path)
    assert result.steps == 12
    assert_same(contents(tmp_path), uninterrupted[dtype])


def test_a_signal_in_the_last_step_finishes_the_run(data, tmp_path):
    result = quiet(*make(data), run_dir=tmp_path, on_step=stop_at(12))
    assert result.steps == 12


def test_a_finished_run_is_not_trained_further(data, tmp_path, uninterrupted):
    quiet(*make(data), run_dir=tmp_path)
    model, loader = make(data)
    result = quiet(model, loader, run_dir=tmp_path, on_step=lambda info: pytest.fail("a step too many"))
    assert (result.steps, result.loss_nats) == (12, result.metrics[-1]["loss_nats"])
    assert_same(contents(tmp_path), uninterrupted["float32"])
    for name, p in model.named_parameters():
        assert torch.equal(p, uninterrupted["float32"][0]["model"][name])


def test_without_a_folder_nothing_is_saved_and_the_message_says_so(data):
    with pytest.raises(Interrupted, match="nothing saved: no run_dir was given"):
        quiet(*make(data), on_step=stop_at(2))


class Crash(Exception):
    pass


def crash_at(step):
    def on_step(info):
        if info.step == step:
            raise Crash

    return on_step


def damage(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json", "manifest.json"],
)
def test_a_damaged_checkpoint_is_passed_over(data, tmp_path, uninterrupted, name, caplog):
    with pytest.raises(Crash):
        quiet(*make(data), run_dir=tmp_path, on_step=crash_at(10))
    newest = latest_checkpoint(tmp_path / "checkpoints")
    assert newest.name == "step-00000008"
    damage(newest / name)
    steps = []
    quiet(*make(data), run_dir=tmp_path, on_step=lambda info: steps.append(info.step))
    assert steps[0] == 5, "it must go on from the checkpoint before"
    assert "falling back" in caplog.text
    assert_same(contents(tmp_path), uninterrupted["float32"])


def test_metrics_after_the_checkpoint_are_written_anew(data, tmp_path, uninterrupted):
    with pytest.raises(Crash):
        quiet(*make(data), run_dir=tmp_path, on_step=crash_at(7))
    path = tmp_path / "metrics.jsonl"
    assert len(path.read_text().splitlines()) == 7
    path.write_text(path.read_text() + '{"step": 8, "loss_na')  # the line that a kill cut off
    quiet(*make(data), run_dir=tmp_path)
    assert_same(contents(tmp_path), uninterrupted["float32"])


def test_the_last_interval_survives_a_stop(data, tmp_path):
    config = replace(CONFIG, log_every=5)
    whole = quiet(*make(data), config).metrics
    with pytest.raises(Interrupted):
        quiet(*make(data), config, run_dir=tmp_path, on_step=stop_at(7))
    parts = quiet(*make(data), config, run_dir=tmp_path).metrics
    assert [(line["step"], line["loss_nats"]) for line in parts] == [
        (line["step"], line["loss_nats"]) for line in whole
    ]


def test_another_run_is_not_continued(data, tmp_path, tmp_path_factory):
    with pytest.raises(Interrupted):
        quiet(*make(data), run_dir=tmp_path, on_step=stop_at(2))
    for change in (
        {"max_lr": 0.5},
        {"steps": 13},
        {"betas": (0.9, 0.99)},
        {"dtype": "bfloat16"},
        {"seed": 1},
    ):
        config = replace(CONFIG, **change)
        with pytest.raises(
            ValueError, match=rf"was trained with config {next(iter(change))}=.*use another run_dir"
        ):
            quiet(*make(data, config), config, run_dir=tmp_path)
    quiet(*make(data), replace(CONFIG, log_every=2, save_every=5, keep=1, accumulation=2), run_dir=tmp_path)
    other = tmp_path_factory.mktemp("other")
    write_data(other, seed=1)
    with pytest.raises(ValueError, match="the loader's state was saved with data="):
        quiet(*make(TokenShards(other)), run_dir=tmp_path)
    with pytest.raises(ValueError, match="was trained with model rope_theta=10000.0, now rope_theta=500.0"):
        quiet(*make(data, rope_theta=500.0), run_dir=tmp_path)


def test_weights_of_another_shape_are_not_loaded():
    weights = dict(Transformer(SHAPE).named_parameters())
    with pytest.raises(CheckpointError, match=r"the checkpoint has \(64, 16\), the model \(64, 8\)"):
        load_parameters(Transformer(replace(SHAPE, dim=8)), weights)
    with pytest.raises(CheckpointError, match=r"missing \['blocks.2"):
        load_parameters(Transformer(replace(SHAPE, n_layers=3)), weights)
    with pytest.raises(CheckpointError, match=r"unknown \['blocks.1"):
        load_parameters(Transformer(replace(SHAPE, n_layers=1)), weights)


def test_only_the_newest_checkpoints_are_kept(data, tmp_path):
    quiet(*make(data), replace(CONFIG, save_every=2, keep=3), run_dir=tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        f"step-{step:08d}" for step in (8, 10, 12)
    ]


@pytest.mark.parametrize("where", ["weights", "gradient"])
def test_a_loss_that_is_no_number_stops_the_run_and_nothing_is_saved(data, tmp_path, where, monkeypatch):
    model, loader = make(data)
    before = {}

    def poison(info):
        if info.step == 5:
            if where == "weights":
                model.embed.weight.data[7] = math.nan
            else:
                monkeypatch.setattr(training, "clip_gradients", lambda *a: torch.tensor(math.inf))
            before.update({name: p.detach().clone() for name, p in model.named_parameters()})

    with pytest.raises(TrainingDiverged, match=r"step 6: .*; the parameters are those of step 5"):
        quiet(model, loader, run_dir=tmp_path, on_step=poison)
    assert latest_checkpoint(tmp_path / "checkpoints").name == "step-00000004"
    for name, p in model.named_parameters():
        assert torch.equal(p.nan_to_num(), before[name].nan_to_num())


# ---------------------------------------------------------------- a real kill

PROGRAM = """
import sys, time
sys.path.insert(0, sys.argv[3])
import test_train as here
from minillm.storage.shards import TokenShards
config = here.replace(here.CONFIG, steps=40, save_every=1, log_every=1)
here.quiet(*here.make(TokenShards(sys.argv[1]), config), config, run_dir=sys.argv[2],
           on_step=lambda info: (print(info.step, flush=True), time.sleep(0.02)))
"""


def start(data, run_dir):
    arguments = [str(data.folder), str(run_dir), os.path.dirname(__file__)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.slow
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(data, tmp_path):
    """kill -9 of a real process at moments that it does not choose, in training and in saving."""
    config = replace(CONFIG, steps=40, save_every=1, log_every=1)
    quiet(*make(data, config), config, run_dir=tmp_path / "whole")
    dice, killed = random.Random(0), []
    for goal in (7, 19, 30):
        process = start(data, tmp_path / "killed")
        for line in process.stdout:
            if int(line) >= goal:
                time.sleep(dice.random() * 0.04)
                process.kill()
                break
        killed.append(process.wait())
    assert killed == [-signal.SIGKILL] * 3
    last = start(data, tmp_path / "killed")
    steps = [int(line) for line in last.stdout]
    assert last.wait() == 0
    assert steps[0] > 20, "it began again instead of resuming"
    assert steps[-1] == 40
    assert_same(contents(tmp_path / "killed"), contents(tmp_path / "whole"))


@pytest.mark.slow
def test_a_second_signal_is_not_waited_for():
    code = (
        "import os, signal, time\nfrom minillm.runs.signals import catch_signals\n"
        "with catch_signals() as caught:\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print(caught, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(5); print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "['SIGTERM']\n"
    assert done.returncode == -signal.SIGTERM


def test_signal_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with catch_signals() as caught:
        assert signal.getsignal(signal.SIGTERM) is not before[1]
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught == ["SIGTERM"]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_training_works_outside_the_main_thread(data):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(quiet(*make(data), replace(CONFIG, steps=2)).steps)
    )
    thread.start()
    thread.join()
    assert results == [2]


# ---------------------------------------------------------------- compiling, and other engines


def test_only_long_runs_are_compiled(monkeypatch):
    model = Transformer(SHAPE)
    long = replace(CONFIG, steps=10**12)
    monkeypatch.setattr(keeper.shutil, "which", lambda name: None)
    assert not should_compile(model, long), "there is no compiler"
    assert should_compile(model, replace(long, compile="on")), "who asks for it gets the error"
    monkeypatch.setattr(keeper.shutil, "which", lambda name: name == "g++" or None)
    assert not should_compile(model, CONFIG)
    assert should_compile(model, long)
    assert not should_compile(model, replace(long, compile="off"))
    assert should_compile(model, replace(CONFIG, compile="on"))


PLAIN = """
import sys, json
sys.path.insert(0, sys.argv[2])
import torch
from dataclasses import replace
import test_train as here
from minillm.storage.shards import TokenShards
errors = []
for change in ({"decay": "square"}, {"dtype": "float16"}, {"compile": "maybe"}):
    try:
        replace(here.CONFIG, **change)
    except ValueError as error:
        errors.append(str(error))
compile, graphs, losses = torch.compile, [], []
torch.compile = lambda f: graphs.append(f) or compile(f, backend="eager", fullgraph=True)
for on in ("off", "on"):
    model, loader = here.make(TokenShards(sys.argv[1]))
    result = here.quiet(model, loader, replace(here.CONFIG, steps=3, compile=on))
    losses.append([line["loss_nats"] for line in result.metrics])
    assert "hidden" not in vars(model), "the model is left as it was"
print(json.dumps([errors, losses, len(graphs)]))
"""


def test_without_the_type_checks_of_the_tests(data):
    """Words that are not allowed have messages of their own, and a compiled step, traced as one graph, is the same step.

    Under the tests' import hook beartype speaks first, and cannot be traced; the code generator would take a minute.
    """
    arguments = [sys.executable, "-c", PLAIN, str(data.folder), os.path.dirname(__file__)]
    done = subprocess.run(
        arguments, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    errors, losses, graphs = json.loads(done.stdout)
    assert errors == [
        "decay must be one of cosine, linear, got 'square'",
        "dtype must be one of float32, bfloat16, got 'float16'",
        "compile must be one of auto, on, off, got 'maybe'",
    ]
    assert graphs == 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_another_engine_can_take_over(data):
    """What chapter 18 relies on: gradients, steps and sums go through the engine and nowhere else."""

    log = []

    class Doubled(Engine):
        world_size = 2

        def sum_over(self, value):
            return 2 * value

        def backward(self, loss):
            log.append("backward")
            super().backward(2 * loss)

        def step(self, lr, limit):
            log.append(lr)
            return super().step(lr, limit)

    class Everything:
        """The whole batch for each process, as if it were its share."""

        batch_size, seq_len = CONFIG.batch_size, CONFIG.seq_len

        def __init__(self, loader):
            self.state_dict, self.load_state_dict = loader.state_dict, loader.load_state_dict
            self.loader = loader

        def __next__(self):
            return next(self.loader)

    config = replace(CONFIG, steps=3, accumulation=2)
    model, loader = make(data)
    with pytest.raises(ValueError, match="cuts batches for 1 processes, the engine has 2"):
        quiet(model, loader, config, engine=Doubled(model, config))
    doubled = quiet(model, Everything(loader), config, engine=Doubled(model, config))
    plain_model, loader = make(data)
    plain = quiet(plain_model, loader, config)
    assert log == [
        each for step in (1, 2, 3) for each in ("backward", "backward", learning_rate(step, config))
    ]
    assert doubled.tokens == 2 * plain.tokens
    for a, b in zip(model.parameters(), plain_model.parameters()):
        assert_close(a, b)


def test_the_chapters_table_gives_the_settings_of_the_tiny_recipe():
    chapter = (Path(__file__).parents[1] / "chapters" / "16_train.ipynb").read_text(encoding="utf-8")
    config = recipe("tiny").train
    assert f"| {1000 * config.max_lr:g}e-3 |" in chapter
    assert f"straight down to {100 * config.min_lr_ratio:g} % |" in chapter
    assert config.batch_size * config.seq_len == 1024  # "1K"
