"""Integers into words of 32 bits, these into the execution layout, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbitcore import _C
from lowbitcore.ops.arguments import ACTIVATIONS, as_rows, check, check_dims, contiguous, fail
from lowbitcore.ops.format import check_format, group_count
from lowbitcore.ops.operators import define, define_on_host, fake, stream


def pack_qweight(codes: Tensor, *, bits: int) -> Tensor:
    """Codes uint8 [N, K] -> ``qweight`` int32 [K*bits/32, N], an LSB-first bit stream along K."""
    check("pack_qweight", bits, codes=codes)
    check_dims("pack_qweight", "codes", codes, 2)
    result: Tensor = torch.ops.lowbitcore.pack_qweight(codes, bits)
    return result


@define_on_host("pack_qweight(Tensor codes, int bits) -> Tensor")
def _(codes: Tensor, bits: int) -> Tensor:
    qweight = _pack_qweight_fake(codes, bits)
    _C.pack_qweight(as_rows(codes), bits, qweight)
    return qweight


@fake("pack_qweight")
def _pack_qweight_fake(codes: Tensor, bits: int) -> Tensor:
    n, k = codes.shape
    return codes.new_empty((k * bits // 32, n), dtype=torch.int32)


def unpack_qweight(qweight: Tensor, *, bits: int) -> Tensor:
    """The inverse of :func:`pack_qweight`."""
    check("unpack_qweight", bits, qweight=qweight)
    check_dims("unpack_qweight", "qweight", qweight, 2)
    if qweight.shape[0] % bits != 0:
        fail("unpack_qweight", "qweight", f"a multiple of {bits} rows", tuple(qweight.shape))
    result: Tensor = torch.ops.lowbitcore.unpack_qweight(qweight, bits)
    return result


@define_on_host("unpack_qweight(Tensor qweight, int bits) -> Tensor")
def _(qweight: Tensor, bits: int) -> Tensor:
    codes = _unpack_qweight_fake(qweight, bits)
    _C.unpack_qweight(as_rows(qweight), bits, codes)
    return codes


@fake("unpack_qweight")
def _unpack_qweight_fake(qweight: Tensor, bits: int) -> Tensor:
    words, n = qweight.shape
    return qweight.new_empty((n, words * 32 // bits), dtype=torch.uint8)


def pack_qzeros(zeros: Tensor, *, bits: int) -> Tensor:
    """Zeros uint8 [G, N] -> ``qzeros`` int32 [G, N*bits/32] that hold z itself ("gptq_v2")."""
    check("pack_qzeros", bits, zeros=zeros)
    check_dims("pack_qzeros", "zeros", zeros, 2)
    result: Tensor = torch.ops.lowbitcore.pack_qzeros(zeros, bits)
    return result


@define_on_host("pack_qzeros(Tensor zeros, int bits) -> Tensor")
def _(zeros: Tensor, bits: int) -> Tensor:
    qzeros = _pack_qzeros_fake(zeros, bits)
    _C.pack_qzeros(as_rows(zeros), bits, qzeros)
    return qzeros


@fake("pack_qzeros")
def _pack_qzeros_fake(zeros: Tensor, bits: int) -> Tensor:
    g, n = zeros.shape
    return zeros.new_empty((g, n * bits // 32), dtype=torch.int32)


def unpack_qzeros(qzeros: Tensor, *, bits: int) -> Tensor:
    """The inverse of :func:`pack_qzeros`."""
    check("unpack_qzeros", bits, qzeros=qzeros)
    check_dims("unpack_qzeros", "qzeros", qzeros, 2)
    if qzeros.shape[1] % bits != 0:
        fail("unpack_qzeros", "qzeros", f"a multiple of {bits} columns", tuple(qzeros.shape))
    result: Tensor = torch.ops.lowbitcore.unpack_qzeros(qzeros, bits)
    return result


@define_on_host("unpack_qzeros(Tensor qzeros, int bits) -> Tensor")
def _(qzeros: Tensor, bits: int) -> Tensor:
    zeros = _unpack_qzeros_fake(qzeros, bits)
    _C.unpack_qzeros(as_rows(qzeros), bits, zeros)
    return zeros


@fake("unpack_qzeros")
def _unpack_qzeros_fake(qzeros: Tensor, bits: int) -> Tensor:
    g, words = qzeros.shape
    return qzeros.new_empty((g, words * 32 // bits), dtype=torch.uint8)


def prepack(qweight: Tensor, qzeros: Tensor, *, bits: int, group_size: int) -> Tensor:
    """Canonical tensors -> the execution layout, uint8 [P]: opaque, holds integers and zeros.

    The CPU and CUDA have layouts of their own, which no operation can tell apart: go from one to
    the other by :func:`unpack` on the one and this on the other, as ``QuantLinear`` does. On CUDA,
    wherever it is copied to must be aligned to 16 bytes.
    """
    check("prepack", bits, group_size, qweight=qweight, qzeros=qzeros)
    check_dims("prepack", "qweight", qweight, 2)
    check_dims("prepack", "qzeros", qzeros, 2)
    if qweight.shape[0] % bits != 0:
        fail("prepack", "qweight", f"a multiple of {bits} rows", tuple(qweight.shape))
    result: Tensor = torch.ops.lowbitcore.prepack(qweight, qzeros, bits, group_size)
    return result


@define("prepack(Tensor qweight, Tensor qzeros, int bits, int group_size) -> Tensor")
def _(qweight: Tensor, qzeros: Tensor, bits: int, group_size: int) -> Tensor:
    words, n = qweight.shape
    k = words * 32 // bits
    _C.check_format("prepack", bits, group_size, k, n)
    packed = qweight.new_empty(_C.packed_size(bits, group_size, k, n), dtype=torch.uint8)
    _C.prepack(as_rows(qweight), as_rows(qzeros), bits, group_size, k, n, packed, stream(qweight))
    return packed


@fake("prepack")
def _prepack_fake(qweight: Tensor, qzeros: Tensor, bits: int, group_size: int) -> Tensor:
    words, n = qweight.shape
    groups = group_count(words * 32 // bits, group_size)
    return qweight.new_empty(words * n * 4 + groups * n, dtype=torch.uint8)


def unpack(
    packed: Tensor, *, bits: int, group_size: int, in_features: int, out_features: int
) -> tuple[Tensor, Tensor]:
    """The bit-exact inverse of :func:`prepack`: ``(qweight, qzeros)``."""
    check("unpack", bits, group_size, packed=packed)
    result: tuple[Tensor, Tensor] = torch.ops.lowbitcore.unpack(
        packed, bits, group_size, in_features, out_features
    )
    return result


@define(
    "unpack(Tensor packed, int bits, int group_size, int in_features, int out_features)"
    " -> (Tensor, Tensor)"
)
def _(
    packed: Tensor, bits: int, group_size: int, in_features: int, out_features: int
) -> tuple[Tensor, Tensor]:
    _C.check_format("unpack", bits, group_size, in_features, out_features)
    qweight, qzeros = _unpack_fake(packed, bits, group_size, in_features, out_features)
    _C.unpack(
        contiguous(packed),
        bits,
        group_size,
        in_features,
        out_features,
        qweight,
        qzeros,
        stream(packed),
    )
    return qweight, qzeros


@fake("unpack")
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
    check("dequantize", bits, group_size, packed=packed, scales=scales, g_idx=g_idx)
    check_dims("dequantize", "scales", scales, 2)
    if dtype not in ACTIVATIONS:
        fail("dequantize", "dtype", "float32, bfloat16 or float16", repr(dtype))
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


@define(
    "dequantize(Tensor packed, Tensor scales, Tensor? g_idx, int bits, int group_size,"
    " int in_features, ScalarType dtype) -> Tensor"
)
def _(
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
        as_rows(scales),
        g_idx,
        bits,
        group_size,
        in_features,
        scales.shape[1],
        0,
        out,
        stream(packed),
    )
    return out


@fake("dequantize")
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
