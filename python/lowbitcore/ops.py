"""The core's operations as torch operators, with autograd, fake kernels and ``torch.compile``.

Shapes: ``N`` out_features, ``K`` in_features, both multiples of 32; ``b`` bits (2, 3, 4 or 8);
``group_size`` a multiple of 32 along K, or -1 for the whole row; ``G`` the number of groups, of
which the last may be shorter. ``g_idx`` int32 [K] maps a column to its group; ``None`` stands for
``k // group_size``. A weight is ``W[n, k] = scales[g, n] * (q[n, k] - zeros[g, n])``, ``g =
g_idx[k]``.

Every function raises ``ValueError`` for a mistake of the caller, naming the operation, the
argument, what was expected and what came, and ``lowbitcore.Error`` for what is not one. The
operators themselves are ``torch.ops.lowbitcore.*``; this module is the only caller of the
extension's operations.

On CUDA, work goes to torch's current stream, and a CUDA graph may capture packing and products;
call an operation once outside of one first, as torch asks of everything (a kernel is loaded when
first called).
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

from . import _C, dispatch

__all__ = [
    "GptqFactor",
    "GptqResult",
    "Quantized",
    "accumulate_cross_",
    "accumulate_hessian_",
    "add_fake_quantized_",
    "attention",
    "check_format",
    "dequantize",
    "dropout",
    "fake_quantized_grads",
    "gptq_factorize",
    "gptq_quantize",
    "group_count",
    "has_attention",
    "pack_qweight",
    "pack_qzeros",
    "packed_size",
    "permute_columns",
    "prepack",
    "qgemm_grad_scales",
    "qgemm_nn",
    "qgemm_nt",
    "quantize_rtn",
    "rms_norm",
    "rotate",
    "serves",
    "swiglu",
    "token_losses",
    "trivial_g_idx",
    "unpack",
    "unpack_qweight",
    "unpack_qzeros",
]

_ACTIVATIONS = (torch.float32, torch.bfloat16, torch.float16)
_library = torch.library.Library("lowbitcore", "DEF")
_F = TypeVar("_F", bound=Callable[..., Any])


def _operator(schema: str, *, cuda: Callable[..., Any] | None = None) -> Callable[[_F], _F]:
    """Define ``lowbitcore::schema`` with the decorated function as its kernel on the CPU and, where
    ``cuda`` names no other, on CUDA."""

    def register(kernel: _F) -> _F:
        name = schema[: schema.index("(")]
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, kernel, "CPU")
        _library.impl(name, _on_its_device(cuda or kernel), "CUDA")
        return kernel

    return register


def _on_its_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def run(first: Tensor, *rest: Any) -> Any:
        with torch.cuda.device(first.device):
            return kernel(first, *rest)

    return run


def _host_operator(schema: str) -> Callable[[_F], _F]:
    """An operator that only the CPU has: on CUDA it works on copies there, and brings back what it
    returns."""

    def register(kernel: _F) -> _F:
        def on_copies(first: Tensor, *rest: Any) -> Any:
            result = kernel(first.cpu(), *rest)
            if isinstance(result, Tensor):
                return result.to(first.device)
            return tuple(item.to(first.device) for item in result)

        return _operator(schema, cuda=on_copies)(kernel)

    return register


def _stream(tensor: Tensor) -> int:
    """The stream that work on a tensor goes to; the core takes it as an integer."""
    return 0 if tensor.device.type == "cpu" else torch.cuda.current_stream().cuda_stream


def _fake(name: str) -> Callable[[_F], _F]:
    def register(function: _F) -> _F:
        torch.library.register_fake(f"lowbitcore::{name}", function, lib=_library)
        return function

    return register


def _fail(op: str, argument: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{op}: {argument}: expected {expected}, got {got}")


def _check(op: str, bits: object = 4, group_size: object = -1, **tensors: Tensor | None) -> None:
    """What must hold before torch picks a kernel: integers that are such, and tensors, all on one
    device that has kernels. Only ``g_idx``, ``bias`` and ``teacher`` may be missing."""
    if type(bits) is not int or bits not in (2, 3, 4, 8):
        _fail(op, "bits", "2, 3, 4 or 8", repr(bits))
    if type(group_size) is not int or group_size == 0 or group_size < -1:
        _fail(op, "group_size", "-1 or a positive multiple of 32", repr(group_size))
    device = None
    for name, tensor in tensors.items():
        if tensor is None and name in ("g_idx", "bias", "teacher"):
            continue
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            _fail(op, name, "a dense tensor", getattr(tensor, "layout", type(tensor).__name__))
        here = tensor.device
        if device is None:
            if here.type not in ("cpu", "cuda", "meta"):
                _fail(op, name, "a tensor on the CPU or on CUDA", here)
            device = here
        elif here != device:
            _fail(op, name, f"a tensor on {device}, as the other arguments", here)


# Under autograd.grad's is_grads_batched tensors of torch's older vmap look like any others. By its
# number: to look up the name takes longer than all else that _is_plain asks for.
_VMAP_MODE = torch._C._dispatch_key_parse("VmapMode")


def _is_plain(*tensors: Tensor) -> bool:
    """Whether these are data in the CPU's memory that nobody watches: torch does not
    differentiate, trace, transform or record what is done with them. Its dispatcher, which takes
    longer than a small product, then has nothing to add."""
    return not (
        torch.compiler.is_compiling()  # first: it cannot look into the others
        or torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE)
        or torch._C._get_tracing_state()
        or torch._C._autograd._profiler_enabled()
    ) and all(map(_in_memory, tensors))


def _in_memory(tensor: Tensor) -> bool:
    """Whether it is data in the CPU's memory, not one of the stand-ins that torch traces with."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.is_cpu
        and not tensor._is_zerotensor()  # as autograd makes them of gradients known to be zeros
    )


def _kernel_or_operator(
    name: str, kernel: Callable[..., Any], *tensors: Tensor
) -> Callable[..., Any]:
    """The operator of this name, or of plain tensors the kernel it ends up in."""
    return kernel if _is_plain(*tensors) else getattr(torch.ops.lowbitcore, name)


def _check_dims(op: str, name: str, tensor: Tensor, dims: int) -> None:
    if tensor.dim() != dims:
        _fail(op, name, f"{dims} dimensions", tuple(tensor.shape))


def _check_activations(op: str, name: str, tensor: Tensor) -> None:
    """The core's rule for their type, where torch computes in its place."""
    if tensor.dtype not in _ACTIVATIONS:
        _fail(op, name, "float32, bfloat16 or float16", tensor.dtype)


def serves(*tensors: Tensor) -> bool:
    """Whether what lies between products, and losses, can be left to the core: on the CPU, of a
    type and a width [..., D] that it takes, and not under ``torch.compile``."""
    return not torch.compiler.is_compiling() and all(
        x.is_cpu and x.dtype in _ACTIVATIONS and x.shape[-1] % 32 == 0 for x in tensors
    )


def _rows(tensor: Tensor) -> Tensor:
    """[..., C] as the core takes it: columns contiguous, rows not overlapping and a step apart."""
    if tensor.is_contiguous() and not tensor.is_neg() and tensor.numel():
        return tensor
    flat = (
        tensor.resolve_neg().reshape(-1, tensor.shape[-1])
        if tensor.numel()
        else tensor.new_empty(tensor.shape[:-1].numel(), tensor.shape[-1])
    )
    if flat.stride(1) != 1 or flat.stride(0) < flat.shape[1]:
        flat = flat.contiguous()
    return flat


def _rows_of(result: Tensor) -> Tensor:
    """A new result as the core takes it, which may be empty."""
    if result.numel():
        return result
    return result.new_empty(result.shape[:-1].numel(), result.shape[-1])


# From here on results have memory of their own; smaller ones are quicker to get from torch.
_OWN_BYTES = 1 << 16


def _empty(like: Tensor, *shape: int) -> Tensor:
    """A new result of the type of `like`, on its device; a stand-in of a stand-in.

    torch asks the C library for aligned memory. glibc before 2.38 serves no such request from what
    an equal one has freed, and a training's heap then grows to several times what is in use; from
    memory without a demand it does.
    """
    count = math.prod(shape) * like.element_size() if _in_memory(like) else 0
    if count < _OWN_BYTES:
        return like.new_empty(shape)
    alignment = 64
    memory = torch.from_numpy(np.empty(count + alignment, np.uint8))
    start = -memory.data_ptr() % alignment
    result = memory[start : start + count].view(like.dtype).view(shape)
    if torch.are_deterministic_algorithms_enabled() and getattr(
        torch.utils.deterministic, "fill_uninitialized_memory", False
    ):
        result.fill_(math.nan)  # as torch fills its own
    return result


def _empty_like(tensor: Tensor) -> Tensor:
    return _empty(tensor, *tensor.shape)


def _dense(tensor: Tensor) -> Tensor:
    return tensor.resolve_neg().contiguous()


def _stored_in_features(op: str, packed: Tensor, scales: Tensor, bits: int, group_size: int) -> int:
    """K of a packed weight from its bytes: each of N outputs takes K*bits/8, and one per group.

    That sum grows with K, so it has one solution; this is how a wrong ``x`` is told from a wrong
    ``packed``.
    """
    n, size = scales.shape[1], packed.numel()
    hashable = type(size) is type(n) is int  # symbols of a trace are not
    find = _in_features if hashable else _in_features.__wrapped__
    k = find(size, n, bits, group_size)
    if k is None:
        form = f"{n} outputs, bits {bits} and group_size {group_size}"
        _fail(op, "packed", f"the bytes of a weight with {form}", f"{size} bytes")
    return k


@functools.cache
def _in_features(size: int, n: int, bits: int, group_size: int) -> int | None:
    if n and size % n == 0:
        row = size // n
        per_column = bits / 8 + (1 / group_size if group_size > 0 else 0)
        near = int(row / per_column) // 32 * 32
        for k in (near - 32, near, near + 32):
            if k > 0 and k * bits // 8 + group_count(k, group_size) == row:
                return k
    return None


def group_count(in_features: int, group_size: int) -> int:
    """G: the groups of a row, the last of which may be shorter."""
    return 1 if group_size == -1 else -(-in_features // group_size)


def trivial_g_idx(in_features: int, group_size: int, device: torch.device | None = None) -> Tensor:
    """int32 [K]: ``k // group_size``, what an absent ``g_idx`` stands for."""
    columns = torch.arange(in_features, dtype=torch.int32, device=device)
    return columns // (in_features if group_size == -1 else group_size)


def packed_size(*, bits: int, group_size: int, in_features: int, out_features: int) -> int:
    """P, the bytes of the execution layout: K*N*bits/8 of integers and G*N of zeros."""
    return _C.packed_size(bits, group_size, in_features, out_features)


def check_format(
    op: str, *, bits: int, group_size: int, in_features: int, out_features: int
) -> None:
    """Raise ``ValueError`` in the name of ``op`` unless there is such a format."""
    _check(op, bits, group_size)
    for name, value in (("in_features", in_features), ("out_features", out_features)):
        if isinstance(value, torch.SymInt) or torch._C._get_tracing_state():
            return  # shapes are symbols, or tensors: the kernel will see the number
        if type(value) is not int or not 0 < value < 2**62:
            _fail(op, name, "a positive multiple of 32", repr(value))
    _C.check_format(op, bits, group_size, in_features, out_features)


# ---- packing -------------------------------------------------------------------------------------


def pack_qweight(codes: Tensor, *, bits: int) -> Tensor:
    """Codes uint8 [N, K] -> ``qweight`` int32 [K*bits/32, N], an LSB-first bit stream along K."""
    _check("pack_qweight", bits, codes=codes)
    _check_dims("pack_qweight", "codes", codes, 2)
    result: Tensor = torch.ops.lowbitcore.pack_qweight(codes, bits)
    return result


@_host_operator("pack_qweight(Tensor codes, int bits) -> Tensor")
def _(codes: Tensor, bits: int) -> Tensor:
    qweight = _pack_qweight_fake(codes, bits)
    _C.pack_qweight(_rows(codes), bits, qweight)
    return qweight


@_fake("pack_qweight")
def _pack_qweight_fake(codes: Tensor, bits: int) -> Tensor:
    n, k = codes.shape
    return codes.new_empty((k * bits // 32, n), dtype=torch.int32)


def unpack_qweight(qweight: Tensor, *, bits: int) -> Tensor:
    """The inverse of :func:`pack_qweight`."""
    _check("unpack_qweight", bits, qweight=qweight)
    _check_dims("unpack_qweight", "qweight", qweight, 2)
    if qweight.shape[0] % bits != 0:
        _fail("unpack_qweight", "qweight", f"a multiple of {bits} rows", tuple(qweight.shape))
    result: Tensor = torch.ops.lowbitcore.unpack_qweight(qweight, bits)
    return result


@_host_operator("unpack_qweight(Tensor qweight, int bits) -> Tensor")
def _(qweight: Tensor, bits: int) -> Tensor:
    codes = _unpack_qweight_fake(qweight, bits)
    _C.unpack_qweight(_rows(qweight), bits, codes)
    return codes


@_fake("unpack_qweight")
def _unpack_qweight_fake(qweight: Tensor, bits: int) -> Tensor:
    words, n = qweight.shape
    return qweight.new_empty((n, words * 32 // bits), dtype=torch.uint8)


def pack_qzeros(zeros: Tensor, *, bits: int) -> Tensor:
    """Zeros uint8 [G, N] -> ``qzeros`` int32 [G, N*bits/32] that hold z itself ("gptq_v2")."""
    _check("pack_qzeros", bits, zeros=zeros)
    _check_dims("pack_qzeros", "zeros", zeros, 2)
    result: Tensor = torch.ops.lowbitcore.pack_qzeros(zeros, bits)
    return result


@_host_operator("pack_qzeros(Tensor zeros, int bits) -> Tensor")
def _(zeros: Tensor, bits: int) -> Tensor:
    qzeros = _pack_qzeros_fake(zeros, bits)
    _C.pack_qzeros(_rows(zeros), bits, qzeros)
    return qzeros


@_fake("pack_qzeros")
def _pack_qzeros_fake(zeros: Tensor, bits: int) -> Tensor:
    g, n = zeros.shape
    return zeros.new_empty((g, n * bits // 32), dtype=torch.int32)


def unpack_qzeros(qzeros: Tensor, *, bits: int) -> Tensor:
    """The inverse of :func:`pack_qzeros`."""
    _check("unpack_qzeros", bits, qzeros=qzeros)
    _check_dims("unpack_qzeros", "qzeros", qzeros, 2)
    if qzeros.shape[1] % bits != 0:
        _fail("unpack_qzeros", "qzeros", f"a multiple of {bits} columns", tuple(qzeros.shape))
    result: Tensor = torch.ops.lowbitcore.unpack_qzeros(qzeros, bits)
    return result


@_host_operator("unpack_qzeros(Tensor qzeros, int bits) -> Tensor")
def _(qzeros: Tensor, bits: int) -> Tensor:
    zeros = _unpack_qzeros_fake(qzeros, bits)
    _C.unpack_qzeros(_rows(qzeros), bits, zeros)
    return zeros


@_fake("unpack_qzeros")
def _unpack_qzeros_fake(qzeros: Tensor, bits: int) -> Tensor:
    g, words = qzeros.shape
    return qzeros.new_empty((g, words * 32 // bits), dtype=torch.uint8)


def prepack(qweight: Tensor, qzeros: Tensor, *, bits: int, group_size: int) -> Tensor:
    """Canonical tensors -> the execution layout, uint8 [P]: opaque, holds integers and zeros.

    The CPU and CUDA have layouts of their own, which no operation can tell apart: go from one to
    the other by :func:`unpack` on the one and this on the other, as ``QuantLinear`` does. On CUDA,
    wherever it is copied to must be aligned to 16 bytes.
    """
    _check("prepack", bits, group_size, qweight=qweight, qzeros=qzeros)
    _check_dims("prepack", "qweight", qweight, 2)
    _check_dims("prepack", "qzeros", qzeros, 2)
    if qweight.shape[0] % bits != 0:
        _fail("prepack", "qweight", f"a multiple of {bits} rows", tuple(qweight.shape))
    result: Tensor = torch.ops.lowbitcore.prepack(qweight, qzeros, bits, group_size)
    return result


@_operator("prepack(Tensor qweight, Tensor qzeros, int bits, int group_size) -> Tensor")
def _(qweight: Tensor, qzeros: Tensor, bits: int, group_size: int) -> Tensor:
    words, n = qweight.shape
    k = words * 32 // bits
    _C.check_format("prepack", bits, group_size, k, n)
    packed = qweight.new_empty(_C.packed_size(bits, group_size, k, n), dtype=torch.uint8)
    _C.prepack(_rows(qweight), _rows(qzeros), bits, group_size, k, n, packed, _stream(qweight))
    return packed


@_fake("prepack")
def _prepack_fake(qweight: Tensor, qzeros: Tensor, bits: int, group_size: int) -> Tensor:
    words, n = qweight.shape
    groups = group_count(words * 32 // bits, group_size)
    return qweight.new_empty(words * n * 4 + groups * n, dtype=torch.uint8)


def unpack(
    packed: Tensor, *, bits: int, group_size: int, in_features: int, out_features: int
) -> tuple[Tensor, Tensor]:
    """The bit-exact inverse of :func:`prepack`: ``(qweight, qzeros)``."""
    _check("unpack", bits, group_size, packed=packed)
    result: tuple[Tensor, Tensor] = torch.ops.lowbitcore.unpack(
        packed, bits, group_size, in_features, out_features
    )
    return result


@_operator(
    "unpack(Tensor packed, int bits, int group_size, int in_features, int out_features)"
    " -> (Tensor, Tensor)"
)
def _(
    packed: Tensor, bits: int, group_size: int, in_features: int, out_features: int
) -> tuple[Tensor, Tensor]:
    _C.check_format("unpack", bits, group_size, in_features, out_features)
    qweight, qzeros = _unpack_fake(packed, bits, group_size, in_features, out_features)
    _C.unpack(
        _dense(packed),
        bits,
        group_size,
        in_features,
        out_features,
        qweight,
        qzeros,
        _stream(packed),
    )
    return qweight, qzeros


@_fake("unpack")
def _unpack_fake(
    packed: Tensor, bits: int, group_size: int, in_features: int, out_features: int
) -> tuple[Tensor, Tensor]:
    groups = group_count(in_features, group_size)
    return (
        packed.new_empty((in_features * bits // 32, out_features), dtype=torch.int32),
        packed.new_empty((groups, out_features * bits // 32), dtype=torch.int32),
    )


def dequantize(
    packed: Tensor,
    scales: Tensor,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    g_idx: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The dense weight [N, K] in ``dtype`` (float32, bfloat16 or float16), rounded once.

    Not differentiable: gradients go through :func:`qgemm_nt`.
    """
    _check("dequantize", bits, group_size, packed=packed, scales=scales, g_idx=g_idx)
    _check_dims("dequantize", "scales", scales, 2)
    if dtype not in _ACTIVATIONS:
        _fail("dequantize", "dtype", "float32, bfloat16 or float16", repr(dtype))
    check_format(
        "dequantize",
        bits=bits,
        group_size=group_size,
        in_features=in_features,
        out_features=scales.shape[1],
    )
    result: Tensor = torch.ops.lowbitcore.dequantize(
        packed, scales.detach(), g_idx, bits, group_size, in_features, dtype
    )
    return result


@_operator(
    "dequantize(Tensor packed, Tensor scales, Tensor? g_idx, int bits, int group_size,"
    " int in_features, ScalarType dtype) -> Tensor"
)
def _dequantize(
    packed: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    out = _dequantize_fake(packed, scales, g_idx, bits, group_size, in_features, dtype)
    _C.dequantize(
        packed,
        _rows(scales),
        g_idx,
        bits,
        group_size,
        in_features,
        scales.shape[1],
        0,
        out,
        _stream(packed),
    )
    return out


@_fake("dequantize")
def _dequantize_fake(
    packed: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty((scales.shape[1], in_features), dtype=dtype)


# ---- multiplication ------------------------------------------------------------------------------


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
    _check("qgemm_nt", bits, group_size, x=x, packed=packed, scales=scales, g_idx=g_idx, bias=bias)
    _check_dims("qgemm_nt", "scales", scales, 2)
    if x.dim() == 0:
        _fail("qgemm_nt", "x", "at least 1 dimension", tuple(x.shape))
    kernel = _kernel_or_operator("qgemm_nt", _qgemm_nt, x, packed, scales)
    result: Tensor = kernel(x, packed, scales, g_idx, bias, bits, group_size)
    return result


@_operator(
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
    k = _stored_in_features("qgemm_nt", packed, scales, bits, group_size)
    n = scales.shape[1]
    y = _empty(x, *x.shape[:-1], n)
    if _by_dequantizing("qgemm_nt", x, g_idx, n * k):
        if x.shape[-1] != k:
            _fail("qgemm_nt", "x", f"shape [..., {k}]", list(x.shape))
        if bias is not None and bias.shape != (n,):
            _fail("qgemm_nt", "bias", f"shape [{n}]", list(bias.shape))
        rows, out = x.reshape(-1, k), y.view(-1, n)
        for span in dispatch.panels(n, k, x.dtype):
            panel = x.new_empty((span.stop - span.start, k))
            _C.dequantize(
                packed,
                _rows(scales),
                g_idx,
                bits,
                group_size,
                k,
                n,
                span.start,
                panel,
                _stream(x),
            )
            if bias is None:
                torch.mm(rows, panel.mT, out=out[:, span])
            else:
                torch.addmm(bias[span].to(x.dtype), rows, panel.mT, out=out[:, span])
        return y
    _C.qgemm_nt(
        _rows(x),
        packed,
        _rows(scales),
        g_idx,
        None if bias is None else _dense(bias.float()),
        bits,
        group_size,
        k,
        n,
        _rows_of(y),
        _stream(x),
    )
    return y


@_fake("qgemm_nt")
def _qgemm_nt_fake(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    k = _stored_in_features("qgemm_nt", packed, scales, bits, group_size)
    if x.shape[-1] != k:
        _fail("qgemm_nt", "x", f"shape [..., {k}]", list(x.shape))
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
    _check("qgemm_nn", bits, group_size, dy=dy, packed=packed, scales=scales, g_idx=g_idx)
    _check_dims("qgemm_nn", "scales", scales, 2)
    if dy.dim() == 0:
        _fail("qgemm_nn", "dy", "at least 1 dimension", tuple(dy.shape))
    check_format(
        "qgemm_nn",
        bits=bits,
        group_size=group_size,
        in_features=in_features,
        out_features=scales.shape[1],
    )
    kernel = _kernel_or_operator("qgemm_nn", _qgemm_nn, dy, packed, scales)
    result: Tensor = kernel(dy, packed, scales, g_idx, bits, group_size, in_features)
    return result


@_operator(
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
        weight = _dequantize(packed, scales, g_idx, bits, group_size, in_features, dy.dtype)
        torch.mm(dy.reshape(-1, len(weight)), weight, out=dx.view(-1, in_features))
        return dx
    _C.qgemm_nn(
        _rows(dy),
        packed,
        _rows(scales),
        g_idx,
        bits,
        group_size,
        in_features,
        scales.shape[1],
        _rows_of(dx),
        _stream(dy),
    )
    return dx


@_fake("qgemm_nn")
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
        _fail("qgemm_nn", "dy", f"shape [..., {scales.shape[1]}]", list(dy.shape))
    return _empty(dy, *dy.shape[:-1], in_features)


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
    _check("qgemm_grad_scales", bits, group_size, dy=dy, x=x, packed=packed, g_idx=g_idx)
    for name, tensor in (("dy", dy), ("x", x)):
        if tensor.dim() == 0:
            _fail("qgemm_grad_scales", name, "at least 1 dimension", tuple(tensor.shape))
    kernel = _kernel_or_operator("qgemm_grad_scales", _qgemm_grad_scales, dy, x, packed)
    result: Tensor = kernel(dy, x, packed, g_idx, bits, group_size)
    return result


@_operator(
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
        _rows(dy), _rows(x), packed, g_idx, bits, group_size, k, n, ds, _stream(dy)
    )
    return ds


@_fake("qgemm_grad_scales")
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
    _check("permute_columns", x=x, order=order, inverse=inverse)
    if x.dim() == 0:
        _fail("permute_columns", "x", "at least 1 dimension", tuple(x.shape))
    kernel = _kernel_or_operator("permute_columns", _permute_columns, x, order)
    result: Tensor = kernel(x, order, inverse)
    return result


def _select(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    k = x.shape[-1]
    _check_activations("permute_columns", "x", x)
    if order.dtype != torch.int32:
        _fail("permute_columns", "order", "int32", order.dtype)
    if order.shape != (k,):
        _fail("permute_columns", "order", f"{k} elements in one dimension", list(order.shape))
    return x.index_select(-1, order)


@_operator("permute_columns(Tensor x, Tensor order, Tensor inverse) -> Tensor", cuda=_select)
def _permute_columns(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    y = x.new_empty(x.shape)
    if y.numel():
        _C.permute_columns(_rows(x), order, y)
    return y


@_fake("permute_columns")
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


for _name, _setup, _backward in (
    ("permute_columns", _permute_setup, _permute_backward),
    ("qgemm_nt", _nt_setup, _nt_backward),
    ("qgemm_nn", _nn_setup, _nn_backward),
    ("qgemm_grad_scales", _grad_scales_setup, _grad_scales_backward),
):
    torch.library.register_autograd(
        f"lowbitcore::{_name}", _backward, setup_context=_setup, lib=_library
    )


# ---- between products ----------------------------------------------------------------------------


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
    _check("rms_norm", x=x, weight=weight)
    _check_dims("rms_norm", "weight", weight, 1)
    if x.dim() == 0:
        _fail("rms_norm", "x", "at least 1 dimension", tuple(x.shape))
    if weight.requires_grad and torch.is_grad_enabled():
        _fail("rms_norm", "weight", "one that does not ask for a gradient", "one that does")
    kernel = _kernel_or_operator("rms_norm", _rms_norm, x, weight)
    y: Tensor = kernel(x, weight, eps)
    return y


@_operator("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = _empty_like(x)
    _C.rms_norm(_rows(x), _dense(weight), eps, _rows_of(y))
    return y


@_operator("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, float eps) -> Tensor")
def _(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    dx = _empty_like(x)
    _C.rms_norm_backward(_rows(dy), _rows(x), _dense(weight), eps, _rows_of(dx))
    return dx


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
    _check("rotate", x=x, cos=cos, sin=sin)
    _check_dims("rotate", "x", x, 4)
    for name, tensor in (("cos", cos), ("sin", sin)):
        _check_dims("rotate", name, tensor, 3)
        if tensor.shape[0] not in (1, x.shape[0]) or tensor.shape[1:] != x.shape[2:]:
            wanted = f"shape [1 or {x.shape[0]}, {x.shape[2]}, {x.shape[3]}]"
            _fail("rotate", name, wanted, list(tensor.shape))
    kernel = _kernel_or_operator("rotate", _rotate, x, cos, sin)
    y: Tensor = kernel(x, cos, sin, False)
    return y


@_operator("rotate(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor")
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    y = _heads_like(x)
    if y.numel():
        flat, result = (heads.transpose(1, 2).flatten(2) for heads in (x, y))
        _C.rotate(_rows(flat), _rows(cos), _rows(sin), inverse, result)
    return y


@_fake("rotate")
def _(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return _heads_like(x)


def _rotate_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _rotate_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
    dx = torch.ops.lowbitcore.rotate(dy, *ctx.saved_tensors, not ctx.inverse)
    return dx, None, None, None


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
    _check("swiglu", gate=gate, up=up)
    if gate.dim() == 0:
        _fail("swiglu", "gate", "at least 1 dimension", tuple(gate.shape))
    if gate.shape != up.shape:
        _fail("swiglu", "up", f"shape {list(gate.shape)}, as gate", list(up.shape))
    kernel = _kernel_or_operator("swiglu", _swiglu, gate, up)
    out: Tensor = kernel(gate, up)
    return out


@_operator("swiglu(Tensor gate, Tensor up) -> Tensor")
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out = _empty_like(gate)
    _C.swiglu(_rows(gate), _rows(up), _rows_of(out))
    return out


@_operator("swiglu_backward(Tensor d_out, Tensor gate, Tensor up) -> (Tensor, Tensor)")
def _(d_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = _empty_like(gate), _empty_like(up)
    _C.swiglu_backward(_rows(d_out), _rows(gate), _rows(up), _rows_of(d_gate), _rows_of(d_up))
    return d_gate, d_up


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
    _check("dropout", x=x)
    if x.dim() == 0:
        _fail("dropout", "x", "at least 1 dimension", tuple(x.shape))
    dropped = round(p * 2**16)
    if not 0 <= dropped < 2**16:
        _fail("dropout", "p", "0 or more and below 1", p)
    seed = torch.empty((), dtype=torch.int64).random_(-(2**63), None)
    y: Tensor = torch.ops.lowbitcore.dropout(x, seed, dropped)
    return y


@_operator("dropout(Tensor x, Tensor seed, int dropped) -> Tensor")
def _(x: Tensor, seed: Tensor, dropped: int) -> Tensor:
    y = _empty_like(x)
    _C.dropout(_rows(x), int(seed) % 2**64, dropped, _rows_of(y))
    return y


@_fake("dropout")
def _(x: Tensor, seed: Tensor, dropped: int) -> Tensor:
    return _empty_like(x)


@_fake("rms_norm")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _empty_like(x)


@_fake("rms_norm_backward")
def _(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _empty_like(x)


@_fake("swiglu")
def _(gate: Tensor, up: Tensor) -> Tensor:
    return _empty_like(gate)


@_fake("swiglu_backward")
def _(d_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_like(gate), _empty_like(up)


def _rms_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _rms_norm_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.lowbitcore.rms_norm_backward(dy, *ctx.saved_tensors, ctx.eps), None, None


def _swiglu_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = torch.ops.lowbitcore.swiglu_backward(d_out, *ctx.saved_tensors)
    return d_gate, d_up


def _dropout_setup(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    _, seed, ctx.dropped = inputs
    ctx.save_for_backward(seed)


def _dropout_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.lowbitcore.dropout(dy, *ctx.saved_tensors, ctx.dropped), None, None


_differentiable: tuple[tuple[str, Callable[..., Any], Callable[..., Any]], ...] = (
    ("dropout", _dropout_setup, _dropout_backward),
    ("rms_norm", _rms_norm_setup, _rms_norm_backward),
    ("rotate", _rotate_setup, _rotate_backward),
    ("swiglu", _swiglu_setup, _swiglu_backward),
)
for _name, _setup, _backward in _differentiable:
    torch.library.register_autograd(
        f"lowbitcore::{_name}", _backward, setup_context=_setup, lib=_library
    )


# ---- losses --------------------------------------------------------------------------------------


def token_losses(
    logits: Tensor,
    targets: Tensor,
    *,
    lambda_ce: float = 1.0,
    teacher: Tensor | None = None,
    lambda_kl: float = 0.0,
    reverse: bool = False,
    differentiate: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """``lambda_kl KL + lambda_ce CE`` of each token (arXiv 2306.08162, equations 2 and 3), and its
    gradient in the logits; on the CPU.

    Args:
        logits: float32, bfloat16 or float16 [t, V], V a multiple of 32, any strides.
        targets: int64 [t], from 0 to V - 1.
        teacher: the teacher's logits, as the student's; None: no KL.
        reverse: KL(student, teacher) in place of KL(teacher, student).

    Returns:
        Losses float32 [t], and unless ``differentiate`` is false the gradient of their sum, of the
        type of ``logits``. Between them all is float32. What comes out is not differentiable.
    """
    _check("token_losses", logits=logits, targets=targets, teacher=teacher)
    _check_dims("token_losses", "logits", logits, 2)
    losses, gradient = torch.ops.lowbitcore.token_losses(
        logits.detach(), targets, lambda_ce, teacher, lambda_kl, reverse, differentiate
    )
    return losses, gradient if differentiate else None


@_operator(
    "token_losses(Tensor logits, Tensor targets, float lambda_ce, Tensor? teacher, float lambda_kl,"
    " bool reverse, bool differentiate) -> (Tensor, Tensor)"
)
def _(
    logits: Tensor,
    targets: Tensor,
    lambda_ce: float,
    teacher: Tensor | None,
    lambda_kl: float,
    reverse: bool,
    differentiate: bool,
) -> tuple[Tensor, Tensor]:
    losses, gradient = _token_losses_fake(logits, targets, differentiate)
    _C.token_losses(
        _rows(logits),
        _dense(targets),
        lambda_ce,
        None if teacher is None else _rows(teacher),
        lambda_kl,
        reverse,
        losses,
        _rows_of(gradient) if differentiate else None,
    )
    return losses, gradient


@_fake("token_losses")
def _token_losses_fake(logits: Tensor, targets: Tensor, *terms: Any) -> tuple[Tensor, Tensor]:
    *_, differentiate = terms
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    return losses, logits.new_empty(logits.shape if differentiate else 0)


# ---- attention -----------------------------------------------------------------------------------


def has_attention() -> bool:
    """Whether the level in use has :func:`attention`: those with tiles do."""
    return _C.has_attention()


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Causal attention, ``softmax(scale q k^T) v``, with as many queries as keys; on the CPU.

    Args:
        q: bfloat16 [B, H, T, D], D a multiple of 32, at most 256; any strides.
        k, v: bfloat16 [B, H', T, D], any strides. H' divides H; ``H / H'`` heads of q in a row
            share one of k and v.
        scale: above 0; D ** -0.5 by default.

    Returns:
        bfloat16 [B, H, T, D], a transposed view of [B, T, H, D], as gradients are. Scores, softmax
        and sums are float32. Differentiable, once, in q, k and v.

    Raises:
        lowbitcore.Error: the level in use does not have it; see :func:`has_attention`.
    """
    _check("attention", q=q, k=k, v=v)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_dims("attention", name, tensor, 4)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    kernel = _kernel_or_operator("attention", _attention, q, k, v)
    out: Tensor = kernel(q, k, v, scale)[0]
    return out


def _heads(tensor: Tensor) -> Tensor:
    """[B, H, T, D] as the core takes it: columns contiguous."""
    tensor = tensor.resolve_neg()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _heads_like(tensor: Tensor) -> Tensor:
    """Where projections want heads: those of a row together."""
    b, h, t, d = tensor.shape
    return _empty(tensor, b, t, h, d).transpose(1, 2)


@_operator("attention(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)")
def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = _attention_fake(q, k, v, scale)
    _C.attention(_heads(q), _heads(k), _heads(v), scale, out, lse)
    return out, lse


@_fake("attention")
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _heads_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


@_operator(
    "attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " float scale) -> (Tensor, Tensor, Tensor)"
)
def _(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _attention_backward_fake(d_out, q, k, v, out, lse, scale)
    _C.attention_backward(
        _heads(d_out), _heads(q), _heads(k), _heads(v), _heads(out), _dense(lse), scale, dq, dk, dv
    )
    return dq, dk, dv


@_fake("attention_backward")
def _attention_backward_fake(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _heads_like(q), _heads_like(k), _heads_like(v)


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output)


def _attention_backward(ctx: Any, d_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    grads = torch.ops.lowbitcore.attention_backward(d_out, *ctx.saved_tensors, ctx.scale)
    return *grads, None


torch.library.register_autograd(
    "lowbitcore::attention", _attention_backward, setup_context=_attention_setup, lib=_library
)


# ---- quantization --------------------------------------------------------------------------------


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
    _check("quantize_rtn", bits, group_size, weight=weight)
    _check_dims("quantize_rtn", "weight", weight, 2)
    return Quantized(
        *torch.ops.lowbitcore.quantize_rtn(weight.detach(), bits, group_size, sym, mse)
    )


@_operator(
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
        _rows(weight), bits, group_size, sym, mse, codes, scales, zeros, _stream(weight)
    )
    return codes, scales, zeros


@_fake("quantize_rtn")
def _(
    weight: Tensor, bits: int, group_size: int, sym: bool, mse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _quantized_like(weight, group_size)


def accumulate_hessian_(hessian: Tensor, x: Tensor) -> None:
    """``hessian += x^T x`` in place: float32 [K, K] and x [..., K] (float32, bfloat16, float16)."""
    _check("accumulate_hessian", hessian=hessian, x=x)
    _check_dims("accumulate_hessian", "hessian", hessian, 2)
    if x.dim() == 0:
        _fail("accumulate_hessian", "x", "at least 1 dimension", tuple(x.shape))
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
        _fail(op, name, "float32", total.dtype)
    if k == 0 or k % 32:
        _fail(op, name, "a positive multiple of 32 rows", k)
    if total.shape != (k, k):
        _fail(op, name, f"shape [{k}, {k}]", list(total.shape))
    rows = next(iter(inputs.values())).shape[:-1].numel()
    for argument, x in inputs.items():
        _check_activations(op, argument, x)
        if (x.shape[:-1].numel(), x.shape[-1]) != (rows, k):
            _fail(op, argument, f"shape [{rows}, {k}]", list(x.shape))


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


@_operator("accumulate_hessian_(Tensor(a!) hessian, Tensor x) -> ()", cuda=_add_square)
def _(hessian: Tensor, x: Tensor) -> None:
    _C.accumulate_hessian(hessian, _rows(x))


@_fake("accumulate_hessian_")
def _(hessian: Tensor, x: Tensor) -> None:
    return None


def accumulate_cross_(cross: Tensor, a: Tensor, b: Tensor) -> None:
    """``cross += a^T b`` in place: float32 [K, K]; a and b [..., K], float32 or 16 bits each."""
    _check("accumulate_cross", cross=cross, a=a, b=b)
    _check_dims("accumulate_cross", "cross", cross, 2)
    for name, value in (("a", a), ("b", b)):
        if value.dim() == 0:
            _fail("accumulate_cross", name, "at least 1 dimension", tuple(value.shape))
    torch.ops.lowbitcore.accumulate_cross_(cross, a.detach(), b.detach())


@_operator("accumulate_cross_(Tensor(a!) cross, Tensor a, Tensor b) -> ()", cuda=_add_cross)
def _(cross: Tensor, a: Tensor, b: Tensor) -> None:
    _C.accumulate_cross(cross, _rows(a), _rows(b))


@_fake("accumulate_cross_")
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
    _check("gptq_factorize", hessian=hessian)
    _check_dims("gptq_factorize", "hessian", hessian, 2)
    order, u, dead, used = torch.ops.lowbitcore.gptq_factorize(hessian, percdamp, act_order)
    return GptqFactor(order, u, dead, float(used))


@_host_operator(
    "gptq_factorize(Tensor hessian, float percdamp, bool act_order)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def _(hessian: Tensor, percdamp: float, act_order: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order, u, dead, used = _gptq_factorize_fake(hessian, percdamp, act_order)
    used.fill_(
        _C.gptq_factorize(_rows(hessian), percdamp, act_order, order, dead.view(torch.uint8), u)
    )
    return order, u, dead, used


@_fake("gptq_factorize")
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
        _fail(op, "factor", "what gptq_factorize returns", type(factor).__name__)
    _check(op, bits, group_size, weight=weight, order=factor.order, u=factor.u, dead=factor.dead)
    _check_dims(op, "weight", weight, 2)
    if weight.shape[1] != factor.order.shape[0]:
        _fail(op, "weight", f"{factor.order.shape[0]} columns, as the factor", list(weight.shape))
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


@_operator(
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
            _rows(weight),
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
            _stream(weight),
        )
    )
    return codes, scales, zeros, g_idx, loss


@_fake("gptq_quantize")
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


# ---- weights in training -------------------------------------------------------------------------


def add_fake_quantized_(
    out: Tensor, latent: Tensor, scales: Tensor, zeros: Tensor, *, bits: int
) -> None:
    """``out += scales * (q - zeros)`` in place, q being the latent values, rounded and clamped to
    what ``bits`` hold: ``out`` [..., C] (float32, bfloat16, float16), ``latent`` float32 [..., C],
    in steps of the grid, ``scales`` and ``zeros`` float32 [..., 1]; C a multiple of 32."""
    op = "add_fake_quantized"
    _check(op, bits, out=out, latent=latent, scales=scales, zeros=zeros)
    torch.ops.lowbitcore.add_fake_quantized_(
        out, latent.detach(), scales.detach(), zeros.detach(), bits
    )


def fake_quantized_grads(
    dw: Tensor, latent: Tensor, scales: Tensor, zeros: Tensor, *, bits: int
) -> tuple[Tensor, Tensor]:
    """Gradients of ``latent`` and ``scales``, float32 and of their shapes, from that of the sum in
    :func:`add_fake_quantized_`, as if nothing were rounded or clamped."""
    op = "fake_quantized_grads"
    _check(op, bits, dw=dw, latent=latent, scales=scales, zeros=zeros)
    d_latent, d_scales = torch.ops.lowbitcore.fake_quantized_grads(
        dw.detach(), latent.detach(), scales.detach(), zeros.detach(), bits
    )
    return d_latent, d_scales


# On CUDA both are torch's. The core's rules for their arguments are these:


def _check_latent(op: str, like: str, latent: Tensor, **others: Tensor) -> None:
    for name, tensor in ({"latent": latent} | others).items():
        if name != like and tensor.dtype != torch.float32:
            _fail(op, name, "float32", tensor.dtype)
    if latent.dim() == 0 or latent.shape[-1] == 0 or latent.shape[-1] % 32:
        _fail(op, "latent", "a positive multiple of 32 columns", list(latent.shape))
    for name, tensor in others.items():
        shape = [*latent.shape[:-1], latent.shape[-1] if name == like else 1]
        if list(tensor.shape) != shape:
            _fail(op, name, f"shape {shape}", list(tensor.shape))
    _check_activations(op, like, others[like])


def _add_with_torch(out: Tensor, latent: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> None:
    _check_latent("add_fake_quantized", "out", latent, out=out, scales=scales, zeros=zeros)
    out.add_(_latent_steps(latent, zeros, bits).mul_(scales))


def _grads_with_torch(
    dw: Tensor, latent: Tensor, scales: Tensor, zeros: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    _check_latent("fake_quantized_grads", "dw", latent, dw=dw, scales=scales, zeros=zeros)
    steps = _latent_steps(latent, zeros, bits)
    return dw * scales, steps.mul_(dw).sum(-1, keepdim=True)


def _latent_steps(latent: Tensor, zeros: Tensor, bits: int) -> Tensor:
    return latent.round().clamp_(0, 2**bits - 1).sub_(zeros)


@_operator(
    "add_fake_quantized_(Tensor(a!) out, Tensor latent, Tensor scales, Tensor zeros, int bits)"
    " -> ()",
    cuda=_add_with_torch,
)
def _(out: Tensor, latent: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> None:
    _C.add_fake_quantized(out, _rows(latent), _rows(scales), _rows(zeros), bits)


@_fake("add_fake_quantized_")
def _(out: Tensor, latent: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> None:
    return None


@_operator(
    "fake_quantized_grads(Tensor dw, Tensor latent, Tensor scales, Tensor zeros, int bits)"
    " -> (Tensor, Tensor)",
    cuda=_grads_with_torch,
)
def _(
    dw: Tensor, latent: Tensor, scales: Tensor, zeros: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    d_latent, d_scales = _latent_grads_like(dw, latent, scales, zeros, bits)
    _C.fake_quantized_grads(
        _rows(dw), _rows(latent), _rows(scales), _rows(zeros), bits, d_latent, d_scales
    )
    return d_latent, d_scales


@_fake("fake_quantized_grads")
def _latent_grads_like(
    dw: Tensor, latent: Tensor, scales: Tensor, zeros: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    return latent.new_empty(latent.shape), scales.new_empty(scales.shape)
