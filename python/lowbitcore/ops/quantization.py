"""Round-to-nearest and GPTQ: integers from weights, and from what they are multiplied by."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from lowbitcore import _C
from lowbitcore.ops.arguments import as_rows, check, check_activations, check_dims, fail
from lowbitcore.ops.format import group_count, trivial_g_idx
from lowbitcore.ops.operators import define, define_on_host, fake, stream


class Quantized(NamedTuple):
    """Integers of a linear: codes uint8 [N, K], scales float32 [G, N], zeros uint8 [G, N]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor


class GptqFactor(NamedTuple):
    """A factored Hessian, shared by all linears that see the same input.

    ``order`` int32 [K] is the order of processing, ``u`` float32 [K, K] the upper triangular factor
    with ``H^-1 = u^T u`` in that order, ``dead`` bool [K] marks columns that never saw an input,
    ``percdamp`` is the damping that was used (more than was asked for, if the factorisation needed
    it).
    """

    order: Tensor
    u: Tensor
    dead: Tensor
    percdamp: float


class GptqResult(NamedTuple):
    """Codes in the original order of columns; ``g_idx`` int32 [K], ``None`` where it is trivial;
    ``loss`` is tr(E H E^T) of the quantization error E under the damped Hessian."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor | None
    loss: float


def _quantized_like(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    n, k = weight.shape
    groups = group_count(k, group_size)
    return (
        weight.new_empty((n, k), dtype=torch.uint8),
        weight.new_empty((groups, n), dtype=torch.float32),
        weight.new_empty((groups, n), dtype=torch.uint8),
    )


def quantize_rtn(
    weight: Tensor, *, bits: int, group_size: int, sym: bool = False, mse: bool = False
) -> Quantized:
    """Round-to-nearest quantization of a weight [N, K] (float32, bfloat16 or float16).

    Scales are float32 holding fp16 values: they are rounded before the integers are chosen. ``sym``
    puts every zero at ``2^(bits-1)``. ``mse`` searches the clipping range for the least squared
    error.
    """
    check("quantize_rtn", bits, group_size, weight=weight)
    check_dims("quantize_rtn", "weight", weight, 2)
    return Quantized(
        *torch.ops.lowbitcore.quantize_rtn(weight.detach(), bits, group_size, sym, mse)
    )


@define(
    "quantize_rtn(Tensor weight, int bits, int group_size, bool sym, bool mse)"
    " -> (Tensor, Tensor, Tensor)"
)
def _(
    weight: Tensor, bits: int, group_size: int, sym: bool, mse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n, k = weight.shape
    _C.check_format("quantize_rtn", bits, group_size, k, n)
    codes, scales, zeros = _quantized_like(weight, group_size)
    _C.quantize_rtn(
        as_rows(weight), bits, group_size, sym, mse, codes, scales, zeros, stream(weight)
    )
    return codes, scales, zeros


@fake("quantize_rtn")
def _(
    weight: Tensor, bits: int, group_size: int, sym: bool, mse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _quantized_like(weight, group_size)


def accumulate_hessian_(hessian: Tensor, x: Tensor) -> None:
    """``hessian += x^T x`` in place: float32 [K, K] and x [..., K] (float32, bfloat16, float16)."""
    check("accumulate_hessian", hessian=hessian, x=x)
    check_dims("accumulate_hessian", "hessian", hessian, 2)
    if x.dim() == 0:
        fail("accumulate_hessian", "x", "at least 1 dimension", tuple(x.shape))
    torch.ops.lowbitcore.accumulate_hessian_(hessian, x.detach())


# On CUDA a dense product is torch's. The core's rules for its arguments are these:


def _add_square(hessian: Tensor, x: Tensor) -> None:
    _check_sum("accumulate_hessian", "hessian", hessian, x=x)
    _add_product(hessian, x, x)


def _add_cross(cross: Tensor, a: Tensor, b: Tensor) -> None:
    _check_sum("accumulate_cross", "cross", cross, a=a, b=b)
    _add_product(cross, a, b)


def _check_sum(op: str, name: str, total: Tensor, **inputs: Tensor) -> None:
    k = total.shape[0]
    if total.dtype != torch.float32:
        fail(op, name, "float32", total.dtype)
    if k == 0 or k % 32:
        fail(op, name, "a positive multiple of 32 rows", k)
    if total.shape != (k, k):
        fail(op, name, f"shape [{k}, {k}]", list(total.shape))
    rows = next(iter(inputs.values())).shape[:-1].numel()
    for argument, x in inputs.items():
        check_activations(op, argument, x)
        if (x.shape[:-1].numel(), x.shape[-1]) != (rows, k):
            fail(op, argument, f"shape [{rows}, {k}]", list(x.shape))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    a, b = a.reshape(-1, len(total)), b.reshape(-1, len(total))
    with _without_tf32():
        total.addmm_(a.float().mT, b.float())


_tf32_lock = threading.Lock()


@contextmanager
def _without_tf32() -> Iterator[None]:
    """torch's products of float32 on CUDA are that, whatever its settings allow."""
    matmul = torch.backends.cuda.matmul
    new = hasattr(matmul, "fp32_precision")  # since 2.9; to mix it with the old one is an error
    name, exact = ("fp32_precision", "ieee") if new else ("allow_tf32", False)
    with _tf32_lock:  # the setting is the process's
        allowed = getattr(matmul, name)
        if allowed == exact:  # then it goes on following what it inherits
            yield
            return
        setattr(matmul, name, exact)
        try:
            yield
        finally:
            setattr(matmul, name, allowed)


@define("accumulate_hessian_(Tensor(a!) hessian, Tensor x) -> ()", cuda=_add_square)
def _(hessian: Tensor, x: Tensor) -> None:
    _C.accumulate_hessian(hessian, as_rows(x))


@fake("accumulate_hessian_")
def _(hessian: Tensor, x: Tensor) -> None:
    return None


def accumulate_cross_(cross: Tensor, a: Tensor, b: Tensor) -> None:
    """``cross += a^T b`` in place: float32 [K, K]; a and b [..., K], float32 or 16 bits each."""
    check("accumulate_cross", cross=cross, a=a, b=b)
    check_dims("accumulate_cross", "cross", cross, 2)
    for name, value in (("a", a), ("b", b)):
        if value.dim() == 0:
            fail("accumulate_cross", name, "at least 1 dimension", tuple(value.shape))
    torch.ops.lowbitcore.accumulate_cross_(cross, a.detach(), b.detach())


@define("accumulate_cross_(Tensor(a!) cross, Tensor a, Tensor b) -> ()", cuda=_add_cross)
def _(cross: Tensor, a: Tensor, b: Tensor) -> None:
    _C.accumulate_cross(cross, as_rows(a), as_rows(b))


@fake("accumulate_cross_")
def _(cross: Tensor, a: Tensor, b: Tensor) -> None:
    return None


def gptq_factorize(
    hessian: Tensor, *, percdamp: float = 0.01, act_order: bool = True
) -> GptqFactor:
    """Factor a Hessian [K, K] for :func:`gptq_quantize`, once for all linears with the same input.

    ``percdamp`` times the mean of the diagonal is added to it; where that is not enough it is
    raised tenfold, at most three times. ``act_order`` processes columns by falling diagonal.

    Raises:
        lowbitcore.Error: the matrix is not positive definite even so.
    """
    check("gptq_factorize", hessian=hessian)
    check_dims("gptq_factorize", "hessian", hessian, 2)
    order, u, dead, used = torch.ops.lowbitcore.gptq_factorize(hessian, percdamp, act_order)
    return GptqFactor(order, u, dead, float(used))


@define_on_host(
    "gptq_factorize(Tensor hessian, float percdamp, bool act_order)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def _(hessian: Tensor, percdamp: float, act_order: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order, u, dead, used = _gptq_factorize_fake(hessian, percdamp, act_order)
    used.fill_(
        _C.gptq_factorize(as_rows(hessian), percdamp, act_order, order, dead.view(torch.uint8), u)
    )
    return order, u, dead, used


@fake("gptq_factorize")
def _gptq_factorize_fake(
    hessian: Tensor, percdamp: float, act_order: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k = hessian.shape[0]
    return (
        hessian.new_empty(k, dtype=torch.int32),
        hessian.new_empty((k, k), dtype=torch.float32),
        hessian.new_empty(k, dtype=torch.bool),
        hessian.new_empty((), dtype=torch.float64),
    )


def gptq_quantize(
    weight: Tensor,
    factor: GptqFactor,
    *,
    bits: int,
    group_size: int,
    sym: bool = False,
    mse: bool = False,
    static_groups: bool = True,
) -> GptqResult:
    """GPTQ (arXiv 2210.17323) of a weight [N, K] (float32, bfloat16 or float16).

    With ``static_groups`` the groups follow the original columns and their grids come from the
    original weights, so that ``g_idx`` is ``None`` whatever the order of processing; otherwise a
    group is a run of columns in processing order, its grid found on the weights as updated so far.

    The integers depend on nothing but the arguments: not on the instruction set, not on threads.
    """
    op = "gptq_quantize"
    if not isinstance(factor, GptqFactor):
        fail(op, "factor", "what gptq_factorize returns", type(factor).__name__)
    check(op, bits, group_size, weight=weight, order=factor.order, u=factor.u, dead=factor.dead)
    check_dims(op, "weight", weight, 2)
    if weight.shape[1] != factor.order.shape[0]:
        fail(op, "weight", f"{factor.order.shape[0]} columns, as the factor", list(weight.shape))
    codes, scales, zeros, g_idx, loss = torch.ops.lowbitcore.gptq_quantize(
        weight.detach(),
        factor.order,
        factor.u,
        factor.dead,
        bits,
        group_size,
        sym,
        mse,
        static_groups,
    )
    trivial = torch.equal(g_idx, trivial_g_idx(weight.shape[1], group_size, g_idx.device))
    return GptqResult(codes, scales, zeros, None if trivial else g_idx, float(loss))


@define(
    "gptq_quantize(Tensor weight, Tensor order, Tensor u, Tensor dead, int bits, int group_size,"
    " bool sym, bool mse, bool static_groups) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _(
    weight: Tensor,
    order: Tensor,
    u: Tensor,
    dead: Tensor,
    bits: int,
    group_size: int,
    sym: bool,
    mse: bool,
    static_groups: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, k = weight.shape
    _C.check_format("gptq_quantize", bits, group_size, k, n)
    codes, scales, zeros, g_idx, loss = _gptq_quantize_fake(
        weight, order, u, dead, bits, group_size, sym, mse, static_groups
    )
    loss.fill_(
        _C.gptq_quantize(
            as_rows(weight),
            order,
            dead.view(torch.uint8),
            u,
            bits,
            group_size,
            sym,
            mse,
            static_groups,
            codes,
            scales,
            zeros,
            g_idx,
            stream(weight),
        )
    )
    return codes, scales, zeros, g_idx, loss


@fake("gptq_quantize")
def _gptq_quantize_fake(
    weight: Tensor,
    order: Tensor,
    u: Tensor,
    dead: Tensor,
    bits: int,
    group_size: int,
    sym: bool,
    mse: bool,
    static_groups: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        *_quantized_like(weight, group_size),
        weight.new_empty(weight.shape[1], dtype=torch.int32),
        weight.new_empty((), dtype=torch.float64),
    )
