"""Laws of chapter 16."""

import math

import torch

from minillm.check import close, law


def _adamw(theta, grads, *, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0):
    theta = torch.nn.Parameter(theta.clone())
    optimizer = torch.optim.AdamW([theta], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    for grad in grads:
        theta.grad = grad.clone()
        optimizer.step()
    return theta.detach()


def _run(f, theta, grads, *, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0):
    m = v = torch.zeros_like(theta)
    for t, grad in enumerate(grads, 1):
        theta, m, v = f(theta, grad, m, v, t, lr, betas, eps, weight_decay)
    return theta


@law(
    "train.adamw",
    "the first step moves every weight by the learning rate",
    hint="correct both means by 1 - beta**t",
)
def _(f):
    theta, grad = torch.zeros(4), torch.tensor([5.0, -0.01, 100.0, -3.0])
    close(_run(f, theta, [grad]), -0.1 * grad.sign(), rtol=1e-4)


@law(
    "train.adamw",
    "ten steps equal torch's",
    hint="m and v are running means with betas[0] and betas[1]; eps is outside the root",
)
def _(f):
    theta, grads = torch.randn(5), [torch.randn(5) for _ in range(10)]
    close(_run(f, theta, grads, eps=1e-2), _adamw(theta, grads, eps=1e-2))


@law(
    "train.adamw",
    "weight decay is decoupled",
    hint="multiply theta by 1 - lr * weight_decay; leave the gradient alone",
)
def _(f):
    theta, grads = torch.randn(5), [torch.randn(5) for _ in range(3)]
    close(_run(f, theta, grads, weight_decay=0.5), _adamw(theta, grads, weight_decay=0.5))


@law(
    "train.accumulate", "equal parts: the plain mean", hint="the loss of the whole is a mean over all targets"
)
def _(f):
    close(f([torch.tensor(1.0), torch.tensor(3.0)], [10, 10]), torch.tensor(2.0))


@law(
    "train.accumulate",
    "a part counts by its targets",
    hint="turn means into sums, add, divide by all targets",
)
def _(f):
    close(f([torch.tensor(1.0), torch.tensor(3.0)], [30, 10]), torch.tensor(1.5))


@law("train.accumulate", "a part without targets counts nothing", hint="its weight is 0 of the total")
def _(f):
    close(f([torch.tensor(1.0), torch.tensor(9.0)], [5, 0]), torch.tensor(1.0))


def _cross_entropy_grad(logits, targets):
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100), logits)[
        0
    ]


@law(
    "train.cross_entropy_grad",
    "equals autograd's",
    hint="softmax minus one-hot, divided by the number of targets",
)
def _(f):
    logits, targets = torch.randn(6, 9), torch.randint(9, (6,))
    close(f(logits.clone(), targets), _cross_entropy_grad(logits, targets))


@law(
    "train.cross_entropy_grad",
    "rows without a target have no gradient",
    hint="-100 is not an index: leave those rows at 0",
)
def _(f):
    logits, targets = torch.randn(6, 9), torch.tensor([1, -100, 3, -100, 0, 8])
    close(f(logits.clone(), targets), _cross_entropy_grad(logits, targets))


@law("train.cross_entropy_grad", "large logits do not overflow", hint="use softmax, not exp")
def _(f):
    logits, targets = 1000 * torch.randn(4, 5), torch.randint(5, (4,))
    close(f(logits.clone(), targets), _cross_entropy_grad(logits, targets))


@law("train.cosine", "rises in a straight line", hint="max_lr * step / warmup_steps")
def _(f):
    for step in (1, 5, 10):
        assert math.isclose(f(step, 100, 10, 1.0, 0.1), step / 10, rel_tol=1e-9), (
            f"step {step}: {f(step, 100, 10, 1.0, 0.1)}"
        )


@law(
    "train.cosine",
    "is half way down in the middle, and at min_lr at the end",
    hint="the cosine runs from the end of the warm-up",
)
def _(f):
    for step, expected in ((55, 0.55), (100, 0.1)):
        found = f(step, 100, 10, 1.0, 0.1)
        assert math.isclose(found, expected, rel_tol=1e-9), f"step {step}: {found:.4f}, expected {expected}"


@law("train.cosine", "falls slowly, fast, slowly", hint="(1 + cos(pi * done)) / 2")
def _(f):
    early, middle, late = (f(s, 100, 0, 1.0, 0.0) - f(s + 1, 100, 0, 1.0, 0.0) for s in (1, 50, 99))
    assert 0 < early < middle, f"drops of {early:.4f}, {middle:.4f}, {late:.4f}"
    assert 0 < late < middle, f"drops of {early:.4f}, {middle:.4f}, {late:.4f}"
