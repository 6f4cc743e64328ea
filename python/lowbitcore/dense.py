"""Products of dense tensors of 16 bits on processors that multiply none.

torch then takes them element by element: on AVX2 some 5 times as long as in float32, and up to 80
times of weights that lie across. Here they are the core's, of widths that are multiples of 32.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from lowbitcore import ops
from lowbitcore.ops.arguments import in_memory, is_transformed


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
    if not is_slow_with(x, weight):
        return functional.linear(x, weight, bias)
    if ops.serves(weight):
        return ops.gemm_nt(x, weight, bias)
    return _through_float32(x, weight, bias)


def linear_across(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x W + bias``: x [..., K], weight [K, N], bias [N]; where `is_slow_with` says so."""
    if ops.serves(weight):
        return ops.gemm_nn(x, weight, bias)
    return _through_float32(x, weight.mT, bias)


def is_slow_with(x: Tensor, weight: Tensor) -> bool:
    """Whether torch multiplies these two element by element, and they are such as can be taken
    from it."""
    return (
        not is_transformed()
        and in_memory(x)
        and in_memory(weight)
        and not multiplies(x.dtype)
        and x.dtype == weight.dtype
        and weight.numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )


def _through_float32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """With copies of all three, of widths that the core does not take, which are rare."""
    wide = (None if item is None else item.float() for item in (x, weight, bias))
    return functional.linear(*wide).to(x.dtype)  # type: ignore[arg-type]
