"""Decoding: a new token through a block of a LLaMA-like model in two calls, with its KV cache."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lowbitcore import _C
from lowbitcore.ops.arguments import as_heads, as_rows, check_dims, empty, fail


class AdaptedWeight(NamedTuple):
    """``x[..., order] W^T + bias + sum of scaling * B A x``, W packed, with a trivial ``g_idx``.

    packed: from :func:`prepack`. scales: float32 [G, N]. bias: float32 [N]. order: int32 [K], as
    :func:`permute_columns` takes it; None: x as it is. adapters: of each A [r, K], B [N, r],
    float32 (arXiv 2106.09685).
    """

    packed: Tensor
    scales: Tensor
    bias: Tensor | None
    order: Tensor | None
    bits: int
    group_size: int
    in_features: int
    out_features: int
    adapters: tuple[tuple[Tensor, Tensor, float], ...]


class Norm(NamedTuple):
    """The weight, [D], and eps of :func:`rms_norm`."""

    weight: Tensor
    eps: float


class Projections(NamedTuple):
    """What makes queries, keys and values of a block's input. The last two are of each head's D
    columns, where a model norms these."""

    norm: Norm
    q: AdaptedWeight
    k: AdaptedWeight
    v: AdaptedWeight
    q_norm: Norm | None
    k_norm: Norm | None


class RestOfBlock(NamedTuple):
    """What follows attention."""

    o: AdaptedWeight
    norm: Norm
    gate: AdaptedWeight
    up: AdaptedWeight
    down: AdaptedWeight


def attend(q: Tensor, keys: Tensor, values: Tensor, *, scale: float) -> Tensor:
    """``softmax(scale q keys^T) values`` for one query a head, as :func:`finish_token` has it.

    Args:
        q: float32, bfloat16 or float16 [B, H, 1, D], D a multiple of 32, at most 256.
        keys, values: [B, H', T, D] of the type of ``q``, T at least 1, any strides;
            H' divides H, and H / H' heads of q in a row share one of them.
        scale: above 0.

    Returns:
        [B, H, 1, D] in the type of ``q``; scores and sums are float32. Not differentiable; for
        plain tensors on the CPU.
    """
    check_dims("attend", "q", q, 4)
    if q.shape[2] != 1:
        fail("attend", "q", "shape [B, H, 1, D]", list(q.shape))
    out = q.new_empty(q.shape)
    _C.attend(as_rows(q.flatten(1)), as_heads(keys), as_heads(values), scale, out.flatten(1))
    return out


def project_token(
    x: Tensor, projections: Projections, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one new token of each sequence, turned to its position.

    Args:
        x: float32, bfloat16 or float16 [B, 1, K].
        cos, sin: [1 or B, 1, D], of the type of ``x``, D a multiple of 64.

    Returns:
        q, k, v [B, heads, 1, D] in the type of ``x``, to which what the modules in this place
        return is rounded. Not differentiable; for plain tensors on the CPU.
    """
    check_dims("project_token", "x", x, 3)
    batch = len(x)
    if x.shape[1] != 1:
        fail("project_token", "x", "shape [B, 1, K]", list(x.shape))
    for name, tensor in (("cos", cos), ("sin", sin)):
        check_dims("project_token", name, tensor, 3)
        if tensor.shape[0] not in (1, batch) or tensor.shape[1] != 1:
            fail("project_token", name, f"shape [1 or {batch}, 1, D]", list(tensor.shape))
    width = cos.shape[-1]
    norm, q_proj, k_proj, v_proj, q_norm, k_norm = projections
    q, k, v = (_new_heads(x, weight.out_features, width) for weight in (q_proj, k_proj, v_proj))
    _C.project_token(
        as_rows(x),
        norm,
        q_proj,
        k_proj,
        v_proj,
        q_norm,
        k_norm,
        as_rows(cos),
        as_rows(sin),
        q.flatten(1),
        k.flatten(1),
        v.flatten(1),
    )
    return q, k, v


def _new_heads(x: Tensor, columns: int, width: int) -> Tensor:
    """[B, heads, 1, width]: as there is one row, heads lie side by side."""
    if width == 0 or columns % width:
        fail("project_token", "cos", f"columns that divide {columns}", width)
    return x.new_empty((len(x), columns // width, 1, width))


def finish_token(
    x: Tensor, q: Tensor, keys: Tensor, values: Tensor, scale: float, rest: RestOfBlock
) -> Tensor:
    """The block's result of one new token of each sequence.

    Args:
        x: [B, 1, K], the block's input; q: [B, H, 1, D], of :func:`project_token`.
        keys, values: [B, H', T, D], of all tokens, any strides; H' divides H. D: a multiple of 32,
            at most 256.
        scale: of the products of q and keys, above 0.

    Returns:
        [B, 1, K] in the type of ``x``.
    """
    check_dims("finish_token", "x", x, 3)
    check_dims("finish_token", "q", q, 4)
    y = empty(x, *x.shape)
    _C.finish_token(
        as_rows(x),
        as_rows(q.flatten(1)),
        as_heads(keys),
        as_heads(values),
        scale,
        *rest,
        y,
    )
    return y
