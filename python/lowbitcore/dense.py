"""Products of dense tensors of 16 bits on processors that multiply none.

torch then takes them element by element: on AVX2 6 times as long as in float32, and 80 to 130
times of reductions that are as short as an adapter's rank, or of weights that lie across. Here
they go through float32, a piece at a time, so that no whole copy of a weight is made; sums are
float32, and are rounded once, as torch's are.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Elements of a weight that are float32 at a time: 4 MB, which a cache can hold.
_PANEL_ELEMENTS = 1 << 20
# Rows of activations that are, at least and at most; else as many as a weight is wide or high. An
# adapter's are worth no large pieces, between which a heap comes apart: by 2048 rows, with what
# lives on after each, training with adapters took a quarter more memory.
_ROWS = (256, 2048)
# With fewer rows, to read a weight as it is costs less than to convert it.
_FEW_ROWS = 16


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether torch has instructions of this processor for products of this type."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def is_slow(x: Tensor) -> bool:
    """Whether torch multiplies these element by element."""
    return (
        x.is_cpu
        and not multiplies(x.dtype)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias``: x [..., K], weight [N, K], bias [N]."""
    if _through_float32(x, weight):
        result: Tensor = _InFloat32.apply(x, weight, bias, 1.0)
        return result
    return functional.linear(x, weight, bias)


def add_scaled(y: Tensor, x: Tensor, weight: Tensor, *, scaling: float) -> Tensor:
    """``y + scaling x W^T``: y [..., N], x [..., K], weight [N, K]."""
    if _through_float32(x, weight):
        result: Tensor = _InFloat32.apply(x, weight, y, scaling)
        return result
    total = torch.addmm(y.flatten(0, -2), x.flatten(0, -2), weight.mT, alpha=scaling)
    return total.view(y.shape)


def _through_float32(x: Tensor, weight: Tensor) -> bool:
    return is_slow(x) and x.dtype == weight.dtype and x.shape[:-1].numel() >= _FEW_ROWS


def _parts(rows: Tensor, weight: Tensor) -> Iterator[slice]:
    fewest, most = _ROWS
    return _pieces(len(rows), min(max(fewest, min(weight.shape)), most))


def _pieces(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _panels(weight: Tensor) -> Iterator[slice]:
    return _pieces(len(weight), max(1, _PANEL_ELEMENTS // max(1, weight.shape[1])))


class _InFloat32(torch.autograd.Function):
    """`linear` and `add_scaled`. What it keeps for its backward are its arguments as they came."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, add: Tensor | None, scaling: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.scaling, ctx.add_shape = scaling, None if add is None else add.shape
        y = x.new_empty(*x.shape[:-1], len(weight))
        rows, out = x.reshape(-1, x.shape[-1]), y.view(-1, len(weight))
        if add is not None and add.dim() > 1:
            add = add.reshape(out.shape)
        for some in _parts(rows, weight):
            part = rows[some].float()
            for panel in _panels(weight):
                total = part @ weight[panel].float().mT
                if scaling != 1.0:
                    total *= scaling
                if add is not None:
                    total += add[panel] if add.dim() == 1 else add[some, panel]
                out[some, panel] = total
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_add, _ = ctx.needs_input_grad
        rows, gradient = x.reshape(-1, x.shape[-1]), dy.reshape(-1, len(weight))
        dx = torch.empty_like(rows) if for_x else None
        dw = weight.new_zeros(weight.shape, dtype=torch.float32) if for_weight else None
        for some in _parts(rows, weight):
            part = rows[some].float() if dw is not None else None
            total = torch.zeros(*rows[some].shape) if dx is not None else None
            for panel in _panels(weight):
                piece = gradient[some, panel].float()
                if total is not None:
                    total.addmm_(piece, weight[panel].float(), alpha=ctx.scaling)
                if dw is not None and part is not None:
                    dw[panel].addmm_(piece.mT, part, alpha=ctx.scaling)
            if dx is not None and total is not None:
                dx[some] = total
        d_add = None
        if for_add:
            summed = len(ctx.add_shape) == 1 and dy.dim() > 1
            d_add = gradient.sum(0, dtype=torch.float32).to(dy.dtype) if summed else dy
        return (
            None if dx is None else dx.view(x.shape),
            None if dw is None else dw.to(weight.dtype),
            d_add,
            None,
        )


class Linear(nn.Linear):
    """torch's own wherever that is quick."""

    def forward(self, x: Tensor) -> Tensor:
        if is_slow(x) and not torch.is_autocast_enabled("cpu"):
            return linear(x, self.weight, self.bias)
        return super().forward(x)


def use_own_linears(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
