"""Causal attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbitcore import _C
from lowbitcore.ops.arguments import as_heads, check_dims, contiguous, heads_like
from lowbitcore.ops.operators import define, differentiate_once, fake, kernel_or_operator


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Causal attention, ``softmax(scale q k^T) v``, with as many queries as keys; on the CPU.

    Args:
        q: float32, bfloat16 or float16 [B, H, T, D], D a multiple of 32, at most 256; any strides.
        k, v: as q [B, H', T, D], any strides. H' divides H; ``H / H'`` heads of q in a row share
            one of k and v.
        scale: above 0; D ** -0.5 by default.

    Returns:
        As q, [B, H, T, D], a transposed view of [B, T, H, D], as gradients are. Scores, softmax
        and sums are float32. Differentiable, once, in q, k and v. After FlashAttention-2 (arXiv
        2307.08691).
    """
    kernel = kernel_or_operator("attention", _attention, q=q, k=k, v=v)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_dims("attention", name, tensor, 4)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    out: Tensor = kernel(q, k, v, scale)[0]
    return out


@define("attention(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)")
def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = _attention_fake(q, k, v, scale)
    _C.attention(as_heads(q), as_heads(k), as_heads(v), scale, out, lse)
    return out, lse


@fake("attention")
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return heads_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


@define(
    "attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " float scale) -> (Tensor, Tensor, Tensor)"
)
def _(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _attention_backward_fake(d_out, q, k, v, out, lse, scale)
    _C.attention_backward(
        as_heads(d_out),
        as_heads(q),
        as_heads(k),
        as_heads(v),
        as_heads(out),
        contiguous(lse),
        scale,
        dq,
        dk,
        dv,
    )
    return dq, dk, dv


@fake("attention_backward")
def _attention_backward_fake(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return heads_like(q), heads_like(k), heads_like(v)


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output)


def _attention_backward(ctx: Any, d_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    grads = torch.ops.lowbitcore.attention_backward(d_out, *ctx.saved_tensors, ctx.scale)
    return *grads, None


differentiate_once("attention", _attention_setup, _attention_backward)
