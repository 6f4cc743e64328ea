"""Products with dense weights, for processors that have instructions for float32 alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowbitcore import _C
from lowbitcore.ops.arguments import (
    as_rows,
    check,
    check_dims,
    contiguous,
    empty,
    fail,
    result_rows,
)
from lowbitcore.ops.operators import define, differentiate, fake, is_plain


def gemm_nt(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` of a dense weight, on the CPU.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        weight: [N, K] of the type of ``x``, K a multiple of 32; of 16 bits, it becomes float32 a
            piece at a time. One whose columns are not contiguous is copied first.
        bias: [N], added in float32.

    Returns:
        [..., N] in the type of ``x``, to which float32 sums are rounded once. Differentiable in x,
        weight and bias, backward and to any order; the gradient of ``weight`` is torch's, in
        float32.
    """
    return _product("gemm_nt", _gemm_nt, x, weight, bias)


def gemm_nn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W + bias``: x [..., N], weight [N, K], bias [K], result [..., K]; all else as in
    :func:`gemm_nt`."""
    return _product("gemm_nn", _gemm_nn, x, weight, bias)


def _product(
    op: str, kernel: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    check(op, x=x, weight=weight, bias=bias)
    check_dims(op, "weight", weight, 2)
    if x.dim() == 0:
        fail(op, "x", "at least 1 dimension", tuple(x.shape))
    if not is_plain(x, weight):
        kernel = getattr(torch.ops.lowbitcore, op)
    return kernel(x, weight, bias)


@define("gemm_nt(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
def _gemm_nt(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = _gemm_nt_fake(x, weight, bias)
    _C.gemm_nt(as_rows(x), as_rows(weight), _wide(bias), result_rows(y))
    return y


@fake("gemm_nt")
def _gemm_nt_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    outputs, inputs = weight.shape
    return _empty_result("gemm_nt", x, inputs, bias, outputs)


@define("gemm_nn(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
def _gemm_nn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = _gemm_nn_fake(x, weight, bias)
    _C.gemm_nn(as_rows(x), as_rows(weight), _wide(bias), result_rows(y))
    return y


@fake("gemm_nn")
def _gemm_nn_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    inputs, outputs = weight.shape
    return _empty_result("gemm_nn", x, inputs, bias, outputs)


def _empty_result(op: str, x: Tensor, inputs: int, bias: Tensor | None, outputs: int) -> Tensor:
    if x.shape[-1] != inputs:
        fail(op, "x", f"shape [..., {inputs}]", list(x.shape))
    if bias is not None and bias.shape != (outputs,):
        fail(op, "bias", f"shape [{outputs}]", list(bias.shape))
    return empty(x, *x.shape[:-1], outputs)


def _wide(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else contiguous(bias.float())


# Each product gives the other one's gradient.


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    for_x, for_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if for_weight else None, weight if for_x else None)


def _nt_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    return (
        None if weight is None else gemm_nn(dy, weight),
        None if x is None else _outer(dy, x),
        _bias_gradient(ctx, dy),
    )


def _nn_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    return (
        None if weight is None else gemm_nt(dy, weight),
        None if x is None else _outer(x, dy),
        _bias_gradient(ctx, dy),
    )


# Of a gradient that is float32 at a time.
_PIECE_ELEMENTS = 1 << 20


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """left [..., N]^T right [..., K], the gradient of a weight."""
    n, k = left.shape[-1], right.shape[-1]
    rows, wide = left.reshape(-1, n), right.reshape(-1, k).float()
    total = left.new_empty(n, k)
    step = max(1, _PIECE_ELEMENTS // max(1, len(rows)))
    for start in range(0, n, step):
        some = slice(start, start + step)
        total[some] = rows[:, some].float().mT @ wide
    return total


def _bias_gradient(ctx: Any, dy: Tensor) -> Tensor | None:
    if not ctx.needs_input_grad[2]:
        return None
    return dy.reshape(-1, dy.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)


differentiate("gemm_nt", _setup, _nt_backward)
differentiate("gemm_nn", _setup, _nn_backward)
