"""The core's operations as torch operators, with autograd, fake kernels and ``torch.compile``.

Shapes: ``N`` out_features, ``K`` in_features, both multiples of 32; ``b`` bits (2, 3, 4 or 8);
``group_size`` a multiple of 32 along K, or -1 for the whole row; ``G`` the number of groups, of
which the last may be shorter. ``g_idx`` int32 [K] maps a column to its group; ``None`` stands for
``k // group_size``. A weight is ``W[n, k] = scales[g, n] * (q[n, k] - zeros[g, n])``, ``g =
g_idx[k]``.

Every function raises ``ValueError`` for a mistake of the caller, naming the operation, the
argument, what was expected and what came, and ``lowbitcore.Error`` for what is not one. The
operators themselves are ``torch.ops.lowbitcore.*``; this package is the only caller of the
extension's operations.

On CUDA, work goes to torch's current stream, and a CUDA graph may capture packing and products;
call an operation once outside of one first, as torch asks of everything (a kernel is loaded when
first called).
"""

from lowbitcore.ops.arguments import serves
from lowbitcore.ops.causal_attention import attention
from lowbitcore.ops.decoding import (
    AdaptedWeight,
    Norm,
    Projections,
    RestOfBlock,
    attend,
    finish_token,
    project_token,
)
from lowbitcore.ops.dense import gemm_nn, gemm_nt
from lowbitcore.ops.elementwise import dropout, rms_norm, rotate, swiglu
from lowbitcore.ops.fake_quantization import add_fake_quantized_, fake_quantized_grads
from lowbitcore.ops.format import check_format, group_count, packed_size, trivial_g_idx
from lowbitcore.ops.losses import token_losses
from lowbitcore.ops.low_rank import add_low_rank
from lowbitcore.ops.packing import (
    dequantize,
    pack_qweight,
    pack_qzeros,
    prepack,
    unpack,
    unpack_qweight,
    unpack_qzeros,
)
from lowbitcore.ops.products import permute_columns, qgemm_grad_scales, qgemm_nn, qgemm_nt
from lowbitcore.ops.quantization import (
    GptqFactor,
    GptqResult,
    Quantized,
    accumulate_cross_,
    accumulate_hessian_,
    gptq_factorize,
    gptq_quantize,
    quantize_rtn,
)

__all__ = [
    "AdaptedWeight",
    "GptqFactor",
    "GptqResult",
    "Norm",
    "Projections",
    "Quantized",
    "RestOfBlock",
    "accumulate_cross_",
    "accumulate_hessian_",
    "add_fake_quantized_",
    "add_low_rank",
    "attend",
    "attention",
    "check_format",
    "dequantize",
    "dropout",
    "fake_quantized_grads",
    "finish_token",
    "gemm_nn",
    "gemm_nt",
    "gptq_factorize",
    "gptq_quantize",
    "group_count",
    "pack_qweight",
    "pack_qzeros",
    "packed_size",
    "permute_columns",
    "prepack",
    "project_token",
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
