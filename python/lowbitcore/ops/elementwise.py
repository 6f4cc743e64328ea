"""RMSNorm, rotary position embeddings (RoPE), SwiGLU, dropout: what lies between products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbitcore import _C
from lowbitcore.ops.arguments import (
    as_rows,
    check,
    check_dims,
    contiguous,
    empty_like,
    fail,
    heads_like,
    result_rows,
)
from lowbitcore.ops.operators import (
    define,
    differentiate,
    differentiate_once,
    fake,
    kernel_or_operator,
)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """``weight * (x / sqrt(mean(x^2) + eps))`` (Zhang and Sennrich, arXiv 1910.07467), on the CPU.

    Args:
        x: float32, bfloat16 or float16 [..., D], D a multiple of 32, any strides.
        weight: [D], of the type of ``x``. It may not ask for a gradient.
        eps: 0 or more.

    Returns:
        [..., D] in the type of ``x``, to which the quotient and the product are rounded, as
        transformers does it; between them all is float32. Differentiable, once, in x.
    """
    kernel = kernel_or_operator("rms_norm", _rms_norm, x=x, weight=weight)
    check_dims("rms_norm", "weight", weight, 1)
    if x.dim() == 0:
        fail("rms_norm", "x", "at least 1 dimension", tuple(x.shape))
    if weight.requires_grad and torch.is_grad_enabled():
        fail("rms_norm", "weight", "one that does not ask for a gradient", "one that does")
    y: Tensor = kernel(x, weight, eps)
    return y


@define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = empty_like(x)
    _C.rms_norm(as_rows(x), contiguous(weight), eps, result_rows(y))
    return y


@fake("rms_norm")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return empty_like(x)


@define("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, float eps) -> Tensor")
def _(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    dx = empty_like(x)
    _C.rms_norm_backward(as_rows(dy), as_rows(x), contiguous(weight), eps, result_rows(dx))
    return dx


@fake("rms_norm_backward")
def _(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return empty_like(x)


def _rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _rms_norm_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.lowbitcore.rms_norm_backward(dy, *ctx.saved_tensors, ctx.eps), None, None


differentiate_once("rms_norm", _rms_norm_setup, _rms_norm_backward)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al., arXiv 2104.09864), as transformers' LLaMA has them, on the CPU:
    with the halves x1, x2 of a head, ``(x1, x2) cos + (-x2, x1) sin``.

    Args:
        x: float32, bfloat16 or float16 [B, H, T, D], D a multiple of 64, any strides.
        cos, sin: [1 or B, T, D], of the type of ``x``.

    Returns:
        [B, H, T, D], a transposed view of [B, T, H, D]; products and their sum are rounded to the
        type of ``x``, as torch does it. Differentiable in x.
    """
    kernel = kernel_or_operator("rotate", _rotate, x=x, cos=cos, sin=sin)
    check_dims("rotate", "x", x, 4)
    for name, tensor in (("cos", cos), ("sin", sin)):
        check_dims("rotate", name, tensor, 3)
        if tensor.shape[0] not in (1, x.shape[0]) or tensor.shape[1:] != x.shape[2:]:
            wanted = f"shape [1 or {x.shape[0]}, {x.shape[2]}, {x.shape[3]}]"
            fail("rotate", name, wanted, list(tensor.shape))
    y: Tensor = kernel(x, cos, sin, False)
    return y


@define("rotate(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor")
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    y = heads_like(x)
    if y.numel():
        flat, result = (heads.transpose(1, 2).flatten(2) for heads in (x, y))
        _C.rotate(as_rows(flat), as_rows(cos), as_rows(sin), inverse, result)
    return y


@fake("rotate")
def _(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return heads_like(x)


def _rotate_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _rotate_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
    dx = torch.ops.lowbitcore.rotate(dy, *ctx.saved_tensors, not ctx.inverse)
    return dx, None, None, None


differentiate("rotate", _rotate_setup, _rotate_backward)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` (Shazeer, arXiv 2002.05202) with ``silu(g) = g / (1 + exp(-g))``, on the
    CPU.

    Args:
        gate, up: float32, bfloat16 or float16 [..., D], of one type and shape, D a multiple of 32,
            any strides.

    Returns:
        Their shape and type, to which silu(gate) and the product are rounded, as torch does it.
        Differentiable, once.
    """
    kernel = kernel_or_operator("swiglu", _swiglu, gate=gate, up=up)
    if gate.dim() == 0:
        fail("swiglu", "gate", "at least 1 dimension", tuple(gate.shape))
    if gate.shape != up.shape:
        fail("swiglu", "up", f"shape {list(gate.shape)}, as gate", list(up.shape))
    out: Tensor = kernel(gate, up)
    return out


@define("swiglu(Tensor gate, Tensor up) -> Tensor")
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out = empty_like(gate)
    _C.swiglu(as_rows(gate), as_rows(up), result_rows(out))
    return out


@fake("swiglu")
def _(gate: Tensor, up: Tensor) -> Tensor:
    return empty_like(gate)


@define("swiglu_backward(Tensor d_out, Tensor gate, Tensor up) -> (Tensor, Tensor)")
def _(d_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = empty_like(gate), empty_like(up)
    _C.swiglu_backward(
        as_rows(d_out), as_rows(gate), as_rows(up), result_rows(d_gate), result_rows(d_up)
    )
    return d_gate, d_up


@fake("swiglu_backward")
def _(d_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return empty_like(gate), empty_like(up)


def _swiglu_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = torch.ops.lowbitcore.swiglu_backward(d_out, *ctx.saved_tensors)
    return d_gate, d_up


differentiate_once("swiglu", _swiglu_setup, _swiglu_backward)


def dropout(x: Tensor, p: float) -> Tensor:
    """``x`` with elements zeroed at random, each with a probability of ``p``, and the others over
    ``1 - p``; on the CPU.

    Args:
        x: float32, bfloat16 or float16 [..., D], D a multiple of 32, any strides.
        p: 0 or more and below 1, rounded to a multiple of 2^-16.

    Returns:
        The shape and type of ``x``. Differentiable. What it draws from torch's generator is one
        number, from which the elements to zero follow: backward asks for no mask.
    """
    check("dropout", x=x)
    if x.dim() == 0:
        fail("dropout", "x", "at least 1 dimension", tuple(x.shape))
    dropped = round(p * 2**16)
    if not 0 <= dropped < 2**16:
        fail("dropout", "p", "0 or more and below 1", p)
    seed = torch.empty((), dtype=torch.int64).random_(-(2**63), None)
    y: Tensor = torch.ops.lowbitcore.dropout(x, seed, dropped)
    return y


@define("dropout(Tensor x, Tensor seed, int dropped) -> Tensor")
def _(x: Tensor, seed: Tensor, dropped: int) -> Tensor:
    y = empty_like(x)
    _C.dropout(as_rows(x), int(seed) % 2**64, dropped, result_rows(y))
    return y


@fake("dropout")
def _(x: Tensor, seed: Tensor, dropped: int) -> Tensor:
    return empty_like(x)


def _dropout_setup(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    _, seed, ctx.dropped = inputs
    ctx.save_for_backward(seed)


def _dropout_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.lowbitcore.dropout(dy, *ctx.saved_tensors, ctx.dropped), None, None


differentiate("dropout", _dropout_setup, _dropout_backward)
