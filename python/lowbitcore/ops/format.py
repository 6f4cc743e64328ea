"""Sizes of the packed format: what they follow from."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lowbitcore import _C
from lowbitcore.ops.arguments import check, fail


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
    check(op, bits, group_size)
    for name, value in (("in_features", in_features), ("out_features", out_features)):
        if isinstance(value, torch.SymInt) or torch._C._get_tracing_state():
            return  # shapes are symbols, or tensors: the kernel will see the number
        if type(value) is not int or not 0 < value < 2**62:
            fail(op, name, "a positive multiple of 32", repr(value))
    _C.check_format(op, bits, group_size, in_features, out_features)


def stored_in_features(op: str, packed: Tensor, scales: Tensor, bits: int, group_size: int) -> int:
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
        fail(op, "packed", f"the bytes of a weight with {form}", f"{size} bytes")
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
