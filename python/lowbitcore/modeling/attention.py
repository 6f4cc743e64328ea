"""Attention of transformers' models through the core's operation, wherever that has it.

Importing this registers the implementation ``lowbitcore`` with transformers. It is torch's own,
``sdpa``, but where as many queries as keys are causal, on the CPU: training, calibration,
evaluation, prompts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lowbitcore import ops, runtime
from lowbitcore.dense import is_slow

__all__ = ["use_own_attention"]

_NAME = "lowbitcore"


def use_own_attention(model: PreTrainedModel) -> None:
    """Our implementation in the place of ``sdpa``; a model that asks for another keeps it.

    transformers leaves the name of an implementation out of a config that it writes.
    """
    if model.config._attn_implementation == "sdpa" and not _knows_sdpa(type(model)):
        model.set_attn_implementation(_NAME)


def _knows_sdpa(kind: type[PreTrainedModel]) -> bool:
    """Whether a model's code calls for one implementation or another itself, or asks which is in
    use, as some do that have more to mask."""
    if not kind._can_set_attn_implementation():
        return True
    return '"sdpa"' in inspect.getsource(inspect.getmodule(kind) or kind)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # A sliding window narrower than the sequence comes as a mask, like padding.
    if (
        causal
        and attention_mask is None
        and dropout == 0.0
        and kwargs.get("position_bias") is None
        and kwargs.get("softcap") is None
        and _is_ours(query, key, value)
    ):
        out = ops.attention(query, key, value, scale=scaling)
        return out.transpose(1, 2), None

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        out, _ = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
        return cast(Tensor, out)

    watched = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    mask_trains = attention_mask is not None and attention_mask.requires_grad
    if watched and is_slow(query) and dropout == 0.0 and not mask_trains:
        result: Tensor = _BackwardInFloat32.apply(attend, query, key, value, attention_mask)
        return result, None
    return attend(query, key, value, attention_mask), None


class _BackwardInFloat32(torch.autograd.Function):
    """torch's attention with a backward that is done in float32, from inputs of 16 bits on: on a
    processor that multiplies none, torch's takes several times as long."""

    @staticmethod
    def forward(
        ctx: Any,
        attend: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.attend = attend
        return attend(query, key, value, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        *halves, mask = ctx.saved_tensors
        inputs = [x.float().requires_grad_() for x in halves]
        if mask is not None and mask.is_floating_point():
            mask = mask.float()
        with torch.enable_grad():
            out = ctx.attend(*inputs, mask)
        gradients = torch.autograd.grad(out, inputs, dout.float())
        return (None, *(x.to(dout.dtype) for x in gradients), None)


def _is_ours(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the core has attention for these that is worth it, as without vectors it is not."""
    return (
        ops.serves(query, key, value)
        and runtime.isa() != "scalar"
        and query.dtype == key.dtype == value.dtype
        and query.shape[0] == key.shape[0]
        and query.shape[2:] == key.shape[2:]
        and key.shape == value.shape
        and query.shape[-1] <= 256
    )


AttentionInterface.register(_NAME, _forward)
AttentionMaskInterface.register(_NAME, sdpa_mask)
