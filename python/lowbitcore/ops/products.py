"""The products of a packed weight: forward, transposed, and the gradient of its scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbitcore import _C, dispatch
from lowbitcore.ops.arguments import (
    as_rows,
    check,
    check_activations,
    check_dims,
    contiguous,
    empty,
    fail,
    result_rows,
)
from lowbitcore.ops.format import check_format, group_count, stored_in_features
from lowbitcore.ops.operators import (
    define,
    differentiate,
    fake,
    is_plain,
    kernel_or_operator,
    stream,
)


def _by_dequantizing(op: dispatch.Op, x: Tensor, g_idx: Tensor | None, weights: int) -> bool:
    """Whether a product is better left to torch (only on CUDA; see dispatch)."""
    if dispatch.capability(x.device) is None:
        return False
    rows, permuted = x.shape[:-1].numel(), g_idx is not None
    found = dispatch.path(op, rows, x.device, dtype=x.dtype, permuted=permuted, weights=weights)
    return found == "dequantize"


def qgemm_nt(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    *,
    bits: int,
    group_size: int,
    g_idx: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``x W^T + bias`` from packed weights.

    Args:
        x: float32, bfloat16 or float16 [..., K], any strides.
        packed: from :func:`prepack`.
        scales: float32 [G, N].
        bias: [N], added in float32 before the one rounding of the result.

    Returns:
        [..., N] in the type of ``x``; sums are float32. Differentiable in ``x``, ``scales`` (the
        gradient of PEQA, arXiv 2305.14152, with no dense dW) and ``bias``, to any order.

    On CUDA, :mod:`lowbitcore.dispatch` may send many rows of 16 bits through a dequantized weight
    and torch's dense product. Weights and ``bias`` are then rounded to the type of ``x``, and sums
    are as torch's settings have them.
    """
    check("qgemm_nt", bits, group_size, x=x, packed=packed, scales=scales, g_idx=g_idx, bias=bias)
    check_dims("qgemm_nt", "scales", scales, 2)
    if x.dim() == 0:
        fail("qgemm_nt", "x", "at least 1 dimension", tuple(x.shape))
    kernel = _qgemm_nt if is_plain(x, packed, scales) else torch.ops.lowbitcore.qgemm_nt
    result: Tensor = kernel(x, packed, scales, g_idx, bias, bits, group_size)
    return result


@define(
    "qgemm_nt(Tensor x, Tensor packed, Tensor scales, Tensor? g_idx, Tensor? bias, int bits,"
    " int group_size) -> Tensor"
)
def _qgemm_nt(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    _C.check_format("qgemm_nt", bits, group_size, 32, 32)
    k = stored_in_features("qgemm_nt", packed, scales, bits, group_size)
    n = scales.shape[1]
    if _by_dequantizing("qgemm_nt", x, g_idx, n * k):
        if x.shape[-1] != k:
            fail("qgemm_nt", "x", f"shape [..., {k}]", list(x.shape))
        if bias is not None and bias.shape != (n,):
            fail("qgemm_nt", "bias", f"shape [{n}]", list(bias.shape))
        y = empty(x, *x.shape[:-1], n)
        rows, out = x.reshape(-1, k), y.view(-1, n)
        for span in dispatch.panels(n, k, x.dtype):
            panel = x.new_empty((span.stop - span.start, k))
            _C.dequantize(
                packed,
                as_rows(scales),
                g_idx,
                bits,
                group_size,
                k,
                n,
                span.start,
                panel,
                stream(x),
            )
            if bias is None:
                torch.mm(rows, panel.mT, out=out[:, span])
            else:
                torch.addmm(bias[span].to(x.dtype), rows, panel.mT, out=out[:, span])
        return y
    return fused_qgemm_nt(x, packed, scales, g_idx, bias, None, bits, group_size, k, n)


def fused_qgemm_nt(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bias: Tensor | None,
    order: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
) -> Tensor:
    """`qgemm_nt` in the core, which alone checks the arguments: of tensors that are plain. A layer
    calls it at once, as it knows its sizes: finding them anew is a tenth and more of what all
    linears of a decode step take, and so is permuting x in a call of its own, by `order`, which the
    CPU alone takes here."""
    y = empty(x, *x.shape[:-1], out_features)
    _C.qgemm_nt(
        as_rows(x),
        packed,
        as_rows(scales),
        g_idx,
        None if bias is None else contiguous(bias.float()),
        order,
        bits,
        group_size,
        in_features,
        out_features,
        result_rows(y),
        stream(x),
    )
    return y


@fake("qgemm_nt")
def _qgemm_nt_fake(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    k = stored_in_features("qgemm_nt", packed, scales, bits, group_size)
    if x.shape[-1] != k:
        fail("qgemm_nt", "x", f"shape [..., {k}]", list(x.shape))
    return x.new_empty((*x.shape[:-1], scales.shape[1]))


def qgemm_nn(
    dy: Tensor,
    packed: Tensor,
    scales: Tensor,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    g_idx: Tensor | None = None,
) -> Tensor:
    """``dy W``, the transposed product of EMEF's backward (arXiv 2306.08162), from the same bytes.

    Args:
        dy: float32, bfloat16 or float16 [..., N], any strides.

    Returns:
        [..., K] in the type of ``dy``. Differentiable in ``dy`` and ``scales``.
    """
    check("qgemm_nn", bits, group_size, dy=dy, packed=packed, scales=scales, g_idx=g_idx)
    check_dims("qgemm_nn", "scales", scales, 2)
    if dy.dim() == 0:
        fail("qgemm_nn", "dy", "at least 1 dimension", tuple(dy.shape))
    check_format(
        "qgemm_nn",
        bits=bits,
        group_size=group_size,
        in_features=in_features,
        out_features=scales.shape[1],
    )
    kernel = _qgemm_nn if is_plain(dy, packed, scales) else torch.ops.lowbitcore.qgemm_nn
    result: Tensor = kernel(dy, packed, scales, g_idx, bits, group_size, in_features)
    return result


@define(
    "qgemm_nn(Tensor dy, Tensor packed, Tensor scales, Tensor? g_idx, int bits, int group_size,"
    " int in_features) -> Tensor"
)
def _qgemm_nn(
    dy: Tensor,
    packed: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    dx = _qgemm_nn_fake(dy, packed, scales, g_idx, bits, group_size, in_features)
    if _by_dequantizing("qgemm_nn", dy, g_idx, scales.shape[1] * in_features):
        weight = torch.ops.lowbitcore.dequantize(
            packed, scales, g_idx, bits, group_size, in_features, dy.dtype
        )
        torch.mm(dy.reshape(-1, len(weight)), weight, out=dx.view(-1, in_features))
        return dx
    _C.qgemm_nn(
        as_rows(dy),
        packed,
        as_rows(scales),
        g_idx,
        bits,
        group_size,
        in_features,
        scales.shape[1],
        result_rows(dx),
        stream(dy),
    )
    return dx


@fake("qgemm_nn")
def _qgemm_nn_fake(
    dy: Tensor,
    packed: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    if dy.shape[-1] != scales.shape[1]:
        fail("qgemm_nn", "dy", f"shape [..., {scales.shape[1]}]", list(dy.shape))
    return empty(dy, *dy.shape[:-1], in_features)


def qgemm_grad_scales(
    dy: Tensor,
    x: Tensor,
    packed: Tensor,
    *,
    bits: int,
    group_size: int,
    g_idx: Tensor | None = None,
) -> Tensor:
    """The gradient of the scales: ``dS[g, n] = sum_{k in g} (q - z) sum_m dy[m, n] x[m, k]``.

    Args:
        dy: [..., N] and x: [..., K], of one type.

    Returns:
        float32 [G, N]. Differentiable in ``dy`` and ``x``.
    """
    check("qgemm_grad_scales", bits, group_size, dy=dy, x=x, packed=packed, g_idx=g_idx)
    for name, tensor in (("dy", dy), ("x", x)):
        if tensor.dim() == 0:
            fail("qgemm_grad_scales", name, "at least 1 dimension", tuple(tensor.shape))
    kernel = (
        _qgemm_grad_scales if is_plain(dy, x, packed) else torch.ops.lowbitcore.qgemm_grad_scales
    )
    result: Tensor = kernel(dy, x, packed, g_idx, bits, group_size)
    return result


@define(
    "qgemm_grad_scales(Tensor dy, Tensor x, Tensor packed, Tensor? g_idx, int bits,"
    " int group_size) -> Tensor"
)
def _qgemm_grad_scales(
    dy: Tensor, x: Tensor, packed: Tensor, g_idx: Tensor | None, bits: int, group_size: int
) -> Tensor:
    k, n = x.shape[-1], dy.shape[-1]
    _C.check_format("qgemm_grad_scales", bits, group_size, k, n)
    ds = _qgemm_grad_scales_fake(dy, x, packed, g_idx, bits, group_size)
    _C.qgemm_grad_scales(
        as_rows(dy), as_rows(x), packed, g_idx, bits, group_size, k, n, ds, stream(dy)
    )
    return ds


@fake("qgemm_grad_scales")
def _qgemm_grad_scales_fake(
    dy: Tensor, x: Tensor, packed: Tensor, g_idx: Tensor | None, bits: int, group_size: int
) -> Tensor:
    groups = group_count(x.shape[-1], group_size)
    return dy.new_empty((groups, dy.shape[-1]), dtype=torch.float32)


def permute_columns(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """``y[..., k] = x[..., order[k]]``: activations for a weight whose inputs were permuted.

    Args:
        x: float32, bfloat16 or float16 [..., K], any strides.
        order: int32 [K], a permutation, and ``inverse`` int32 [K], its inverse, by which gradients
            go back.

    Returns:
        [..., K] in the type of ``x``. Differentiable in ``x``.
    """
    kernel = kernel_or_operator(
        "permute_columns", _permute_columns, x=x, order=order, inverse=inverse
    )
    if x.dim() == 0:
        fail("permute_columns", "x", "at least 1 dimension", tuple(x.shape))
    result: Tensor = kernel(x, order, inverse)
    return result


def _select(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    k = x.shape[-1]
    check_activations("permute_columns", "x", x)
    if order.dtype != torch.int32:
        fail("permute_columns", "order", "int32", order.dtype)
    if order.shape != (k,):
        fail("permute_columns", "order", f"{k} elements in one dimension", list(order.shape))
    return x.index_select(-1, order)


@define("permute_columns(Tensor x, Tensor order, Tensor inverse) -> Tensor", cuda=_select)
def _permute_columns(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    y = x.new_empty(x.shape)
    if y.numel():
        _C.permute_columns(as_rows(x), order, y)
    return y


@fake("permute_columns")
def _permute_columns_fake(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return x.new_empty(x.shape)


# Each of the three products is linear in its two real arguments, and the derivatives of each are
# the other two: the family is closed, so gradients exist to any order.


def _nt_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scales, g_idx, bias, bits, group_size = inputs
    ctx.format = {"bits": bits, "group_size": group_size}
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, packed, scales, g_idx)


def _nt_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, packed, scales, g_idx = ctx.saved_tensors
    dx = ds = db = None
    if ctx.needs_input_grad[0]:
        dx = qgemm_nn(dy, packed, scales, g_idx=g_idx, in_features=ctx.in_features, **ctx.format)
    if ctx.needs_input_grad[2]:
        ds = qgemm_grad_scales(dy, x, packed, g_idx=g_idx, **ctx.format)
    if ctx.needs_input_grad[4]:
        db = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return dx, None, ds, None, db, None, None


def _nn_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, packed, scales, g_idx, bits, group_size, _ = inputs
    ctx.format = {"bits": bits, "group_size": group_size}
    ctx.save_for_backward(dy if ctx.needs_input_grad[2] else None, packed, scales, g_idx)


def _nn_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    dy, packed, scales, g_idx = ctx.saved_tensors
    ddy = ds = None
    if ctx.needs_input_grad[0]:
        ddy = qgemm_nt(ddx, packed, scales, g_idx=g_idx, **ctx.format)
    if ctx.needs_input_grad[2]:
        ds = qgemm_grad_scales(dy, ddx, packed, g_idx=g_idx, **ctx.format)
    return ddy, None, ds, None, None, None, None


def _grad_scales_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, x, packed, g_idx, bits, group_size = inputs
    ctx.format = {"bits": bits, "group_size": group_size}
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(
        dy if ctx.needs_input_grad[1] else None,
        x if ctx.needs_input_grad[0] else None,
        packed,
        g_idx,
    )


def _grad_scales_backward(ctx: Any, dds: Tensor) -> tuple[Tensor | None, ...]:
    dy, x, packed, g_idx = ctx.saved_tensors
    ddy = dx = None
    if ctx.needs_input_grad[0]:
        ddy = qgemm_nt(x, packed, dds, g_idx=g_idx, **ctx.format)
    if ctx.needs_input_grad[1]:
        dx = qgemm_nn(dy, packed, dds, g_idx=g_idx, in_features=ctx.in_features, **ctx.format)
    return ddy, dx, None, None, None, None


def _permute_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _permute_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    order, inverse = ctx.saved_tensors
    return permute_columns(dy, inverse, order), None, None


differentiate("permute_columns", _permute_setup, _permute_backward)
differentiate("qgemm_nt", _nt_setup, _nt_backward)
differentiate("qgemm_nn", _nn_setup, _nn_backward)
differentiate("qgemm_grad_scales", _grad_scales_setup, _grad_scales_backward)
