"""Low-rank adapters (LoRA) of a linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbitcore import _C
from lowbitcore.ops.arguments import (
    as_rows,
    check_dims,
    contiguous,
    empty,
    empty_like,
    fail,
    result_rows,
)
from lowbitcore.ops.operators import define, differentiate_once, fake, kernel_or_operator


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, *, scaling: float) -> Tensor:
    """``y + scaling x A^T B^T`` (LoRA, Hu et al., arXiv 2106.09685), on the CPU.

    Args:
        y: float32, bfloat16 or float16 [..., N], N a multiple of 32.
        x: [..., K] of the type of ``y``, K a multiple of 32.
        a: float32 [r, K], b: float32 [N, r].

    Returns:
        [..., N] in the type of ``y``, to which the sum is rounded once; products and sums are
        float32, gradients of ``a`` and ``b``, too. Differentiable, once, in y, x, a and b.
    """
    kernel = kernel_or_operator("add_low_rank", _add_low_rank, y=y, x=x, a=a, b=b)
    check_dims("add_low_rank", "a", a, 2)
    check_dims("add_low_rank", "b", b, 2)
    if x.dim() == 0 or x.shape[:-1] != y.shape[:-1]:
        fail("add_low_rank", "x", f"shape {[*y.shape[:-1], a.shape[1]]}", list(x.shape))
    total: Tensor = kernel(y, x, a, b, scaling)[0]
    return total


@define("add_low_rank(Tensor y, Tensor x, Tensor a, Tensor b, float scaling) -> (Tensor, Tensor)")
def _add_low_rank(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    total, low = _add_low_rank_fake(y, x, a, b, scaling)
    _C.add_low_rank(
        as_rows(y), as_rows(x), contiguous(a), contiguous(b), scaling, low, result_rows(total)
    )
    return total, low


@fake("add_low_rank")
def _add_low_rank_fake(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    return empty_like(y), a.new_empty(x.shape[:-1].numel(), len(a))


@define(
    "add_low_rank_backward(Tensor dy, Tensor? x, Tensor? low, Tensor a, Tensor b, float scaling,"
    " bool for_x) -> (Tensor, Tensor, Tensor)"
)
def _(
    dy: Tensor,
    x: Tensor | None,
    low: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    for_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, da, db = _backward_fake(dy, x, low, a, b, scaling, for_x)
    _C.add_low_rank_backward(
        as_rows(dy),
        None if x is None else as_rows(x),
        low,
        contiguous(a),
        contiguous(b),
        scaling,
        result_rows(dx) if for_x else None,
        None if x is None else da,
        None if low is None else db,
    )
    return dx, da, db


@fake("add_low_rank_backward")
def _backward_fake(
    dy: Tensor,
    x: Tensor | None,
    low: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    for_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, a and b. Empty is the first unless it is asked for, that of a without x,
    and that of b without low, which they are made of."""
    return (
        empty(dy, *dy.shape[:-1], a.shape[1]) if for_x else dy.new_empty(0),
        a.new_empty(0 if x is None else a.shape),
        b.new_empty(0 if low is None else b.shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, x, a, b, ctx.scaling = inputs
    low = output[1]
    ctx.mark_non_differentiable(low)
    for_a, for_b = ctx.needs_input_grad[2:4]
    ctx.save_for_backward(x if for_a else None, low if for_b else None, a, b)


def _backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    for_y, for_x, for_a, for_b, _ = ctx.needs_input_grad
    dx = da = db = None
    if for_x or for_a or for_b:
        dx, da, db = torch.ops.lowbitcore.add_low_rank_backward(
            dy, *ctx.saved_tensors, ctx.scaling, for_x
        )
    return (
        dy if for_y else None,
        dx if for_x else None,
        da if for_a else None,
        db if for_b else None,
        None,
    )


differentiate_once("add_low_rank", _setup, _backward)
