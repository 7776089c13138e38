"""The Triton kernels as operators of torch, which `torch.compile` takes as they are. This module imports without Triton."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from minillm.base.errors import MiniLLMError


def triton_kernels(interpreted: bool = False) -> Any:
    """The module of the Triton kernels, imported when first asked for: compiled for a GPU, or run by Triton's interpreter.

    Args:
        interpreted: the kernels run as Python, on any machine. Needs TRITON_INTERPRET=1 in the environment before
            anything imports Triton.

    Raises:
        MiniLLMError: Triton is not installed.
        ValueError: interpreted, but Triton was imported without TRITON_INTERPRET=1.
    """
    try:
        from minillm.kernels import triton_flash
    except ImportError as error:
        raise MiniLLMError(
            "Triton is not installed: it comes with PyTorch for CUDA; else pip install triton"
        ) from error
    if interpreted != triton_flash.INTERPRETED:
        raise ValueError(
            "on a CPU the kernels need TRITON_INTERPRET=1, on a GPU 0, set before Triton is imported"
        )
    return triton_flash


def document_edges(documents: Int[Tensor, "B S"]) -> tuple[Int[Tensor, "B S"], Int[Tensor, "B S"]]:
    """The first and the last column that has the same document as this one, as int32."""

    def first(ids: Tensor) -> Tensor:
        ordered, order = ids.sort(dim=1, stable=True)  # stable: a document's columns stay in order
        place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        starts = torch.ones_like(ids, dtype=torch.bool)
        starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        begin = torch.where(starts, place, 0).cummax(1).values
        return torch.empty_like(order).scatter_(1, order, order.gather(1, begin))

    last = documents.shape[1] - 1 - first(documents.flip(1)).flip(1)
    return first(documents).int(), last.int()


@torch.library.custom_op("minillm::flash_forward", mutates_args=())
def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, prefix: Tensor | None, documents: Tensor | None,
    first: Tensor | None, last: Tensor | None, keys: Tensor | None, slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse). From `prefix` on the fields of `triton_flash.Masks`; the last dimension of q, k, v is dense in memory."""
    triton_flash, (out, lse) = triton_kernels(q.device.type == "cpu"), _forward_shapes(q)
    masks = triton_flash.Masks(prefix, documents, first, last, keys, slopes)
    triton_flash.forward(triton_flash.Tensors(q, k, v, out, lse), masks, causal)
    return out, lse


@torch.library.custom_op("minillm::flash_backward", mutates_args=())
def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, prefix: Tensor | None,
    documents: Tensor | None, first: Tensor | None, last: Tensor | None, keys: Tensor | None, slopes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv)."""
    triton_flash, grads = triton_kernels(q.device.type == "cpu"), _backward_shapes(grad, q, k, v)
    masks = triton_flash.Masks(prefix, documents, first, last, keys, slopes)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    tensors = triton_flash.Tensors(q, k, v, out, lse, grad, torch.empty_like(lse), *grads)
    triton_flash.backward(tensors, masks, causal)
    return grads


def _heads_side_by_side(x: Tensor) -> Tensor:
    """Memory for another x, in the layout in which the output projection reads heads."""
    B, H, T, Dh = x.shape
    return x.new_empty(B, T, H, Dh).transpose(1, 2)


def _forward_shapes(q, *rest):
    return _heads_side_by_side(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _backward_shapes(grad, q, k, v, *rest):
    return _heads_side_by_side(q), _heads_side_by_side(k), _heads_side_by_side(v)


def _keep_for_backward(ctx, inputs, output):
    q, k, v, ctx.causal, *masks = inputs
    ctx.save_for_backward(q, k, v, *output, *masks)
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad, grad_lse):
    q, k, v, out, lse, *masks = ctx.saved_tensors
    return *flash_backward(grad, q, k, v, out, lse, ctx.causal, *masks), *[None] * 7


flash_forward.register_fake(_forward_shapes)
flash_backward.register_fake(_backward_shapes)
flash_forward.register_autograd(_gradient, setup_context=_keep_for_backward)
