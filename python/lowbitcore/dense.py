"""Products of dense tensors of 16 bits on processors that multiply none.

torch then takes them element by element: on AVX2 some 5 times as long as in float32, and up to 80
times of weights that lie across. Here they go through float32, a piece at a time, so that no whole
copy of a weight is made; sums are float32, and are rounded once, as torch's are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lowbitcore.ops.arguments import in_memory, is_transformed

# Elements of a weight that are float32 at a time: 4 MB, which a cache can hold.
_PANEL_ELEMENTS = 1 << 20
# Rows of activations that are, at least and at most; else as many as a weight is wide or high.
_ROWS = (256, 2048)
# With fewer rows, to read a weight as it is costs less than to convert it.
_FEW_ROWS = 16


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether torch has kernels for products of this type on this processor; where it cannot say,
    it is left alone."""
    if not torch.backends.mkldnn.is_available():
        return True
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def is_slow(x: Tensor) -> bool:
    """Whether torch multiplies these element by element."""
    return not is_transformed() and x.is_cpu and not multiplies(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias``: x [..., K], weight [N, K], bias [N]."""
    if _through_float32(x, weight):
        result: Tensor = _InFloat32.apply(x, weight, bias)
        return result
    return functional.linear(x, weight, bias)


def _through_float32(x: Tensor, weight: Tensor) -> bool:
    return (
        is_slow(x)
        and in_memory(x)
        and in_memory(weight)
        and x.dtype == weight.dtype
        and x.shape[:-1].numel() >= _FEW_ROWS
        and weight.numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )


def _parts(rows: Tensor, weight_shape: Sequence[int]) -> Iterator[slice]:
    fewest, most = _ROWS
    return _pieces(len(rows), min(max(fewest, min(weight_shape)), most))


def _pieces(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _panels(weight_shape: Sequence[int]) -> Iterator[slice]:
    n, k = weight_shape
    return _pieces(n, max(1, _PANEL_ELEMENTS // k))


class _InFloat32(torch.autograd.Function):
    """`linear`. For its backward it keeps what torch would: of its arguments, as they came, those
    that gradients are made of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        for_x, for_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None)
        ctx.x_shape, ctx.weight_shape = x.shape, weight.shape
        y = x.new_empty(*x.shape[:-1], len(weight))
        rows, out = x.reshape(-1, x.shape[-1]), y.view(-1, len(weight))
        for some in _parts(rows, weight.shape):
            part = rows[some].float()
            for panel in _panels(weight.shape):
                total = part @ weight[panel].float().mT
                if bias is not None:
                    total += bias[panel]
                out[some, panel] = total
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        n, k = ctx.weight_shape
        gradient = dy.reshape(-1, n)
        rows = None if x is None else x.reshape(-1, k)
        dx = None if weight is None else dy.new_empty(len(gradient), k)
        dw = None if x is None else dy.new_zeros(n, k, dtype=torch.float32)
        for some in _parts(gradient, ctx.weight_shape):
            part = None if rows is None else rows[some].float()
            total = None if dx is None else dx.new_zeros(dx[some].shape, dtype=torch.float32)
            for panel in _panels(ctx.weight_shape):
                piece = gradient[some, panel].float()
                if total is not None:
                    total.addmm_(piece, weight[panel].float())
                if dw is not None and part is not None:
                    dw[panel].addmm_(piece.mT, part)
            if dx is not None and total is not None:
                dx[some] = total
        d_bias = None
        if ctx.needs_input_grad[2]:
            d_bias = gradient.sum(0, dtype=torch.float32).to(dy.dtype)
        return (
            None if dx is None else dx.view(ctx.x_shape),
            None if dw is None else dw.to(dy.dtype),
            d_bias,
        )
