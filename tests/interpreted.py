"""Attention by a named backend in a process of its own, in which Triton's interpreter is on.

Triton reads TRITON_INTERPRET when it is imported, so it cannot be switched on where another test has imported Triton before.
"""

import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch

from minillm.attention import Mask
from minillm.flash import BACKENDS, attend_triton
from minillm.kernels import libraries
from minillm.kernels.operators import flash_forward


def switch_on():
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


def pool():
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=switch_on)


def both_passes(attend, inputs, grad, mask, slopes, dtype, gradients=True):
    """[out, dq, dk, dv] in float64, of float64 inputs rounded to `dtype`."""
    q, k, v = (x.detach().to(dtype).requires_grad_(gradients) for x in inputs)
    out = attend(q, k, v, mask, slopes=slopes)
    assert out.dtype == dtype
    assert out.shape == q.shape
    # in memory as a model's wo hands it back
    grad = grad.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    grads = torch.autograd.grad(out, (q, k, v), grad) if gradients else ()
    assert all(g.dtype == dtype for g in grads)
    return [x.detach().double() for x in (out, *grads)]


def job(name, inputs, grad, mask, slopes, dtype):
    mask = Mask(**{key: value if key == "causal" else torch.from_numpy(value) for key, value in mask.items()})
    slopes = None if slopes is None else torch.from_numpy(slopes)
    inputs, grad = [torch.from_numpy(x) for x in inputs], torch.from_numpy(grad)
    flex = name == "flex"
    if flex:
        from torch.nn.attention.flex_attention import flex_attention

        # uncompiled: the formula is under test here, and compiling takes long
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        libraries.compiled_flex = lambda: flex_attention
    results = both_passes(BACKENDS[name], inputs, grad, mask, slopes, getattr(torch, dtype), not flex)
    return [np.array(x) for x in results]


def both_passes_elsewhere(executor, name, inputs, grad, mask, slopes, dtype):
    """`both_passes` in the other process; only NumPy arrays travel. `mask` is a dictionary of Mask's arguments."""
    mask = {key: value if key == "causal" else value.numpy() for key, value in mask.items()}
    slopes = None if slopes is None else slopes.numpy()
    arrays = [x.detach().numpy() for x in inputs]
    name_of = str(dtype).removeprefix("torch.")
    work = executor.submit(job, name, arrays, grad.numpy(), mask, slopes, name_of)
    return [torch.from_numpy(x) for x in work.result(timeout=300)]


def compiled_job():
    """attend_triton as a part of a compiled function: no graph break, the gradients of the uncompiled one."""
    q, k, v = (torch.randn(1, n, 20, 16, requires_grad=True) for n in (2, 1, 1))
    mask = Mask(documents=torch.arange(20)[None] // 7)

    def layer(q, k, v):
        return attend_triton(2 * q, k, v, mask).tanh()

    results = []
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        out = run(q, k, v)
        results.append([out, *torch.autograd.grad(out.sum(), (q, k, v))])
    return max((a - b).abs().max().item() for a, b in zip(*results))


def library_check():
    """torch's own test of an operator: schema, fake shapes and strides, autograd registration."""
    q, k, v = (torch.randn(1, n, 18, 16, requires_grad=True) for n in (2, 1, 1))
    arguments = (q, k, v, True, *[None] * 6)
    return torch.library.opcheck(
        flash_forward, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )
